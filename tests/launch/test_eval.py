"""`ringctx eval` end to end on ranks: one object on stdout, equal to that of one rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from ringctx.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a document and a cache of its own."""
    folder: Path = tmp_path_factory.mktemp("eval")
    (folder / "text.txt").write_text(" ".join(f"Verse {n} says {n * n} and no more." for n in range(60)))
    return folder


def command(place: Path, *typed: str) -> list[str]:
    return ["eval", str(ROOT / "configs" / "tiny_cpu.yaml"), "--document", str(place / "text.txt"), "--json", *typed]


def on_ranks(place: Path, *typed: str, launcher: tuple[str, ...] = ()) -> dict[str, Any]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE")}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    kept |= {"XDG_CACHE_HOME": str(place / "cache"), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, *launcher, "-m", "ringctx", *command(place, *typed)]
    done = subprocess.run(run, env=kept, text=True, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result: dict[str, Any] = json.loads(line)
    return result


@pytest.fixture
def alone(place, capsys, monkeypatch) -> Callable[..., dict[str, Any]]:
    """The same command on one rank, in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))

    def run(*typed: str) -> dict[str, Any]:
        assert main(command(place, *typed)) == 0
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return run


def test_perplexity_with_ranks_is_that_of_one(place, alone):
    typed = ("--task", "perplexity", "--length", "301", "--set", "layout.chunk=100")
    one, two = alone(*typed), on_ranks(place, *typed, "--ranks", "2")
    assert [row["nll"] for row in two["rows"]] == pytest.approx([row["nll"] for row in one["rows"]], rel=1e-5)
    assert two["rows"][0]["bytes"] > one["rows"][0]["bytes"] == 0


def test_needles_under_torchrun_are_those_of_one(place, alone):
    typed = ("--task", "needle", "--length", "301", "--depth", "0.3", "--depth", "1")
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "3")
    one, three = alone(*typed), on_ranks(place, *typed, launcher=torchrun)
    same = ("length", "depth", "correct", "density", "prompt_tokens", "number", "answer")
    assert [[row[key] for key in same] for row in three["rows"]] == [[row[key] for key in same] for row in one["rows"]]
    assert all(len(row["memory"]) == 3 for row in three["rows"])


def test_several_needles_with_ranks_are_those_of_one(place, alone):
    typed = ("--task", "needles", "--length", "701", "--count", "3")
    one, two = alone(*typed), on_ranks(place, *typed, "--ranks", "2")
    for row in (*one["rows"], *two["rows"]):
        assert all(row.pop(key) is not None for key in ("seconds", "prefill_seconds", "answer_seconds"))
        assert len(row.pop("memory")) == len(row.pop("anonymous"))
    assert two["rows"][0].pop("bytes") > one["rows"][0].pop("bytes") == 0
    assert two == one
