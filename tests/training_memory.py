"""Memory of a training step over a ring against one process: `python -m tests.training_memory [CONFIG] [--set KEY=VALUE …]`.

One step, with AdamW's moments there from the start: by one process of two threads, by two ranks, by two ranks with ZeRO-1; and, where
--case asks for it, by engines in bf16, on one process too. activations: the process's peak less what it was after imports, weights,
gradients and moments, all in float32 and on each rank; of engines it says little.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ringctx import config as configuration
from ringctx.cli import read_document
from ringctx.core.ring import Ring
from ringctx.device import held_memory
from ringctx.runtime.tokenise import tokenise
from ringctx.training import text
from ringctx.training.labels import shifted
from ringctx.training.model import job_of
from ringctx.training.step import MOMENTS, State, Trainer
from tests.launch.test_generate import ROOT

CONFIG = ROOT / "configs" / "smollm2_train.yaml"
ENGINES = ROOT / "configs" / "deepspeed"
CASES: dict[str, tuple[int, int, str | None]] = {
    "alone": (1, 2, None),
    "ring": (2, 1, None),
    "zero1": (2, 1, "zero1"),
    "zero1_bf16_alone": (1, 2, "zero1_bf16"),
    "zero1_bf16": (2, 1, "zero1_bf16"),
    "zero2_bf16": (2, 1, "zero2_bf16"),
}
"""Ranks, the threads of each, and the file of an engine."""
USUAL = ("alone", "ring", "zero1")
MB = 1e6


def highest() -> int:
    """The most bytes that this process had in memory since its mark was reset."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def step(case: str, asked: Any, ring: Ring) -> dict[str, float]:
    """One step of the configuration: its loss, and this process's megabytes."""
    make: Any = Trainer.of
    engine = CASES[case][2]
    if engine is not None:
        from ringctx.embed.deepspeed import DeepSpeedTrainer

        make = partial(DeepSpeedTrainer.made, ENGINES / f"{engine}.json")
    imported = held_memory(torch.device("cpu"))
    job = job_of(asked, ring, None)
    params = {name: p.detach() for name, p in job.model.named_parameters()}
    zeros = {name: {key: torch.zeros(()) if key == "step" else torch.zeros_like(p) for key in MOMENTS} for name, p in params.items()}
    weights = sum(p.nbytes for p in params.values())
    trainer = make(job, asked.training, None if engine else State(params, zeros))  # an engine has moments from the start
    del zeros, params
    from transformers import AutoTokenizer

    book = read_document(ROOT / text.BOOK)[: 8 * asked.training.context]
    tokens = tokenise(AutoTokenizer.from_pretrained(job.model.config._name_or_path), book)[: asked.training.context + 1]
    ids, labels = shifted(torch.tensor([tokens]))
    Path("/proc/self/clear_refs").write_text("5")  # what setting up took is not the step's
    taken = trainer.step(job.share({"input_ids": ids, "shift_labels": labels}), 0)
    peak = highest()
    held = imported + 4 * weights  # weights, gradients and two moments
    return {"loss": taken.loss, "peak": peak / MB, "imported": imported / MB, "weights": weights / MB, "activations": (peak - held) / MB}


def main() -> None:
    """Run the cases one after another, or, as a rank of one, its step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config", nargs="?", type=Path, default=CONFIG)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--rank", choices=CASES)
    given = parser.parse_args()
    if given.rank:
        torch.set_num_threads(CASES[given.rank][1])
        asked = configuration.load(given.config, given.overrides)
        with Ring.from_env(timeout=asked.ring.timeout) as ring:
            found = step(given.rank, asked, ring)
            if ring.rank == 0:
                print(json.dumps(found))
        return
    for case in given.case or USUAL:
        ranks = CASES[case][0]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        sets = [x for one in given.overrides for x in ("--set", one)]
        done = subprocess.run(
            [*command, "-m", "tests.training_memory", str(given.config), "--rank", case, *sets],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        print(case, done.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
