"""Loader: a data loader's batches, shared out: the ranks of a ring get parts of one batch, and each ring another.

Two kinds of loaders are served. One that is split over all ranks, as most scripts have it: the ranks of a ring then take turns, and
each rank's batch is trained on by its whole ring, so that nothing is lost. And one that is the same on all ranks of a ring, split
over `job.data_size` (or read by all alike): every batch is trained on once. Before each batch all ranks compare what they read.
"""

from __future__ import annotations

import hashlib
import io
import logging
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringctx.core.ring import Message
from ringctx.errors import RanksDisagree

if TYPE_CHECKING:
    from ringctx.training.job import Job

logger = logging.getLogger(__name__)
_HEADER = struct.Struct("<q32s")


@dataclass(frozen=True)
class Read:
    """What a rank read: bytes of a batch, 0 at the end of its loader, and their hash."""

    size: int
    digest: bytes


class Loader:
    """Iterates over this rank's arguments for the model. turns: whether the ranks of a ring read different batches."""

    def __init__(self, loader: Iterable[Mapping[str, Any]], job: Job) -> None:
        self.loader, self.job = loader, job
        self.turns = job.ring.size > 1 and _is_split(loader, job)
        self._warned = False

    def __len__(self) -> int:
        return len(self.loader) * (self.job.ring.size if self.turns else 1)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler, if it wants to know."""
        sampler = getattr(self.loader, "sampler", None)
        if sampler is not None and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._batches():
            yield self.job.share(batch)

    def _batches(self) -> Iterator[Mapping[str, Any]]:
        """Whole batches, each the same on all ranks of a ring. Raises RanksDisagree."""
        job, source = self.job, iter(self.loader)
        while True:
            batch = next(source, None)
            packed = b"" if batch is None else _pack(batch)
            everyone = self._headers(packed)
            rings = [everyone[a : a + job.ring.size] for a in range(0, job.size, job.ring.size)]
            if not all(any(read.size for read in ring) for ring in rings):
                self._ended(rings)
                return
            mine = rings[job.data_rank]
            if self.turns:
                most = max(sum(read.size > 0 for read in ring) for ring in rings)
                yield from (self._from(turn, mine, packed) for turn in range(most))
                continue
            if any(read != mine[0] for read in mine):
                raise RanksDisagree(_DIFFERENT.format(ring=job.ring.size, data=job.data_size, rank=job.data_rank))
            self._compare(rings)
            assert batch is not None
            yield batch

    def _headers(self, packed: bytes) -> list[Read]:
        """What each of all ranks read."""
        mine = _HEADER.pack(len(packed), hashlib.sha256(packed).digest())
        found = self.job.gather(torch.frombuffer(bytearray(mine), dtype=torch.uint8), "header")
        return [Read(*_HEADER.unpack(bytes(one.tolist()))) for one in found]

    def _from(self, turn: int, mine: list[Read], packed: bytes) -> Mapping[str, Any]:
        """The batch of the ring's rank of this turn; of the last that read one, where that rank read none."""
        job = self.job
        having = [rank for rank, read in enumerate(mine) if read.size]
        owner = having[turn] if turn < len(having) else having[-1]
        ring, device = job.ring, _device()
        if ring.rank == owner:
            data = torch.frombuffer(bytearray(packed), dtype=torch.uint8).to(device)
            others = [rank for rank in range(ring.size) if rank != owner]
            ring.exchange("batch", "a batch", (), [Message(rank, (data,)) for rank in others]).wait()
        else:
            data = torch.empty(mine[owner].size, dtype=torch.uint8, device=device)
            ring.exchange("batch", "a batch", [Message(owner, (data,))]).wait()
        return _unpack(data)

    def _ended(self, rings: list[list[Read]]) -> None:
        left = sum(read.size > 0 for ring in rings for read in ring)
        if left:
            logger.warning("The loaders of some data ranks ended before others; %d batches of this round were not trained on.", left)

    def _compare(self, rings: list[list[Read]]) -> None:
        if len(rings) > 1 and not self._warned and len({ring[0].digest for ring in rings}) == 1:
            self._warned = True
            logger.warning(
                "All %d data ranks read the same batch. If that is not meant, give the loader a "
                "DistributedSampler(dataset, num_replicas=job.data_size, rank=job.data_rank).",
                len(rings),
            )


_DIFFERENT = (
    "The ranks of a ring read different batches, but share each sequence. Give the loader a DistributedSampler over all ranks "
    "(they then take turns), or one that is the same in a ring of {ring}: DistributedSampler(dataset, num_replicas={data}, rank={rank})."
)


def _is_split(loader: object, job: Job) -> bool:
    """Whether each of all ranks reads other batches of this loader."""
    from torch.utils.data import DistributedSampler

    for sampler in (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)):
        if isinstance(sampler, DistributedSampler):
            return sampler.num_replicas == job.size
    return type(loader).__module__.startswith("accelerate.")


def _device() -> torch.device:
    return torch.device("cuda") if dist.is_initialized() and dist.get_backend() != "gloo" else torch.device("cpu")


def _pack(batch: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save({name: x.cpu() if isinstance(x, Tensor) else x for name, x in batch.items()}, file)
    return file.getvalue()


def _unpack(data: Tensor) -> Mapping[str, Any]:
    found: Mapping[str, Any] = torch.load(io.BytesIO(bytes(data.cpu().numpy())), weights_only=True)
    return found
