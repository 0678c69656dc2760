"""`ringctx train --deepspeed`: runs at every stage are those without it, and go on from each other's checkpoints on any number of ranks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("tensorboard")

from ringctx.core.ring import Ring
from ringctx.training import checkpoint, loop
from tests.launch.test_generate import environment
from tests.training import config


def zero(folder: Path, ranks: int, *runs: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "tests.launch.zero_job"]
    done = subprocess.run([*command, *runs], env=environment(folder), text=True, capture_output=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def test_runs_at_every_stage_go_on_from_each_other_on_any_number_of_ranks(tmp_path: Path) -> None:
    want = loop.train(config(tmp_path / "alone", "training.save_every=4"), Ring.alone())
    files = {}
    for stage in range(4):
        files[stage] = tmp_path / f"{stage}.json"
        files[stage].write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    zero(tmp_path, 2, *(f"{tmp_path / f'two{stage}'}:{file}:5" for stage, file in files.items()))
    for stage in files:
        assert checkpoint.newest(tmp_path / f"two{stage}") == tmp_path / f"two{stage}" / "step-4"
        for ranks in (1, 4):
            shutil.copytree(tmp_path / f"two{stage}", tmp_path / f"from{stage}on{ranks}")
    shutil.copytree(tmp_path / "two3", tmp_path / "plain")
    other = {0: 1, 1: 3, 2: 2, 3: 0}  # each stage goes on at another
    for ranks in (1, 4):
        zero(tmp_path, ranks, *(f"{tmp_path / f'from{a}on{ranks}'}:{files[b]}:8" for a, b in other.items()))
    loop.train(config(tmp_path / "plain", "training.save_every=4"), Ring.alone())
    for folder in (*(f"from{stage}on{ranks}" for stage in files for ranks in (1, 4)), "plain"):
        found = json.loads((tmp_path / folder / "result.json").read_text())
        assert found["loss"] == pytest.approx(want["loss"], rel=1e-5), folder
        assert found["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5), folder
