"""Job: a model that attends over rings, and the ranks that train it.

Consecutive ranks share a sequence: rank = data rank x ring size + rank in the ring. The convention of losses and gradients is in the
package's head. Knows groups and the model's forward. Knows nothing of engines; `ringctx.embed` has a module for each.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringctx.core.attention import Attention
from ringctx.core.header import share as everyone
from ringctx.core.ring import Ring, collective, init_world
from ringctx.errors import ConfigError
from ringctx.huggingface import Context, wrap
from ringctx.training.labels import IGNORED
from ringctx.training.loader import Loader
from ringctx.training.loss import mean_of, token_sum
from ringctx.training.recompute import take_over
from ringctx.training.share import Share, shared
from ringctx.training.tiled import Tiles, tile_mlps, tiled_sum


@dataclass(eq=False)
class Job:
    """ring: the ranks that share this rank's sequences. data_size rings work side by side, and this is the one of data_rank.

    group: all these ranks, None where one ring is all. layout: how sequences are cut: zigzag, contiguous, striped, documents.
    tiles: whose MLPs and logits exist at a time; None: all. All ranks make a job together, with `join` or `on`.
    """

    model: Any
    context: Context
    ring: Ring
    data_size: int = 1
    data_rank: int = 0
    group: dist.ProcessGroup | None = None
    layout: str = "zigzag"
    tiles: Tiles | None = None

    @classmethod
    def on(
        cls,
        ring: Ring,
        model: Any,
        attention: Attention | Mapping[int, Attention] | None = None,
        *,
        tile: int | None = None,
        transport: str = "auto",
        kernel: str = "auto",
        **folded: Any,
    ) -> Job:
        """Make the model attend over a ring that is there. Raises what `ringctx.huggingface.wrap` raises."""
        model = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's
        context, tiles = wrap(model, ring, attention, transport=transport, kernel=kernel), None if tile is None else Tiles(tile)
        if tiles is not None:
            tile_mlps(model, tiles)
        job = cls(model, context, ring, tiles=tiles, **folded)
        model.forward = _forward(job, model.forward)
        context.only_running = True
        take_over(model, context)
        return job

    @property
    def size(self) -> int:
        """All ranks."""
        return self.ring.size * self.data_size

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def gather(self, mine: Tensor, kind: str = "losses") -> list[Tensor]:
        """The tensors (n) of all ranks, in their order. All ranks must call it together."""
        if self.data_size == 1:
            return everyone(self.ring, mine, kind) if self.ring.size > 1 else [mine]
        mine = mine if dist.get_backend(self.group) == "gloo" else mine.cuda()
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with collective(f"exchanging {kind} over all rings"):
            dist.all_gather(found, mine.contiguous(), group=self.group)
        return found

    def share(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's arguments for the model, of a batch that all ranks of its ring have: see `ringctx.training.share.shared`."""
        return shared(batch, self.layout, self.ring.rank, self.ring.size, self.device)

    def loader(self, loader: Iterable[Mapping[str, Any]]) -> Loader:
        """The batches of a loader, shared out: see `ringctx.training.loader.Loader`."""
        return Loader(loader, self)


def join(
    model: Any,
    *,
    ring: int | None = None,
    group: dist.ProcessGroup | None = None,
    attention: Attention | Mapping[int, Attention] | None = None,
    layout: str = "zigzag",
    heads: int = 1,
    tile: int | None = None,
    transport: str = "auto",
    kernel: str = "auto",
    timeout: float = 600.0,
) -> Job:
    """Make a transformers model attend over rings of `ring` consecutive ranks (all of them by default) and say what it lost on all.

    From here on `model(**job.share(batch)).loss` is the mean of -log p over all labels of all ranks, the same number on each; its
    gradient is right once the engine has averaged gradients over all ranks, as DDP, FSDP2 and DeepSpeed (with `job.mpu`) do.
    group: the ranks of the job, all that were started by default. heads: ranks of a ring that trade heads for tokens (all-to-all).
    tile: the most tokens whose MLP and logits exist at a time.
    Call it before DDP, fully_shard or deepspeed.initialize, when torch.distributed has begun or a launcher's variables are there.
    Raises ConfigError where the ranks cannot be folded so, and Unsupported, as `ringctx.huggingface.wrap`.
    """
    ranks = group or _world(timeout)
    world, rank = (1, 0) if ranks is None else (dist.get_world_size(ranks), dist.get_rank(ranks))
    size = world if ring is None else ring
    if size < 1 or world % size:
        raise ConfigError(f"{world} ranks cannot be folded into rings of {size}; give a ring that divides them.")
    mine = _ring(ranks, size, rank // size) if ranks is not None and size > 1 else None
    made, folded = Ring.from_group(mine, heads=heads, timeout=timeout), {"data_size": world // size, "data_rank": rank // size}
    asked: dict[str, Any] = {"tile": tile, "transport": transport, "kernel": kernel, "layout": layout, **folded}
    return Job.on(made, model, attention, group=ranks, **asked)


def _world(timeout: float) -> dist.ProcessGroup | None:
    """All ranks; torch.distributed is begun where the variables of a launcher are there and nobody did."""
    if not dist.is_initialized() and "RANK" in os.environ:
        init_world(timeout)
    return dist.group.WORLD if dist.is_initialized() else None


def _ring(group: dist.ProcessGroup, size: int, number: int) -> dist.ProcessGroup | None:
    """Ring `number` of so many ranks each."""
    ranks = dist.get_process_group_ranks(group)
    rings = [ranks[a : a + size] for a in range(0, len(ranks), size)]
    if len(rings) == 1:
        return group
    if len(ranks) < dist.get_world_size():  # the others do not take part, and these must have made equally many groups before
        return dist.new_group(rings[number], use_local_synchronization=True)
    return [dist.new_group(ring) for ring in rings][number]


def _forward(job: Job, original: Callable[..., Any]) -> Callable[..., Any]:
    """The model's forward, which takes a share and gives the loss over all ranks."""

    @functools.wraps(original)
    def forward(*args: Any, share: Share | None = None, labels: Tensor | None = None, **named: Any) -> Any:
        if share is None:
            if job.context.layout is None and not job.context.decoding and (job.ring.size > 1 or labels is not None):
                raise ConfigError("The model was not told where its tokens live; call it with job.share(batch), or what job.loader gives.")
            with nullcontext() if job.context.is_running else job.context.running():
                return original(*args, **named)
        if args:
            raise ConfigError("Call the model by names: model(**job.share(batch)).")
        with job.context.running(share.layout, documents=share.documents):
            named["use_cache"] = False
            return original(**named) if labels is None else _with_loss(job, original, labels, named)

    return forward


def _with_loss(job: Job, original: Callable[..., Any], labels: Tensor, named: dict[str, Any]) -> Any:
    if job.tiles is None:
        out = original(**named)
        total = token_sum(out.logits, labels)
    else:
        job.tiles.agree(labels.shape[1], job.gather)
        out, total = tiled_sum(job.model, original, job.tiles, labels, named)
    return type(out)(**(dict(out) | {"loss": mean_of(total, (labels != IGNORED).sum(), job.gather)}))
