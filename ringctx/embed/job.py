"""Job: the ranks of somebody else's training job, folded into rings; what a model needs to be trained on them.

Consecutive ranks share a sequence: rank = data rank x ring size + rank in the ring. Every engine that is known here averages
gradients over *all* ranks, so each rank gives back its labels' share of the mean, times the number of ranks.
Knows groups and the model's forward. Knows nothing of engines; each has a module of its own beside this one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ringctx.core.attention import Attention
from ringctx.core.ring import Ring
from ringctx.embed.loader import Loader
from ringctx.embed.share import Share, shared
from ringctx.errors import ConfigError
from ringctx.huggingface import Context, wrap
from ringctx.training.batch import IGNORED
from ringctx.training.loss import mean_over, token_sum
from ringctx.training.tiled import Tiles, tile_mlps, tiled_sum


@dataclass(eq=False)
class Job:
    """A model that attends over rings, and the ranks that train it. All ranks make one together, with `join`.

    ring: the ranks that share this rank's sequences. data_size rings work side by side, and this is the one of data_rank.
    group: all these ranks, None where there is one.
    layout: how sequences are cut: zigzag, contiguous, striped or documents. tiles: whose MLPs and logits exist at a time; None: all.
    """

    model: Any
    context: Context
    ring: Ring
    data_size: int
    data_rank: int
    group: dist.ProcessGroup | None
    layout: str = "zigzag"
    tiles: Tiles | None = None

    @property
    def size(self) -> int:
        """All ranks."""
        return self.ring.size * self.data_size

    def share(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's arguments for the model, of a batch that all ranks of its ring have: see `ringctx.embed.share.shared`."""
        device = next(self.model.parameters()).device
        return shared(batch, self.layout, self.ring.rank, self.ring.size, device)

    def loader(self, loader: Iterable[Mapping[str, Any]]) -> Loader:
        """The batches of a loader, shared out: see `ringctx.embed.loader.Loader`."""
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

    group: the ranks of the job, all that were started by default.

    From here on `model(**job.share(batch)).loss` is the mean of -log p over all labels of all ranks, the same number on each; its
    gradient is right once the engine has averaged gradients over all ranks, as DDP, FSDP2 and DeepSpeed (with `job.mpu`) do.
    heads: ranks of a ring that trade heads for tokens (all-to-all). tile: tokens whose MLP and logits exist at a time.
    Call it before DDP, fully_shard or deepspeed.initialize, when torch.distributed has begun or torchrun's variables are there.
    Raises ConfigError where the ranks cannot be folded so, and Unsupported, as `ringctx.huggingface.wrap`.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's
    everyone = group or _world(timeout)
    world, rank = (1, 0) if everyone is None else (dist.get_world_size(everyone), dist.get_rank(everyone))
    size = world if ring is None else ring
    if size < 1 or world % size:
        raise ConfigError(f"{world} ranks cannot be folded into rings of {size}; give a ring that divides them.")
    mine = _ring(everyone, size, rank // size) if everyone is not None and size > 1 else None
    made = Ring.from_group(mine, heads=heads, timeout=timeout)
    context, tiles = wrap(inner, made, attention, transport=transport, kernel=kernel), None if tile is None else Tiles(tile)
    if tiles is not None:
        tile_mlps(inner, tiles)
    job = Job(inner, context, made, world // size, rank // size, everyone if world > 1 else None, layout, tiles)
    inner.forward = _forward(job, inner.forward)
    return job


def _world(timeout: float) -> dist.ProcessGroup | None:
    """All ranks; torch.distributed is begun where the variables of a launcher are there and nobody did."""
    if not dist.is_initialized():
        Ring.from_env(timeout=timeout)
    return dist.group.WORLD if dist.is_initialized() else None


def _ring(everyone: dist.ProcessGroup, size: int, number: int) -> dist.ProcessGroup | None:
    """Ring `number` of so many ranks each."""
    ranks = dist.get_process_group_ranks(everyone)
    rings = [ranks[a : a + size] for a in range(0, len(ranks), size)]
    if len(rings) == 1:
        return everyone
    if len(ranks) < dist.get_world_size():  # the others do not take part, and these must have made equally many groups before
        return dist.new_group(rings[number], use_local_synchronization=True)
    return [dist.new_group(ring) for ring in rings][number]


def _forward(job: Job, original: Callable[..., Any]) -> Callable[..., Any]:
    """The model's forward, which takes a share and gives the loss over all ranks."""

    @functools.wraps(original)
    def forward(*args: Any, share: Share | None = None, labels: Tensor | None = None, **named: Any) -> Any:
        if share is None:
            if job.ring.size > 1 or labels is not None:
                raise ConfigError("The model was not told where its tokens live; call it with job.share(batch), or what job.loader gives.")
            return original(*args, **named)
        if args:
            raise ConfigError("Call the model by names: model(**job.share(batch)).")
        with job.context.running(share.layout, documents=share.documents):
            return original(**named) if labels is None else _with_loss(job, original, labels, named)

    return forward


def _with_loss(job: Job, original: Callable[..., Any], labels: Tensor, named: dict[str, Any]) -> Any:
    if job.tiles is None:
        out = original(**named)
        total = token_sum(out.logits, labels)
    else:
        job.tiles.agree(labels.shape[1], job.group)
        out, total = tiled_sum(job.model, original, job.tiles, labels, named)
    loss = mean_over(job.group, total, (labels != IGNORED).sum())
    return type(out)(**(dict(out) | {"loss": loss}))
