"""Twenty steps with every engine over rings of 1, 2 and 4, one or two of them, are those of transformers alone in one process.

`make parity ARGS=--training` runs the other cells of the grid.
"""

from __future__ import annotations

from collections.abc import Callable
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


def num_ranks(cell: str) -> int:
    _, ring, rings, *_ = cell.split("-")
    return int(ring) * int(rings)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Where the cells of so many ranks left what they saw."""

    @cache
    def ran(ranks: int) -> Path:
        made = tmp_path_factory.mktemp(f"cells{ranks}")
        launch(made, ranks, [cell for cell in CELLS if num_ranks(cell) == ranks])
        return made

    return ran


@cache
def reference(kind: str, case: str, optimizer: str) -> Seen:
    return alone(kind, case, optimizer)


@pytest.mark.parametrize("cell", [pytest.param(cell, marks=[pytest.mark.slow] * (num_ranks(cell) > 2)) for cell in CELLS])
def test_steps_are_those_of_one_process(folders: Callable[[int], Path], cell: str) -> None:
    _, _, _, case, kind, optimizer = cell.split("-")
    seen = Seen(**torch.load(folders(num_ranks(cell)) / f"{cell}.pt"))
    assert not wrong(cell, seen, reference(kind, case, optimizer))
