"""Extend: the rotary frequencies of a trained model, rescaled for sequences longer than it was trained on.

Knows frequencies and the length of the whole sequence. Knows nothing of models, caches, layouts or ranks.
Letters: d rotated dims, j = 0 .. d/2 - 1 a pair of them, b the base, L0 the trained length, L the sequence's, s the factor.

Where the frequencies depend on L it is an argument: all ranks give the same, that of the whole sequence and never of a shard.
Keys are cached before rotation, so one L, the answer included, serves prefill and decode; whoever changes L rotates them anew.
All arithmetic is float32 in the order of transformers' ROPE_INIT_FUNCTIONS, so that frequencies are equal to theirs bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ringctx.errors import ConfigError
from ringctx.methods.rotary import Rotary


@dataclass(frozen=True)
class Trained:
    """What a model was trained with: d rotated dims (`width`), base b, and L0 tokens (`length`).

    Raises ConfigError when such an encoding cannot be.
    """

    width: int
    base: float
    length: int

    def __post_init__(self) -> None:
        if self.width < 4 or self.width % 2:
            raise ConfigError(f"A rotary encoding of {self.width} dims cannot be extended; it takes an even number, 4 or more.")
        if not 1 < self.base < math.inf or self.length < 2:
            raise ConfigError(
                f"A rotary base of {self.base} trained on {self.length} tokens cannot be; a base is above 1, a length above 1."
            )

    @property
    def rotary(self) -> Rotary:
        """The encoding of training: f_j = b^(-2j/d) (RoFormer, arXiv 2104.09864)."""
        return _rotary(1.0 / _periods(self.width, self.base))


def interpolated(trained: Trained, factor: float) -> Rotary:
    """Position interpolation (arXiv 2306.15595): position m becomes m / s, said as f_j / s. Serves lengths up to s L0."""
    _check(factor)
    return _rotary(1.0 / _periods(trained.width, trained.base) / factor)


def ntk(trained: Trained, factor: float) -> Rotary:
    """NTK-aware (described in YaRN, arXiv 2309.00071): b becomes b s^(d/(d-2)).

    Law: the first frequency stays, the last is divided by s, those between in geometric steps.
    """
    _check(factor)
    d = trained.width
    return _rotary(1.0 / _periods(d, trained.base * factor ** (d / (d - 2))))


def dynamic_ntk(trained: Trained, factor: float, length: int) -> Rotary:
    """NTK-aware with a factor that grows with L: s L / L0 - (s - 1), and 1 up to L0 (transformers' "dynamic").

    length: L, of the whole sequence.  factor 1 is the rule L / L0 in YaRN, arXiv 2309.00071.
    """
    _check(factor)
    if length <= trained.length:
        return trained.rotary
    return ntk(trained, factor * length / trained.length - (factor - 1))


def yarn(trained: Trained, factor: float, beta_fast: float = 32.0, beta_slow: float = 1.0) -> Rotary:
    """YaRN (arXiv 2309.00071): (1 - g) f_j / s + g f_j, where g falls from 1 for pairs that turn fast to 0 for slow ones.

    g is 1 for pairs that turn beta_fast times or more within L0, 0 for beta_slow times or fewer, linear in j between; the two edges
    are rounded outwards to whole pairs, as in the authors' code. cos and sin are multiplied by 0.1 ln s + 1, so logits by its square.
    """
    _check(factor)
    if not 0 < beta_slow < beta_fast < math.inf:
        raise ConfigError(f"YaRN was asked for beta_fast {beta_fast:g}, beta_slow {beta_slow:g}; 0 < beta_slow < beta_fast. Common: 32, 1.")
    if trained.length < 2 * math.pi * beta_slow:
        raise ConfigError(
            f"YaRN was asked for beta_slow {beta_slow:g}, but no pair turns so often in the {trained.length} tokens of training; "
            f"give at most {trained.length / (2 * math.pi):.3g}, or use position interpolation, which is what would be left."
        )

    def pair_that_turns(times: float) -> float:
        return trained.width * math.log(trained.length / (times * 2 * math.pi)) / (2 * math.log(trained.base))

    low = max(math.floor(pair_that_turns(beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(beta_slow)), trained.width - 1)
    periods = _periods(trained.width, trained.base)
    ramp = (torch.arange(trained.width // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 1)
    kept = 1 - ramp.clamp(0, 1)
    return _rotary(1.0 / (factor * periods) * (1 - kept) + 1.0 / periods * kept, 0.1 * math.log(factor) + 1.0)


def longrope(trained: Trained, factor: float, length: int, *, short: Sequence[float], long: Sequence[float]) -> Rotary:
    """LongRoPE (arXiv 2402.13753): f_j / short_j where L <= L0, f_j / long_j beyond, from tables found by search.

    length: L, of the whole sequence.  short, long: d/2 positive numbers each. cos and sin are multiplied by sqrt(1 + ln s / ln L0).
    The paper's threshold, below which positions keep their trained rotation, is 0, as in the checkpoints released with such tables.
    """
    _check(factor)
    for name, table in (("short", short), ("long", long)):
        if len(table) != trained.width // 2 or not all(0 < f < math.inf for f in table):
            raise ConfigError(
                f"LongRoPE was given {len(table)} {name} factors, {_ends(table)}; the model rotates {trained.width} dims, "
                f"so give {trained.width // 2} positive numbers, one a pair of dims."
            )
    divided = torch.tensor(tuple(long if length > trained.length else short), dtype=torch.float32, device="cpu")
    scaling = math.sqrt(1 + math.log(factor) / math.log(trained.length))
    return _rotary(1.0 / (divided * _periods(trained.width, trained.base)), scaling)


def _periods(width: int, base: float) -> Tensor:
    """b^(2j/d), float32 (d/2,): positions a radian."""
    return base ** (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)


def _rotary(frequencies: Tensor, scaling: float = 1.0) -> Rotary:
    return Rotary(tuple(frequencies.tolist()), scaling)


def _check(factor: float) -> None:
    if not 1 <= factor < math.inf:
        raise ConfigError(f"Positions were to be extended {factor} times; a factor is 1 or more, such as 4.0 for four times the length.")


def _ends(table: Sequence[float]) -> str:
    """The least and the greatest number of a table, for a message."""
    return f"{min(table):g} to {max(table):g}" if table else "none at all"
