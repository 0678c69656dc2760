"""`ringctx train --deepspeed`: runs at every stage are those without it, and go on from each other's checkpoints on any number of ranks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("deepspeed")
pytest.importorskip("tensorboard")

from ringctx.core.ring import Ring
from ringctx.training import checkpoint, loop
from tests.launch.test_generate import ROOT, environment
from tests.training import config


def zero(folder: Path, ranks: int, *runs: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "tests.launch.zero_job"]
    done = subprocess.run([*command, *runs], env=environment(folder), text=True, capture_output=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


HALF = {name: ROOT / "configs" / "deepspeed" / f"{name}.json" for name in ("zero2_bf16", "zero3_offload")}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks, begun together: an engine takes seconds to import. stage*: cut off; parts*: whole; of half precision, both."""
    folder: Path = tmp_path_factory.mktemp("zero")
    runs = []
    for stage in range(4):
        (folder / f"{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        parts = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": 2}
        (folder / f"parts{stage}.json").write_text(json.dumps(parts))
        runs += [f"{folder / f'stage{stage}'}:{folder / f'{stage}.json'}:5"]
    runs += [f"{folder / f'parts{stage}'}:{folder / f'parts{stage}.json'}:8" for stage in (0, 2, 3)]
    runs += [f"{folder / f'{name}-{end}'}:{file}:{end}" for name, file in HALF.items() for end in (8, 5)]
    zero(folder, 2, *runs)
    return folder


@pytest.fixture(scope="module")
def want(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process says without DeepSpeed."""
    return loop.train(config(tmp_path_factory.mktemp("alone"), "training.save_every=4"), Ring.alone())


def found_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def test_parts_of_a_batch_whose_gradients_accumulate_count_by_their_labels(begun: Path, want: dict[str, Any]) -> None:
    for stage in (0, 2, 3):
        for what in ("loss", "grad_norm", "memory_loss"):
            assert found_in(begun / f"parts{stage}")[what] == pytest.approx(want[what], rel=1e-5), (stage, what)


def test_runs_in_bfloat16_keep_float32_weights_and_go_on_as_if_they_had_not_been_cut_off(begun: Path, want: dict[str, Any]) -> None:
    weights = [load_file(begun / f"{name}-5" / "step-4" / "model.safetensors") for name in HALF]
    assert all(x.dtype == torch.float32 for of_run in weights for x in of_run.values())
    assert not any(torch.equal(x, x.bfloat16().float()) for of_run in weights for x in of_run.values() if x.dim() > 1)
    zero(begun, 2, *(f"{begun / f'{name}-5'}:{file}:8" for name, file in HALF.items()))
    for name in HALF:
        whole, cut = (found_in(begun / f"{name}-{end}")["loss"] for end in (8, 5))
        assert cut == pytest.approx(whole, rel=1e-6), name
        assert whole == pytest.approx(want["loss"], rel=2e-2) and whole != pytest.approx(want["loss"], rel=1e-6), name


@pytest.mark.slow
def test_runs_at_every_stage_go_on_from_each_other_on_any_number_of_ranks(begun: Path, want: dict[str, Any]) -> None:
    for stage in range(4):
        assert checkpoint.newest(begun / f"stage{stage}") == begun / f"stage{stage}" / "step-4"
        for ranks in (1, 4):
            shutil.copytree(begun / f"stage{stage}", begun / f"from{stage}on{ranks}")
    shutil.copytree(begun / "stage3", begun / "plain")
    other = {0: 1, 1: 3, 2: 2, 3: 0}  # each stage goes on at another
    for ranks in (1, 4):
        zero(begun, ranks, *(f"{begun / f'from{a}on{ranks}'}:{begun / f'{b}.json'}:8" for a, b in other.items()))
    loop.train(config(begun / "plain", "training.save_every=4"), Ring.alone())
    for folder in (*(f"from{stage}on{ranks}" for stage in range(4) for ranks in (1, 4)), "plain"):
        found = found_in(begun / folder)
        assert found["loss"] == pytest.approx(want["loss"], rel=1e-5), folder
        assert found["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5), folder
