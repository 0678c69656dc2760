"""`ringctx train` on two ranks, one of which is killed: the run goes on from its checkpoint and ends as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tensorboard")

from ringctx.core.ring import Ring
from ringctx.training import checkpoint, loop
from tests.launch.test_generate import environment, pid_of, run
from tests.training import TINY, config

STEPS = ("training.steps=40", "training.context=32")
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for ranks in /proc")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--monitor-interval=0.1")


@LINUX
def test_a_rank_killed_in_mid_training_is_exit_code_3_and_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(TINY)
    out = tmp_path / "run"
    asked = ["-m", "ringctx", "train", str(tmp_path / "c.yaml"), "--ranks", "2", "--json", "--set", f"training.out={out}"]
    asked += [x for one in STEPS for x in ("--set", one)]
    command = [sys.executable, *asked]
    with subprocess.Popen(command, env=environment(tmp_path), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and checkpoint.newest(out) is None:
            time.sleep(0.01)
        os.kill(pid_of(process.pid, 1), signal.SIGKILL)
        err = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 3 and "Rank 1 was killed by SIGKILL" in err, err
    resumed = run(tmp_path, *asked)
    assert resumed.returncode == 0, resumed.stderr
    assert "Going on after step" in resumed.stderr
    result = json.loads(resumed.stdout.splitlines()[-1])
    alone = loop.train(config(tmp_path / "alone", *STEPS), Ring.alone())
    assert result["steps"] == 40
    assert result["loss"] == pytest.approx(alone["loss"], rel=1e-3)


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 3])
def test_torchrun_restarts_a_run_whose_rank_was_killed_from_its_checkpoint(tmp_path: Path, stage: int | None) -> None:
    (tmp_path / "c.yaml").write_text(TINY)
    out = tmp_path / "run"
    asked = ["train", str(tmp_path / "c.yaml"), "--set", f"training.out={out}", *(x for one in STEPS for x in ("--set", one))]
    if stage is not None:
        pytest.importorskip("deepspeed")
        (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        asked += ["--deepspeed", str(tmp_path / "zero.json")]
    command = [sys.executable, *TORCHRUN, "--max-restarts=1", "-m", "ringctx", *asked]
    with subprocess.Popen(command, env=environment(tmp_path), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and checkpoint.newest(out) is None:
            time.sleep(0.01)
        os.kill(pid_of(process.pid, 1), signal.SIGKILL)
        err = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 0, err
    assert "Going on after step" in err
    said = [line for line in err.splitlines() if line.startswith("[ring 0/2] ") and ("is closed" in line or "was stopped" in line)]
    assert len(said) == 1 and "bug in ringctx" not in err, err
    result = json.loads((out / "result.json").read_text())
    alone = loop.train(config(tmp_path / "alone", *STEPS), Ring.alone())
    assert result["steps"] == 40 and result["loss"] == pytest.approx(alone["loss"], rel=1e-3)
