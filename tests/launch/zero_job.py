"""Run by torchrun: `ringctx train` by DeepSpeed engines. Each argument is FOLDER:JSON:STEPS; a run is cut off before step STEPS."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ringctx.core.ring import Ring
from ringctx.embed.deepspeed import DeepSpeedTrainer
from ringctx.training import loop
from ringctx.training.step import Taken
from tests.training import config


class Cut(Exception):
    """The run is cut off here."""


def main() -> None:
    """Where a folder has a checkpoint, its run goes on from it."""
    torch.set_num_threads(1)
    with Ring.from_env(timeout=60) as ring:
        for folder, file, steps in (argument.split(":") for argument in sys.argv[1:]):

            class Cuttable(DeepSpeedTrainer):
                def step(self, batch: dict[str, Any], number: int, last: int = int(steps)) -> Taken:
                    if number == last:
                        raise Cut
                    return super().step(batch, number)

            try:
                loop.train(config(Path(folder), "training.save_every=4"), ring, partial(Cuttable.made, Path(file)))
            except Cut:
                assert int(steps) < 8


if __name__ == "__main__":
    main()
