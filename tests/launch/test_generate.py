"""`ringctx generate` end to end: its own launcher and torchrun, the same tokens as transformers, and how failures end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
QUICK = Path(__file__).parent / "quick"
"""Makes DeepSpeed begin without compiling for a minute or two, for speed alone."""
TINY = str(ROOT / "configs" / "tiny_cpu.yaml")
QUESTION = "Who made the firmament?"
ENDLESS = ["--set", "generation.max_new_tokens=100000", "--set", "ring.timeout=120"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a document and a cache of its own."""
    folder: Path = tmp_path_factory.mktemp("generate")
    (folder / "text.txt").write_text("And God said, Let there be a firmament in the midst of the waters. " * 5)
    return folder


def environment(place: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE")}
    path = os.pathsep.join(filter(None, (str(QUICK), str(ROOT), os.environ.get("PYTHONPATH"))))
    return kept | {"XDG_CACHE_HOME": str(place / "cache"), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def generate(place: Path, *extra: str) -> list[str]:
    return ["-m", "ringctx", "generate", TINY, "--document", str(place / "text.txt"), "--question", QUESTION, *extra]


def run(place: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], env=environment(place), text=True, capture_output=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def own_tokens(place) -> list[int]:
    """What transformers generates from the same prompt with its own attention."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        from ringctx.config import load
        from ringctx.core.ring import Ring
        from ringctx.huggingface.weights import checkpoint
        from ringctx.runtime.engine import Engine

        config = load(TINY)
        prompt = torch.tensor([Engine.load(config, Ring.alone()).prompts.whole((place / "text.txt").read_text(), QUESTION)])
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(config.model.path), dtype=torch.float32)
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=config.generation.max_new_tokens, do_sample=False)
    tokens: list[int] = made[0, prompt.shape[1] :].tolist()
    return tokens


@pytest.mark.parametrize(("ranks", "chunk"), [(1, "null"), (2, "null"), (3, "37")])
def test_generate_with_ranks_says_what_transformers_says(place, own_tokens, ranks, chunk):
    done = run(place, *generate(place, "--json", "--ranks", str(ranks), "--set", f"layout.chunk={chunk}"))
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    answer = json.loads(line)
    assert answer["tokens"] == own_tokens
    assert answer["ranks"] == len(answer["memory"]) == ranks
    assert list(answer) == ["answer", "tokens", "prompt_tokens", "ranks", "seconds", "tokens_per_second", "bytes", "memory"]
    assert bool(answer["bytes"]) == (ranks > 1)
    document, question = dict.fromkeys(re.findall(r"Reading ([\d,]+) tokens", done.stderr))
    assert int(document) + int(question) == answer["prompt_tokens"]


def test_under_torchrun_its_ranks_are_used_and_the_text_streams_to_stdout(place, own_tokens):
    done = run(place, "-m", "torch.distributed.run", "--nproc-per-node", "2", *generate(place))
    assert done.returncode == 0, done.stderr
    assert "on 2 ranks" in done.stderr
    with_json = run(place, *generate(place, "--json"))
    assert done.stdout == json.loads(with_json.stdout)["answer"] + "\n"


def test_a_stop_string_ends_the_answer_at_the_same_token_on_every_rank(place, own_tokens):
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "cache" / "ringctx" / "random-tiny")
    whole = tokenizer.decode(own_tokens, skip_special_tokens=True)
    stop = next(sign for sign in whole[len(whole) // 2 :] if sign != "\ufffd")
    done = run(place, *generate(place, "--json", "--ranks", "2", "--set", f"generation.stop={json.dumps([stop])}"))
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["answer"] == whole[: whole.index(stop)]
    assert answer["tokens"] == own_tokens[: len(answer["tokens"])] != own_tokens


def test_a_mistake_on_every_rank_is_said_once_with_exit_code_2(place):
    done = run(place, *generate(place, "--ranks", "2", "--set", "ring.kernel=flahs"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("flahs") == 1, done.stderr


@pytest.fixture
def endless(place, own_tokens) -> Iterator[subprocess.Popen[bytes]]:
    """Two ranks that decode and decode: a model with no token that ends the text."""
    model = place / "endless"
    shutil.copytree(place / "cache" / "ringctx" / "random-tiny", model, dirs_exist_ok=True)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 9999}))
    command = [sys.executable, *generate(place, "--ranks", "2", *ENDLESS, "--set", f"model.path={model}")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    with subprocess.Popen(command, env=environment(place), **pipes) as process:
        assert process.stdout.read(1), process.stderr.read().decode()  # the first piece of the answer: all ranks are at work
        yield process
        process.kill()


def pid_of(launcher: int, rank: int) -> int:
    """The process of a rank that this launcher started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    wanted = f"RANK={rank}".encode()
    return next(int(pid) for pid in children if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for ranks in /proc")
@pytest.mark.parametrize(
    ("how", "rank", "sentence"),
    [
        (signal.SIGKILL, 1, "Rank 1 was killed by SIGKILL"),
        (signal.SIGKILL, 0, "Rank 0 was killed by SIGKILL"),
        (signal.SIGSTOP, 1, "heard nothing of rank 1 for 8 s"),
    ],
    ids=["killed-1", "killed-0", "stopped-1"],
)
def test_a_rank_that_fails_is_one_sentence_and_exit_code_3_within_15_seconds(endless, how, rank, sentence):
    os.kill(pid_of(endless.pid, rank), how)
    began = time.monotonic()
    err = endless.communicate(timeout=60)[1].decode()
    assert time.monotonic() - began < 15
    assert endless.returncode == 3, err
    last = err.strip().splitlines()[-1]
    assert sentence in last
    assert "Traceback" not in err
