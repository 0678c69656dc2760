"""KVCache: every token is kept by one rank, in the order of the layout's indices, before rotation."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ringctx.core.attention import Attention
from ringctx.core.layout import Layout
from ringctx.core.ring import Ring
from ringctx.device import held_memory, keep_freed_memory, trim_freed_memory
from ringctx.errors import ConfigError, LayoutError
from ringctx.huggingface import Context
from ringctx.huggingface import context as context_module
from ringctx.methods.rotary import Rotary
from ringctx.patterns import causal, dilated, window
from ringctx.runtime.cache import KVCache
from ringctx.testing import dense

ROTARY = Attention(encoding=Rotary((1.0, 0.1)))


def keys_of(indices: Tensor) -> Tensor:
    """Keys (1 n 2 4) that tell which index they are of."""
    return indices.double()[None, :, None, None] + torch.arange(8, dtype=torch.float64).view(1, 1, 2, 4) / 10


def filled(layout: Layout, rank: int, num_new: int, *, page: int = 4, layers: int = 2, **kwargs) -> KVCache:
    cache = KVCache(layers, rank, layout.size, page=page, **kwargs)
    cache.extend(layout)
    for layer in range(layers):
        cache.append(layer, keys_of(layout.indices(rank)), -keys_of(layout.indices(rank)))
    for n in range(num_new):
        cache.grow()
        new = keys_of(torch.tensor([layout.length + n]))
        for layer in range(layers):
            cache.append(layer, new, -new)
    return cache


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("num_new", [0, 1, 4, 5, 30])
def test_every_token_is_kept_once_where_the_layout_says(size, num_new):
    layout = Layout.zigzag(11, size)
    caches = [filled(layout, rank, num_new) for rank in range(size)]
    assert all(cache.layout == caches[0].layout for cache in caches)
    whole = caches[0].layout
    assert whole.length == 11 + num_new
    assert sum(whole.count(rank) for rank in range(size)) == whole.length
    for rank, cache in enumerate(caches):
        for layer in range(2):
            k, v = cache.read(layer)
            assert_close(k, keys_of(whole.indices(rank)))
            assert_close(v, -k)


def test_new_tokens_go_to_the_ranks_in_turn_a_page_at_a_time():
    layout = filled(Layout.contiguous(3, 2), 0, 10, page=4).layout
    assert [layout.owner(i) for i in range(3, 13)] == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0]


def test_several_tokens_at_once_may_cross_a_page():
    caches = [filled(Layout.contiguous(4, 2), rank, 3) for rank in range(2)]
    new = keys_of(torch.arange(7, 10))
    for rank, cache in enumerate(caches):
        cache.grow(3)
        cache.append(0, new, new)
        assert_close(cache.read(0)[0], keys_of(cache.layout.indices(rank)))


def test_tokens_that_go_round_all_ranks_at_once_are_refused():
    with pytest.raises(LayoutError, match="grow by at most 4 at a time"):
        filled(Layout.contiguous(4, 2), 0, 0).grow(12)


def test_a_second_chunk_of_the_prompt_is_appended():
    first, second = Layout.contiguous(4, 2), Layout(((range(4, 6),), (range(6, 9),)))
    cache = filled(first, 1, 0)
    cache.extend(second)
    cache.append(0, keys_of(second.indices(1)), keys_of(second.indices(1)))
    assert cache.layout.indices(1).tolist() == [2, 3, 6, 7, 8]
    assert_close(cache.read(0)[0], keys_of(cache.layout.indices(1)))


def test_the_same_index_twice_is_refused():
    with pytest.raises(LayoutError, match="share an index"):
        filled(Layout.contiguous(4, 1), 0, 0).extend(Layout.contiguous(2, 1))


@pytest.mark.parametrize("num_new", [0, 1, 9])
def test_the_rotated_copy_is_the_keys_rotated(num_new):
    layout = Layout.zigzag(11, 2)
    for rank in range(2):
        cache = filled(layout, rank, 0)
        cache.encoded(0, ROTARY)
        for n in range(num_new):
            cache.grow()
            new = keys_of(torch.tensor([layout.length + n]))
            cache.append(0, new, new)
            cache.encoded(0, ROTARY)
        want = ROTARY.encoding.rotate(keys_of(cache.layout.indices(rank)), cache.layout.indices(rank))
        assert_close(cache.encoded(0, ROTARY), want)


def test_no_rotated_copy_where_nothing_rotates_or_none_is_wanted():
    assert filled(Layout.zigzag(4, 1), 0, 0).encoded(0, Attention()) is None
    assert filled(Layout.zigzag(4, 1), 0, 0, keep_rotated=False).encoded(0, ROTARY) is None


def test_memory_grows_by_pages_and_not_before_the_room_is_used():
    one_token = 2 * 4 * 8 * 2 * 2  # heads, dims, bytes, keys and values, layers
    assert filled(Layout.zigzag(5, 1), 0, 0, page=4).bytes == 8 * one_token
    assert filled(Layout.zigzag(5, 1), 0, 4, page=4).bytes == 12 * one_token
    assert filled(Layout.zigzag(5, 1), 0, 4, page=4, room=20).bytes == 20 * one_token


def test_a_rank_without_tokens_has_empty_keys():
    cache = filled(Layout(((range(3),), ())), 1, 2)
    assert cache.read(0)[0].shape == (1, 0, 2, 4)
    assert cache.encoded(0, ROTARY).shape == (1, 0, 2, 4)


def test_reading_before_the_prefill_is_a_sentence():
    with pytest.raises(LayoutError, match="run the prefill first"):
        KVCache(1, 0, 1).read(0)


def test_a_page_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="a page holds at least 1 token"):
        KVCache(1, 0, 1, page=0)


@pytest.mark.parametrize("pattern", [causal(), causal() & window(3), causal() & ~window(2), causal() & dilated(3)], ids=str)
def test_decoding_from_the_keys_that_are_seen_is_decoding_from_all(pattern):
    """Also where the newest token does not see itself."""
    context, attention = Context(Ring.alone()), Attention(pattern=pattern, encoding=Rotary((1.0, 0.1)))
    q, k, v = torch.randn(3, 1, 12, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for keep_rotated in (True, False):
        cache = KVCache(1, 0, 1, page=4, keep_rotated=keep_rotated)
        cache.extend(Layout.contiguous(11, 1))
        cache.append(0, k[:, :11], v[:, :11])
        cache.grow()
        with context.running(cache=cache, decoding=True):
            out = context.attend(0, q[:, 11:], k[:, 11:], v[:, 11:], attention)
        assert_close(out, dense(attention, q, k, v).out[:, 11:])


@pytest.mark.parametrize(("num_tokens", "times"), [(1024, 2), (1023, 0)])
def test_freed_memory_is_let_go_after_some_layers_of_many_tokens(monkeypatch, num_tokens, times):
    """And never while decoding, nor without a cache."""
    trimmed = []
    monkeypatch.setattr(context_module, "trim_freed_memory", lambda: trimmed.append(True))
    context, layout = Context(Ring.alone()), Layout.contiguous(num_tokens, 1)
    q, k, v = torch.zeros(3, 1, num_tokens, 1, 4)
    with context.running(layout):
        for _ in range(context_module.TRIM_EVERY):
            context.attend(0, q, k, v, Attention())
    for _ in range(2 * context_module.TRIM_EVERY):
        cache = KVCache(1, 0, 1)
        cache.extend(layout)
        with context.running(layout, cache):
            context.attend(0, q, k, v, Attention())
    cache.grow()
    with context.running(cache=cache, decoding=True):
        for _ in range(context_module.TRIM_EVERY):
            context.attend(0, q[:, :1], k[:, :1], v[:, :1], Attention())
    assert len(trimmed) == times


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another malloc than glibc's")
@pytest.mark.parametrize(("way", "megabytes"), [("keep", 8), ("return", 8), ("return", 64)])
def test_freed_memory_is_kept_or_returned_as_told(way, megabytes):
    """In a process of its own, since what is kept once is used again whatever malloc is told later. No more than 32 MiB a block is kept."""
    code = f"""
import torch
from ringctx import device
device.{way}_freed_memory()
some = [torch.ones({megabytes} << 18) for _ in range(3)]
held = device.held_memory(torch.device("cpu"))
del some
print(held - device.held_memory(torch.device("cpu")))
"""
    let_go = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert let_go < 1 << 20 if way == "keep" else let_go > (3 * megabytes << 20) * 0.9


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another malloc than glibc's")
def test_freed_memory_is_given_back_to_the_system():
    """Of blocks that were freed between others that live."""
    keep_freed_memory()
    some = [torch.ones(1 << 20) for _ in range(16)]
    living = some[1::2]
    before = held_memory(torch.device("cpu"))
    del some
    assert held_memory(torch.device("cpu")) > before - (8 << 20)
    trim_freed_memory()
    assert held_memory(torch.device("cpu")) < before - (16 << 20)
    assert all(bool((one == 1).all()) for one in living)
