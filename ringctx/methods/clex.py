"""CLEX: rotary frequencies that flow with the length, along a learned differential equation.

    z(1) = log f of training      dz/dt = silu((z + log n_t) W_up) W_down + n'_t / n_t      t = length over the trained length, rounded up

where n_t are the NTK-aware frequencies of the factor 2 t - 1 (1 below t = 1), so that with W_down = 0, as it begins, z(t) is log n_t.
Source: Chen et al. 2023 (CLEX, arXiv 2310.16450), equations 10 to 13, and its code. Runge-Kutta of order 4 with a fixed step.
All ranks have the same weights and ask for the same length, that of the whole sequence. Gradients of the weights are this rank's share.
Knows frequencies. Knows nothing of models or ranks. Letters: d rotated dims.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ringctx.errors import ConfigError
from ringctx.methods.extend import Trained
from ringctx.methods.rotary import Rotary, turn


@dataclass(frozen=True, eq=False)
class Flowed:
    """A rotary encoding by a tensor of frequencies (d/2), through which gradients flow."""

    frequencies: Tensor

    def queries(self, q: Tensor, positions: Tensor) -> Tensor:
        """q (b s h d), positions (s,) or (b, s) -> (b s h d)."""
        angles = (positions[..., None].to(self.frequencies.dtype) * self.frequencies).unsqueeze(-2)
        return turn(q, angles.cos(), angles.sin())

    def keys(self, k: Tensor, positions: Tensor) -> Tensor:
        """k (b s g d), positions (s,) or (b, s) -> (b s g d)."""
        return self.queries(k, positions)

    def __repr__(self) -> str:
        return f"Flowed({tuple(self.frequencies.shape)}, {self.frequencies.dtype})"


class Clex(nn.Module):
    """The flow. trained: what the model was trained with. width: hidden units, in d. longest: the largest t. step: of the integration."""

    def __init__(self, trained: Trained, *, longest: int, width: int = 1, step: float = 0.1) -> None:
        super().__init__()
        if longest < 1 or not 0 < step <= 1:
            raise ConfigError(
                f"CLEX was asked for {longest} times the trained length by steps of {step}; give 1 or more, and at most 1 a step."
            )
        self.trained, self.longest, self.step = trained, longest, step
        d = trained.width
        self.up, self.down = nn.Parameter(torch.randn(d // 2, width * d) * (2 / d) ** 0.5), nn.Parameter(torch.zeros(width * d, d // 2))

    def encoding(self, length: int) -> Flowed:
        """Of a sequence of so many tokens, the answer's included."""
        return Flowed(self.frequencies(min(max(1, math.ceil(length / self.trained.length)), self.longest)))

    def rotary(self, length: int) -> Rotary:
        """The same for inference, as a value of its frequencies."""
        with torch.no_grad():
            return Rotary(tuple(self.encoding(length).frequencies.tolist()))

    def frequencies(self, t: float) -> Tensor:
        """exp z(t), (d/2); t may be any number from 1, as in training, where it is drawn anew for each batch."""
        z = self._ntk(1.0).log()
        steps = max(1, math.ceil((t - 1) / self.step - 1e-9))
        h = (t - 1) / steps
        for n in range(steps if t > 1 else 0):
            now = 1 + n * h
            a = self._slope(now, z)
            b = self._slope(now + h / 2, z + h / 2 * a)
            c = self._slope(now + h / 2, z + h / 2 * b)
            z = z + h / 6 * (a + 2 * b + 2 * c + self._slope(now + h, z + h * c))
        return z.exp()

    def _slope(self, t: float, z: Tensor) -> Tensor:
        index, d = self._index(), self.trained.width
        return silu((z + self._ntk(t).log()) @ self.up) @ self.down - 2 * index / (d - 2) / max(2 * t - 1, 1)

    def _ntk(self, t: float) -> Tensor:
        index, d = self._index(), self.trained.width
        return (self.trained.base * max(2 * t - 1, 1) ** (d / (d - 2))) ** (-index / d)

    def _index(self) -> Tensor:
        return torch.arange(0, self.trained.width, 2, dtype=self.up.dtype, device=self.up.device)


def flow_of(trained: Trained, longest: int, file: str | None) -> Clex:
    """A flow whose `state_dict` lies in a safetensors file, or without one that which has not begun to learn.

    Raises ConfigError for a file that cannot be read or is of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if file is None:
        return Clex(trained, longest=longest)
    try:
        weights = load_file(file)
        made = Clex(trained, longest=longest, width=weights["up"].shape[1] // trained.width)
        made.load_state_dict(weights)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"CLEX's flow {file!r} cannot be used ({reason}); save Clex(...).state_dict() of a model that rotates {trained.width} dims "
            "with safetensors."
        ) from error
    return made
