"""`make mutants`: break a copy of the code in one way after another; the tests that each break names must notice it.

Every break is tried in a child of this process, forked when torch is loaded already, so that it takes about a second.
Ends with 1 if a break is not noticed, or its tests fail for another reason than the break.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("ringctx", "tests", "setup.cfg")
NOT_A_COPY = 90
"""Exit code of a child that would import ringctx from elsewhere."""

MISTAKES = re.compile(r"\b(?:NameError|UnboundLocalError|SyntaxError|IndentationError|ImportError|ModuleNotFoundError)\b")
"""A mutation that fails so is itself wrong, and proves nothing."""


@dataclass(frozen=True)
class Verdict:
    """How a break ended: killed if tests failed because of it, else what happened instead; and what pytest printed."""

    word: str
    seconds: float
    output: str


def times_found(mutation: Mutation) -> int:
    """How often the text to be replaced occurs in its file."""
    return (ROOT / mutation.file).read_text().count(mutation.old)


def run_tests(folder: Path, tests: Iterable[str], timeout: float) -> Verdict:
    """Run these tests on the copy in the folder, in a child process; the word is pytest's exit code as a word."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            _in_child(folder, sorted(set(tests)), output.fileno())
        code = _wait(child, began + timeout)
        output.seek(0)
        text = output.read()
    if code is None:
        word = "timeout"
    elif os.WIFSIGNALED(code):
        word = f"died by {signal.Signals(os.WTERMSIG(code)).name}"
    else:
        word = {0: "survived", 1: "killed", NOT_A_COPY: "not the copy"}.get(
            os.WEXITSTATUS(code), f"pytest ended with {os.WEXITSTATUS(code)}"
        )
    if word == "killed" and MISTAKES.search(text):
        word = "mistaken"
    return Verdict(word, time.monotonic() - began, text)


def _wait(child: int, deadline: float) -> int | None:
    """The child's status; None if it had to be ended at the deadline."""
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _in_child(folder: Path, tests: list[str], output: int) -> None:
    """Become a pytest process that knows nothing but the copy; never returns."""
    code = 3
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        sys.dont_write_bytecode = True
        sys.path[:] = [str(folder), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
        os.environ |= {"PYTHONPATH": str(folder), "COLUMNS": "200"}
        for name in [name for name in sys.modules if name.split(".")[0] in ("ringctx", "tests")]:
            del sys.modules[name]
        found = importlib.util.find_spec("ringctx")
        if found is None or not str(found.origin).startswith(str(folder)):
            os._exit(NOT_A_COPY)
        import pytest

        code = int(pytest.main(["-x", "-q", "--tb=short", "-p", "no:cacheprovider", f"--rootdir={folder}", "-c", "setup.cfg", *tests]))
        sys.stdout.flush()
    finally:
        os._exit(code)


def try_one(folder: Path, mutation: Mutation, timeout: float) -> Verdict:
    """Apply the mutation to the copy, run its tests, and take it back."""
    path = folder / mutation.file
    source = path.read_text()
    broken = source.replace(mutation.old, mutation.new)
    if path.suffix == ".py":
        compile(broken, str(path), "exec")
    path.write_text(broken)
    try:
        return run_tests(folder, mutation.tests, timeout)
    finally:
        path.write_text(source)


def killer(output: str) -> str:
    """The first test that failed, and why, from pytest's summary."""
    found = re.search(r"^(?:FAILED|ERROR) (?:\S*/)?(.*)$", output, re.M)
    return found.group(1) if found else ""


def try_all(mutations: list[Mutation], timeout: float, why: bool) -> int:
    """Print a line for each mutation; the exit code."""
    import torch
    import torch._dynamo  # what children need is loaded once

    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ringctx-mutants-") as name:
        folder = Path(name).resolve()
        for part in COPIED:
            source, target = ROOT / part, folder / part
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        whole = run_tests(folder, (test for m in mutations for test in m.tests), 10 * timeout)
        print(f"{'(nothing broken)':27} {'passes' if whole.word == 'survived' else 'FAILS':9} {whole.seconds:6.1f} s", flush=True)
        if whole.word != "survived":
            print(f"{whole.output}\nThe tests that should notice mutations do not pass without any ({whole.word}); repair that first.")
            return 1
        alive = []
        for mutation in mutations:
            verdict = try_one(folder, mutation, timeout)
            print(f"{mutation.name:27} {verdict.word:9} {verdict.seconds:6.1f} s  {mutation.story}", flush=True)
            if verdict.word != "killed":
                alive.append(mutation)
                print(f"    {mutation.file}: {mutation.old!r} -> {mutation.new!r}; tests: {' '.join(mutation.tests)}")
            if why:
                print(f"    {killer(verdict.output)}")
            if verdict.word not in ("killed", "survived"):
                print(verdict.output[-3000:])
    print(f"{len(mutations) - len(alive)} of {len(mutations)} mutants killed in {time.monotonic() - began:.0f} s")
    if alive:
        print(f"Not noticed: {', '.join(m.name for m in alive)}. Make the tests that they name stronger.")
    return int(bool(alive))


def main(arguments: list[str] | None = None) -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", metavar="NAME", action="append", help="try this mutation alone; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the mutations and stop")
    parser.add_argument("--why", action="store_true", help="print the test that noticed, too")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS", help="for the tests of one mutation")
    asked = parser.parse_args(arguments)
    unknown = sorted(set(asked.only or ()) - {m.name for m in MUTATIONS})
    if unknown:
        parser.error(f"there is no mutation {', '.join(unknown)}; --list shows those there are")
    mutations = [m for m in MUTATIONS if not asked.only or m.name in asked.only]
    if asked.list:
        for mutation in mutations:
            print(f"{mutation.name:27} {mutation.file}: {mutation.story}")
        return 0
    lost = [f"{m.name}: {m.old!r} is {n} times in {m.file}" for m in mutations if (n := times_found(m)) != 1]
    if lost:
        print("\n".join([*lost, "Each text must be there exactly once; bring the mutations up to date with the code."]))
        return 1
    return try_all(mutations, asked.timeout, asked.why)


if __name__ == "__main__":
    sys.exit(main())
