"""Other people's training code over rings: Trainer, Accelerate, PEFT, and the example with DeepSpeed, by both launchers."""

from __future__ import annotations

import difflib
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("peft")

from tests.launch.test_generate import environment
from tests.tiny import tiny

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "launch" / "examples"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
DEEPSPEED = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", "29617"]
ALONE = [*TORCHRUN[:-1], "--nproc-per-node=1"]


def start(folder: Path, *command: str) -> None:
    env = environment(folder)
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    done = subprocess.run(command, env=env, cwd=ROOT, text=True, capture_output=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("embed")
    start(folder, *TORCHRUN, "-m", "tests.launch.embed_job", str(folder))
    start(folder, sys.executable, "-m", "tests.launch.embed_job", str(folder))
    return {ranks: json.loads((folder / f"{ranks}.json").read_text()) for ranks in (1, 2)}


@pytest.mark.parametrize("name", ["trainer", "lora", "accelerate"])
def test_their_losses_and_norms_are_those_of_one_process(found: dict[int, dict[str, list[float]]], name: str) -> None:
    assert len(found[1][name]) >= 9
    assert found[2][name] == pytest.approx(found[1][name], rel=1e-4)  # Trainer prints few digits


def code(path: Path) -> list[str]:
    """The lines of a script without its docstring and empty ones."""
    return [line for line in path.read_text().splitlines() if line.strip() and not line.startswith('"""')]


def test_the_change_to_a_deepspeed_script_is_at_most_five_lines() -> None:
    changes = difflib.unified_diff(code(EXAMPLES / "finetune.py"), code(EXAMPLES / "finetune_ring.py"), n=0, lineterm="")
    added = [line for line in changes if line.startswith("+") and not line.startswith("+++")]
    assert 1 <= len(added) <= 5, added


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ringctx.huggingface.weights import save
    from ringctx.training.data import words

    folder = tmp_path_factory.mktemp("finetune")
    save(tiny(), folder / "model")
    words([f"w{n}" for n in range(97)]).save_pretrained(folder / "model")
    (folder / "text.txt").write_text(" ".join(f"w{(7 * n * n + n // 3) % 97}" for n in range(6 * 41)))
    adam = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.5, "optimizer": adam, "zero_optimization": {"stage": 2}}
    (folder / "zero.json").write_text(json.dumps(config))
    return folder


def losses(work: Path, script: str, name: str, *launcher: str) -> list[float]:
    asked = [str(work / "model"), str(work / "text.txt"), "--deepspeed_config", str(work / "zero.json"), "--length", "41", "--steps", "5"]
    start(work, *launcher, str(EXAMPLES / script), *asked, "--out", str(work / name))
    found: list[float] = json.loads((work / name / "losses.json").read_text())
    return found


def test_the_example_says_over_two_ranks_what_it_says_on_one(work: Path) -> None:
    want = losses(work, "finetune.py", "alone", *ALONE)
    assert len(want) == 5
    assert losses(work, "finetune_ring.py", "torchrun", *TORCHRUN) == pytest.approx(want, rel=1e-5)
    assert losses(work, "finetune_ring.py", "deepspeed", *DEEPSPEED) == pytest.approx(want, rel=1e-5)
