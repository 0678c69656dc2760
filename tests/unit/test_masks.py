"""Masks of tiles that are kept: the same to the bit, never more bytes than is said, and those used last."""

from dataclasses import dataclass, field

import torch

from ringctx.core import masks
from ringctx.core.layout import Ranges, indices_of
from ringctx.core.masks import Masks
from ringctx.core.rules import Dilated

KEYS: Ranges = (range(64),)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Counted(Dilated):
    """Dilated attention that notes every mask it makes."""

    made: list[int] = field(default_factory=list, compare=False)

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        self.made.append(int(i[0]))
        return super().allows(i, j)


def rows(at: int) -> Ranges:
    return (range(at * 16, at * 16 + 16),)


def test_a_mask_is_what_the_pattern_allows():
    found = Masks().of(Dilated(8), rows(2), KEYS, CPU)
    assert found.shape == (1, 1, 16, 64)
    assert torch.equal(found[0, 0], Dilated(8).allows(indices_of(rows(2), CPU), indices_of(KEYS, CPU)))


def test_the_masks_used_last_are_kept_within_their_bytes(monkeypatch):
    monkeypatch.setattr(masks, "MASK_BYTES", 3 * 16 * 64)
    kept, pattern = Masks(), Counted(8)
    for at in (0, 1, 2, 0, 3):
        kept.of(pattern, rows(at), KEYS, CPU)
    assert pattern.made == [0, 16, 32, 48]
    kept.of(pattern, rows(0), KEYS, CPU)  # used after 1, which made room for 3
    assert pattern.made == [0, 16, 32, 48]
    kept.of(pattern, rows(1), KEYS, CPU)
    assert pattern.made == [0, 16, 32, 48, 16]


def test_a_mask_larger_than_all_that_is_kept_is_returned_and_not_kept(monkeypatch):
    monkeypatch.setattr(masks, "MASK_BYTES", 16 * 64 - 1)
    kept, pattern = Masks(), Counted(8)
    assert torch.equal(kept.of(pattern, rows(1), KEYS, CPU), kept.of(pattern, rows(1), KEYS, CPU))
    assert pattern.made == [16, 16]


def test_nothing_is_kept_once_forgotten():
    kept, pattern = Masks(), Counted(8)
    kept.of(pattern, rows(0), KEYS, CPU)
    kept.forget()
    kept.of(pattern, rows(0), KEYS, CPU)
    assert pattern.made == [0, 0]
