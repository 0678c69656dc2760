"""Share: what a rank gets of a batch. Labels are shifted on whole sequences, documents are found, then everything is sharded.

Knows the batches that transformers' collators make. Knows no ranks but the number of its own.
Letters: b sequences, S tokens of each, s of them on this rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ringctx.core.layout import Layout
from ringctx.core.pattern import Pattern
from ringctx.errors import ConfigError, Unsupported
from ringctx.patterns import documents
from ringctx.training.labels import IGNORED

KNOWN = ("input_ids", "labels", "shift_labels", "attention_mask", "position_ids", "seq_idx", "cu_seq_lens_q")
MEANINGLESS = ("cu_seq_lens_k", "max_length_q", "max_length_k", "num_items_in_batch")
"""What follows from the others, or is counted anew over all ranks."""
LAYOUTS = ("zigzag", "contiguous", "striped", "documents")


@dataclass(frozen=True)
class Share:
    """Where the tokens of a call live, and who shares a document; the model's forward takes it as `share`."""

    layout: Layout
    documents: Pattern | None

    def to(self, *_: Any, **__: Any) -> Share:
        """Itself, so that code which moves everything in a batch to a device may stay as it is."""
        return self


def shared(batch: Mapping[str, Any], kind: str, rank: int, size: int, device: torch.device) -> dict[str, Any]:
    """This rank's arguments for the model: ids and labels (b s), position ids (1 s), and the share.

    batch: whole sequences as collators make them, on the CPU or anywhere: input_ids (b S), labels, a two-dimensional attention_mask
    (right or left padding), position_ids that begin anew in each packed document, or seq_idx or cu_seq_lens_q, which say the same.
    labels are shifted here, as transformers does inside the model; shift_labels are taken as they are. A rank that owns no token
    has one of any kind, without a label.
    Raises ConfigError and Unsupported for anything else in it, since nobody would know how to share it out.
    """
    unknown = [name for name in batch if name not in KNOWN + MEANINGLESS and batch[name] is not None]
    if unknown or "input_ids" not in batch:
        raise Unsupported(
            f"The batch has {', '.join(map(repr, unknown)) or 'no input_ids'}; ringctx can share out {', '.join(KNOWN)}. "
            "Leave the others out in the collator."
        )
    ids = batch["input_ids"]
    if ids.dim() != 2 or not ids.shape[1]:
        raise ConfigError(f"input_ids must be (sequences, tokens) with a token at least; got {tuple(ids.shape)}.")
    numbers = _documents(batch, ids)
    layout = _layout(kind, ids.shape[1], size, numbers)
    own, labels = layout.indices(rank), _labels(batch, ids)
    mine = {"input_ids": ids[:, own], "position_ids": own[None]} | ({} if labels is None else {"labels": labels[:, own]})
    if not len(own):  # transformers takes no empty input
        mine = {"input_ids": ids[:, :1], "position_ids": torch.zeros(1, 1, dtype=torch.int64)}
        mine |= {} if labels is None else {"labels": torch.full_like(ids[:, :1], IGNORED)}
    found: dict[str, Any] = {name: x.to(device) for name, x in mine.items()}
    return found | {"share": Share(layout, None if numbers is None else _pattern(numbers))}


def _labels(batch: Mapping[str, Any], ids: Tensor) -> Tensor | None:
    """What follows each token, (b S); None where nobody asks for a loss."""
    given: Tensor | None = batch.get("shift_labels")
    labels: Tensor | None = batch.get("labels")
    if given is None and labels is None:
        return None
    if given is None:
        assert labels is not None
        given = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if given.shape != ids.shape:
        raise ConfigError(f"labels are {tuple(given.shape)}, but input_ids {tuple(ids.shape)}; give each token one.")
    return given


def _documents(batch: Mapping[str, Any], ids: Tensor) -> Tensor | None:
    """The number of each token's document (b S), padding being one of its own; None where all is one."""
    numbers = torch.zeros_like(ids)
    positions, borders, given = (batch.get(name) for name in ("position_ids", "cu_seq_lens_q", "seq_idx"))
    if positions is not None:
        begins = torch.nn.functional.pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0)).expand_as(ids)
        numbers = numbers + begins.cumsum(1)
    if borders is not None:
        flat = torch.bucketize(torch.arange(ids.numel(), device=ids.device), borders.to(ids.device), right=True)
        numbers = numbers * (int(flat.max()) + 1) + flat.view_as(ids)
    if given is not None:
        numbers = numbers * (int(given.max()) + 1) + given.expand_as(ids)
    mask = batch.get("attention_mask")
    if mask is not None:
        if mask.shape != ids.shape:
            raise Unsupported(f"attention_mask is {tuple(mask.shape)}; say it as Attention(pattern=...), or give padding as (b, S).")
        numbers = numbers.masked_fill(mask == 0, -1)
    return None if bool((numbers == numbers[:, :1]).all()) else numbers.cpu()


def _pattern(numbers: Tensor) -> Pattern:
    """Who shares a document; cheaper where all sequences are cut alike and every document lies in one piece."""
    first = numbers[0]
    if not bool((numbers == first).all()):
        return documents(ids=numbers)
    borders = _borders(first)
    return documents(ids=first) if len(borders) - 1 > len(first.unique()) else documents(cu_seqlens=borders)


def _borders(numbers: Tensor) -> Tensor:
    """Where documents begin, and the end."""
    changes = (numbers[1:] != numbers[:-1]).nonzero()[:, 0] + 1
    return torch.cat((torch.zeros(1, dtype=torch.int64), changes, torch.tensor([len(numbers)])))


def _layout(kind: str, length: int, size: int, numbers: Tensor | None) -> Layout:
    if kind not in LAYOUTS:
        raise ConfigError(f"layout is {kind!r}; a job has {', '.join(LAYOUTS)}.")
    if kind != "documents":
        layout: Layout = getattr(Layout, kind)(length, size)
        return layout
    # borders of all sequences: a layout is one for the whole batch
    edges = torch.tensor([0, length]) if numbers is None else torch.cat([_borders(row) for row in numbers]).unique()
    return Layout.documents(edges, size)
