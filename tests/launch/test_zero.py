"""`ringctx train --deepspeed`: runs at every stage are those without it, and go on from each other's checkpoints on any number of ranks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

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


def test_parts_of_a_batch_whose_gradients_accumulate_count_by_their_labels(tmp_path: Path) -> None:
    want = loop.train(config(tmp_path / "alone", "training.save_every=4"), Ring.alone())
    for stage in (0, 2, 3):
        file = tmp_path / f"{stage}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": 2}))
    zero(tmp_path, 2, *(f"{tmp_path / f'parts{stage}'}:{tmp_path / f'{stage}.json'}:8" for stage in (0, 2, 3)))
    for stage in (0, 2, 3):
        found = json.loads((tmp_path / f"parts{stage}" / "result.json").read_text())
        for what in ("loss", "grad_norm", "memory_loss"):
            assert found[what] == pytest.approx(want[what], rel=1e-5), (stage, what)


def test_runs_in_bfloat16_keep_float32_weights_and_go_on_as_if_they_had_not_been_cut_off(tmp_path: Path) -> None:
    want = loop.train(config(tmp_path / "alone", "training.save_every=4"), Ring.alone())
    files = {name: ROOT / "configs" / "deepspeed" / f"{name}.json" for name in ("zero2_bf16", "zero3_offload")}
    zero(tmp_path, 2, *(f"{tmp_path / f'{name}-{end}'}:{file}:{end}" for name, file in files.items() for end in (8, 5)))
    weights = [load_file(tmp_path / f"{name}-5" / "step-4" / "model.safetensors") for name in files]
    assert all(x.dtype == torch.float32 for of_run in weights for x in of_run.values())
    assert not any(torch.equal(x, x.bfloat16().float()) for of_run in weights for x in of_run.values() if x.dim() > 1)
    zero(tmp_path, 2, *(f"{tmp_path / f'{name}-5'}:{file}:8" for name, file in files.items()))
    for name in files:
        whole, cut = (json.loads((tmp_path / f"{name}-{end}" / "result.json").read_text())["loss"] for end in (8, 5))
        assert cut == pytest.approx(whole, rel=1e-6), name
        assert whole == pytest.approx(want["loss"], rel=2e-2) and whole != pytest.approx(want["loss"], rel=1e-6), name


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
