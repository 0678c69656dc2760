"""What masked tiles let through, kept from layer to layer. Knows patterns. Knows nothing of kernels or ranks."""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor

from ringctx.core.layout import Ranges, indices_of
from ringctx.core.pattern import Pattern

MASK_BYTES = 64 * 2**20
"""Masks that are kept: 256 tiles of 256 queries and 1,024 keys where all heads see alike. A layer that asks for more finds none again."""


class Masks:
    """The masks used last, `MASK_BYTES` of them at most."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Pattern, Ranges, Ranges, torch.device], Tensor] = {}
        self._bytes = 0
        self._lock = Lock()

    def of(self, pattern: Pattern, queries: Ranges, keys: Ranges, device: torch.device) -> Tensor:
        """What `pattern` lets these queries see of these keys: (b|1, h|1, q, k), bool. All layers share it: not to be written to."""
        asked = (pattern, queries, keys, device)
        with self._lock:
            mask = self._kept.pop(asked, None)
            if mask is None:
                allowed = pattern.allows(indices_of(queries, device), indices_of(keys, device))
                mask = allowed[(None,) * (4 - allowed.dim())]
                self._bytes += mask.nbytes
            self._kept[asked] = mask
            while self._bytes > MASK_BYTES:
                oldest = next(iter(self._kept))
                self._bytes -= self._kept.pop(oldest).nbytes
            return mask

    def forget(self) -> None:
        """Keep none."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0


MASKS = Masks()
