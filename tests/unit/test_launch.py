"""Launch: out of how the ranks ended comes one sentence and one exit code, the cause's and not its echo's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ringctx.runtime import launch
from ringctx.runtime.launch import ENVIRONMENT, End, _ends, cause, leave

REQUEST = End(1, 2, "ring.timeout is soon")
ECHO = End(0, 3, "rank 1 closed its connection")
STOPPED = End(2, 3, "stopped", survivor=True)
BUG = End(3, 1, "a bug")
KILLED = End(1, 3, "killed by SIGKILL")


@pytest.mark.parametrize(
    ("left", "silent", "want"),
    [
        ([REQUEST], [], REQUEST),
        ([ECHO, REQUEST], [], REQUEST),
        ([ECHO, REQUEST, STOPPED], [], REQUEST),
        ([ECHO, BUG], [], BUG),
        ([REQUEST, BUG], [], BUG),
        ([ECHO], [KILLED], KILLED),
        ([ECHO, STOPPED], [], ECHO),
        ([STOPPED], [], STOPPED),
        ([STOPPED], [KILLED], KILLED),
        ([REQUEST], [End(1, 3, "exit code 2")], REQUEST),
        ([REQUEST], [End(0, 3, "killed by SIGTERM")], REQUEST),
    ],
)
def test_the_cause_is_reported(left, silent, want):
    assert cause(left, silent) == want


@pytest.mark.parametrize("end", [REQUEST, STOPPED], ids=["failure", "survivor"])
def test_what_a_rank_leaves_is_what_the_launcher_finds(end, tmp_path, monkeypatch):
    folder = tmp_path / "attempt_0" / str(end.rank)
    folder.mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
    leave(end)
    assert _ends(tmp_path) == [end]
    assert json.loads((folder / "error.json").read_text())["message"]["extraInfo"]["exitcode"] == end.code


def test_a_survivor_does_not_write_over_a_failure(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    leave(REQUEST)
    leave(STOPPED)
    assert _ends(tmp_path) == [REQUEST]


def test_half_a_file_counts_as_silence(tmp_path):
    (tmp_path / "error.json").write_text('{"message": {"mess')
    assert _ends(tmp_path) == []


@pytest.mark.parametrize("is_rank", [True, False])
def test_a_rank_does_not_wait_for_the_interpreter_to_be_taken_down(is_rank):
    script = """
import atexit, os, runpy, sys
atexit.register(print, "exit functions ran")
leave = os._exit
os._exit = lambda code: (print("left at once", flush=True), leave(code))
sys.argv = ["ringctx", "--help"]
runpy.run_module("ringctx", run_name="__main__")
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"RANK": "0", "WORLD_SIZE": "1"} if is_rank else {}
    done = subprocess.run([sys.executable, "-c", script], env=environment, text=True, capture_output=True, timeout=60, check=True)
    assert "exit functions ran" in done.stdout and ("left at once" in done.stdout) is is_rank


@pytest.mark.parametrize("said", [None, "glibc.malloc.check=1"])
def test_ranks_are_started_with_the_environment_unless_another_is_set(monkeypatch: pytest.MonkeyPatch, said: str | None) -> None:
    found = {}
    for name in ("GLIBC_TUNABLES", "OMP_NUM_THREADS", "RINGCTX_LAUNCHER"):
        monkeypatch.setenv(name, "")  # so that what is set meanwhile is undone
        monkeypatch.delenv(name)
    if said is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", said)
    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda *_: lambda *_: found.update(os.environ))
    assert launch.run(2, ["info"]) == 0
    assert found["GLIBC_TUNABLES"] == (said or ENVIRONMENT["GLIBC_TUNABLES"])


@pytest.mark.parametrize("script", ["torchrun.sh", "shaped-ring.sh"])
def test_scripts_start_ranks_as_the_command_does(script: str) -> None:
    text = (Path(__file__).parents[2] / "launch" / script).read_text()
    for name, value in ENVIRONMENT.items():
        assert f"{name}:-{value}}}" in text
