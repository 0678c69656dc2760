"""Patterns: the stock of who may see whom, composed with & | ~.

    causal() & (window(8_192) | sinks(4))        causal() & documents(cu_seqlens)        causal() & ~sinks(1)

All speak of indices of the whole sequence: i is the query's, j the key's. They hold integers, never tensors, so that they
hash and compare by content.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ringctx.core.listed import Blocks, Documents
from ringctx.core.pattern import Causal, Full, Pattern, group_heads
from ringctx.core.rules import (
    Band,
    Chunks,
    Dilated,
    Fixed,
    From,
    GlobalTokens,
    PerHead,
    Prefix,
    RandomBlocks,
    Sinks,
    Window,
    at_least,
    some,
)
from ringctx.errors import ConfigError

Integers = Sequence[Any] | Tensor


def full() -> Pattern:
    """Every query sees every key."""
    return Full()


def causal() -> Pattern:
    """A query sees itself and what came before: j <= i."""
    return Causal()


def window(W: int) -> Pattern:
    """i - j < W: no key W or more behind; with `causal()` that leaves W keys, the token itself among them."""
    return Window(W)


def sinks(n: int) -> Pattern:
    """j < n: the first n tokens, seen by all."""
    return Sinks(n)


def prefix(n: int) -> Pattern:
    """j <= i or j < n: causal, but the first n tokens are seen by all (prefix-LM)."""
    return Prefix(n)


def band(low: int, high: int) -> Pattern:
    """low <= j - i <= high: keys from `low` to `high` ahead of the query, behind it where these are negative."""
    return Band(low, high)


def dilated(k: int) -> Pattern:
    """(i - j) mod k = 0: every k-th key, counted from the query both ways (atrous)."""
    return Dilated(k)


def strided(l: int) -> Pattern:
    """Sparse Transformer's strided: causal, the latest l keys and every l-th before them."""
    at_least(1, "strided", l, "it is the distance from one key seen to the next")
    # The key l behind is seen as an l-th one. Counting it to the window too changes nothing but makes `judge` exact.
    return Causal() & (Window(l + 1) | Dilated(l))


def fixed(l: int, c: int) -> Pattern:
    """Sparse Transformer's fixed: causal, the keys of one's own segment of l, and the last c keys of every segment."""
    return Fixed(l, c)


def own_block(size: int) -> Pattern:
    """i // size <= j // size: no key of an earlier block; with `causal()` a query sees the keys of its own block."""
    return Chunks(size, 1)


def queries_from(first: int) -> Pattern:
    """i >= first: what these queries see is everything."""
    return From(first)


def star(block: int, context: int) -> Pattern:
    """Star Attention: causal; a token of the context sees the first block and its own, and tokens from index `context` on see all.

    The first block is every block's anchor; the question and the answer come after the context (Acharya et al. 2024, arXiv 2411.17116).
    """
    return Causal() & (Sinks(block) | Chunks(block, 1) | From(context))


def random_blocks(size: int, count: int, seed: int = 0) -> Pattern:
    """`count` blocks of keys at or before each block of queries, drawn without replacement; all of them where there are fewer.

    BigBird is causal() & (window(w) | global_tokens(...) | random_blocks(...)) (Zaheer et al. 2020, arXiv 2007.14062).
    """
    return RandomBlocks(size, count, seed)


def global_tokens(tokens: Iterable[int] | int) -> Pattern:
    """i or j among the tokens: they see all and all see them (Longformer)."""
    listed = [tokens] if isinstance(tokens, int) else list(tokens)
    return GlobalTokens(tuple(sorted(set(_integers("global_tokens", listed).tolist()))))


def documents(of: Integers | None = None, /, *, cu_seqlens: Integers | None = None, ids: Integers | None = None) -> Pattern:
    """A query sees the keys of its own document.

    cu_seqlens: each document's first index and, last, the length: 0 5 9 is two documents, of 5 and 4 tokens.
    ids (S) or (b, S): each token's document; equal ids are one document wherever they are.
    Without a keyword, what rises strictly from 0 is cu_seqlens and what has two dims is ids; anything else is refused.
    Raises ConfigError. Indices past the end are refused with LayoutError when they are asked for.
    """
    if sum(given is not None for given in (of, cu_seqlens, ids)) != 1:
        raise ConfigError("documents takes one description of the documents; write documents(cu_seqlens=...) or documents(ids=...).")
    if ids is not None:
        return Documents.from_ids(_integers("ids", ids))
    if cu_seqlens is not None:
        return Documents.from_borders(_integers("cu_seqlens", cu_seqlens))
    given = _integers("documents", of)
    if given.dim() == 2:
        return Documents.from_ids(given)
    if given.dim() == 1 and len(given) > 1 and given[0] == 0 and bool((given.diff() > 0).all()):
        return Documents.from_borders(given)
    raise ConfigError(
        f"documents cannot tell whether {some(given.flatten().tolist())} is cu_seqlens (which rises strictly from 0) or an id for "
        "each token; write documents(cu_seqlens=...) or documents(ids=...)."
    )


def blocks(mask: Integers, size: int | tuple[int, int]) -> Pattern:
    """An explicit mask of tiles: bool (nq, nk), or (h, nq, nk) if heads differ; size is a tile's, or (queries, keys).

    Raises ConfigError. Indices past the mask's edge are refused with LayoutError when they are asked for.
    """
    return Blocks.of(_tensor("blocks", mask), size)


def per_head(patterns: Mapping[Pattern, Iterable[int] | int]) -> Pattern:
    """A pattern for each head, {pattern: heads}; every head is named once. Raises ConfigError."""
    return PerHead(group_heads(([heads] if isinstance(heads, int) else heads, pattern) for pattern, heads in patterns.items()))


def _integers(name: str, values: Integers | None) -> Tensor:
    """Whole numbers as int64 on the CPU; not empty."""
    found = _tensor(name, values)
    if not found.numel() or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        given = f"{found.numel()} of {found.dtype}"
        raise ConfigError(f"{name} takes whole numbers, at least one, and was given {given}; give a list or tensor of integers.")
    return found.to("cpu", torch.int64)


def _tensor(name: str, values: Integers | None) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{name} takes a list or a tensor, and {values!r} is neither ({error}); give rows of equal length.") from error
