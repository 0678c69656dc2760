"""Twenty steps with every engine over rings of 1, 2 and 4, one or two of them, are those of transformers alone in one process.

`make parity ARGS=--training` runs the other cells of the grid.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from tests.embedded import Seen, alone, launch, wrong

pytest.importorskip("deepspeed")

CELLS = (
    "ddp-2-1-plain-llama-sgd",
    "fsdp2-2-1-packed-qwen3-sgd",
    "zero0-1-2-odd-llama-adamw",
    "zero1-2-1-windowed-qwen3-sgd",
    "zero2-2-1-odd-llama-sgd",
    "zero3-1-2-packed-llama-sgd",
    "ddp-2-2-packed-qwen3-adamw",
    "fsdp2-4-1-odd-llama-sgd",
    "zero0-4-1-windowed-llama-sgd",
    "zero1-2-2-plain-llama-adamw",
    "zero2-4-1-packed-qwen3-sgd",
    "zero3-2-2-windowed-llama-sgd",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cells")
    for ranks in (2, 4):
        launch(made, ranks, [cell for cell in CELLS if ranks == int(cell.split("-")[1]) * int(cell.split("-")[2])])
    return made


@cache
def reference(kind: str, case: str, optimizer: str) -> Seen:
    return alone(kind, case, optimizer)


@pytest.mark.parametrize("cell", CELLS)
def test_steps_are_those_of_one_process(folder: Path, cell: str) -> None:
    _, _, _, case, kind, optimizer = cell.split("-")
    seen = Seen(**torch.load(folder / f"{cell}.pt"))
    assert not wrong(cell, seen, reference(kind, case, optimizer))
