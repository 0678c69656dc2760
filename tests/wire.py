"""What crosses the wire, seen from outside: sends and receives of torch.distributed's process groups are wrapped, and tensors noted.

Knows torch.distributed alone, so that it can judge what ringctx says of itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

COLLECTIVES = (
    "allreduce broadcast reduce allgather _allgather_base allgather_into_tensor_coalesced gather scatter "
    "reduce_scatter _reduce_scatter_base alltoall alltoall_base barrier recv_anysource"
).split()


@dataclass
class Wire:
    """Tensors sent and received here, as (dtype, shape, bytes), and by dtype the most bytes of received memory alive at once."""

    sent: list[tuple[str, tuple[int, ...], int]] = field(default_factory=list)
    received: list[tuple[str, tuple[int, ...], int]] = field(default_factory=list)
    most: Counter[str] = field(default_factory=Counter)
    _alive: list[tuple[StorageWeakRef, str, int]] = field(default_factory=list)

    def note(self, incoming: bool, tensor: Tensor) -> None:
        """One tensor to or from a peer."""
        size, dtype = tensor.numel() * tensor.element_size(), str(tensor.dtype).removeprefix("torch.")
        (self.received if incoming else self.sent).append((dtype, tuple(tensor.shape), size))
        if incoming and tensor.dim() == 4:
            storage = tensor.untyped_storage()
            self._alive = [x for x in self._alive if not x[0].expired()] + [(StorageWeakRef(storage), dtype, storage.nbytes())]
            self.most[dtype] = max(self.most[dtype], sum(x[2] for x in self._alive if x[1] == dtype))

    def bytes(self, incoming: bool, dims: int = 4) -> int:
        """Bytes of tensors with so many dims: headers have one, keys and values four."""
        return sum(size for _, shape, size in (self.received if incoming else self.sent) if len(shape) == dims)


@contextmanager
def tapped() -> Iterator[Wire]:
    """Note everything until the end of the block; a collective, whose bytes cannot be seen here, raises."""
    wire = Wire()
    kept = {name: vars(dist.ProcessGroup)[name] for name in ("send", "recv", *COLLECTIVES) if name in vars(dist.ProcessGroup)}
    real = {name: getattr(dist.ProcessGroup, name) for name in kept}

    def noted(name: str) -> Any:
        def call(group: Any, tensors: list[Tensor], *args: Any) -> Any:
            for tensor in tensors:
                wire.note(name == "recv", tensor)
            return real[name](group, tensors, *args)

        return call

    def refused(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError(f"the collective {name} was called; count it here too")

        return call

    for name in real:
        setattr(dist.ProcessGroup, name, noted(name) if name in ("send", "recv") else refused(name))
    try:
        yield wire
    finally:
        for name, function in kept.items():
            setattr(dist.ProcessGroup, name, function)
