"""Ring x tensor parallel: 2 x 2 ranks say what one process says; what cannot be spread is refused in a sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from ringctx.config import Config, parse  # noqa: E402
from ringctx.core.ring import Ring  # noqa: E402
from ringctx.errors import ConfigError, RankLost, Unsupported  # noqa: E402
from ringctx.huggingface import Context, shards  # noqa: E402
from ringctx.runtime.cache import KVCache  # noqa: E402
from ringctx.runtime.engine import Engine, Folders  # noqa: E402
from ringctx.runtime.reading import Reading  # noqa: E402
from tests.launch.shards_job import PLANS  # noqa: E402
from tests.tiny import tiny  # noqa: E402

ROOT = Path(__file__).parents[2]
SPREAD = ["--set", "model.tensor_parallel=2"]


def run(place: Path, *command: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE")}
    kept |= {"XDG_CACHE_HOME": str(place / "cache"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=kept, text=True, capture_output=True, timeout=240, check=False)


def generate(place: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    (place / "text.txt").write_text("Let there be light. " * 9)
    asked = ["--document", str(place / "text.txt"), "--question", "What?", "--json", *extra]
    return run(place, "-m", "ringctx", "generate", "configs/tiny_cpu.yaml", *asked)


def test_families_spread_over_two_by_two_ranks_say_what_one_process_says(tmp_path):
    for kind in PLANS:
        tiny(kind).save_pretrained(tmp_path / kind)
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4")
    done = run(tmp_path, *ranks, "-m", "tests.launch.shards_job", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_by_two_ranks_generate_what_one_does_and_all_four_are_reported(tmp_path):
    alone, spread = generate(tmp_path), generate(tmp_path, "--ranks", "4", *SPREAD)
    assert alone.returncode == spread.returncode == 0, alone.stderr + spread.stderr
    one, four = (json.loads(done.stdout) for done in (alone, spread))
    assert four["tokens"] == one["tokens"]
    assert four["ranks"] == len(four["memory"]) == 4
    assert four["bytes"]["partials"] > 0


def test_a_snapshot_of_some_heads_is_refused(tmp_path):
    engine = Engine(None, None, Context(Ring.alone(), parts=2), Config(), torch.device("cpu"))
    with pytest.raises(ConfigError, match="A snapshot holds all heads of a token; leave --save and --resume out"):
        engine._resume(Reading([1], KVCache(1, 0, 1), 2), [], Folders(save=tmp_path))


def test_a_sum_that_breaks_off_within_a_row_is_a_lost_rank_and_other_errors_stay_what_they_are():
    context = Context(Ring.alone(), parts=2)
    with pytest.raises(RankLost, match="other parts of the same weights.*Start the ranks again"), context.running():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: reset by peer")
    with pytest.raises(RuntimeError, match="shapes do not match"), context.running():
        raise RuntimeError("shapes do not match")
    with pytest.raises(Unsupported, match="no kernel"), context.running():
        raise Unsupported("no kernel")


def test_what_cannot_be_spread_says_what_can():
    shape = {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 6}
    llama, stablelm = (transformers.AutoConfig.for_model(kind, **shape) for kind in ("llama", "stablelm"))
    shards.check(llama, 6, 3)
    with pytest.raises(ConfigError, match="tensor_parallel is 2, but there are 3 ranks.*start a multiple of 2"):
        shards.check(llama, 3, 2)
    with pytest.raises(Unsupported, match="12 query heads and 6 key heads.*possible: 1, 2, 3, 6"):
        shards.check(llama, 4, 4)
    with pytest.raises(Unsupported, match="no tensor-parallel plan for models of type 'stablelm'"):
        shards.check(stablelm, 2, 2)
    with pytest.raises(ConfigError, match=r"model.tensor_parallel is 0; it must be at least 1"):
        parse("model: {tensor_parallel: 0}")
    assert shards.parts_of(torch.nn.Linear(1, 1)) == 1
