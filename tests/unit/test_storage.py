"""Storage: what is read is what was written, to the bit or to half a step, however it was written, dropped and held."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ringctx.config import CacheConfig
from ringctx.core.attention import Attention
from ringctx.core.layout import Layout
from ringctx.errors import ConfigError, LayoutError, Unsupported
from ringctx.methods.rotary import Rotary
from ringctx.runtime import storage
from ringctx.runtime.budget import GIB, Shape, choose, num_bytes
from ringctx.runtime.cache import KVCache
from ringctx.runtime.storage import KINDS, Store, open_store

PAGE = 4
STORES = st.tuples(st.sampled_from(KINDS), st.booleans(), st.booleans())


@pytest.fixture(autouse=True, scope="module")
def small_steps():
    """Blocks and segments of a few tokens, so that short sequences cross several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "BLOCK", 6)
        patch.setattr(storage, "SEGMENT", 7)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("spill")


def tokens(n: int, *, d: int = 5, b: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """(b n 3 d), with a channel that lies far out, as keys have."""
    x = torch.randn(b, n, 3, d, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    x[..., 1] = 3 * x[..., 1] + 40
    return x.to(dtype)


def filled(x: Tensor, kind: str, per_channel: bool, folder: Path | None = None, *, page: int = PAGE, room: int = 0) -> Store:
    store = open_store(kind, page=page, per_channel=per_channel, spill=folder)
    store.write(x, room)
    return store


@given(STORES, st.lists(st.integers(0, 30), max_size=5), st.integers(0, 30), st.integers(0, 30), st.lists(st.integers(0, 29), max_size=9))
@settings(max_examples=40, deadline=None)
def test_any_split_of_writes_gives_the_same_tokens_and_all_reads_agree(folder, which, cuts, begin, end, places):
    kind, per_channel, spilled = which
    x, begin, end = tokens(30), min(begin, end), max(begin, end)
    want = filled(x, kind, per_channel).data
    store = open_store(kind, page=PAGE, per_channel=per_channel, spill=folder if spilled else None)
    for part in x.tensor_split(sorted(cuts), dim=1):
        store.write(part, 0)
    assert torch.equal(store.data, want)
    assert torch.equal(store.read(begin, end), want[:, begin:end])
    assert torch.equal(store.select(torch.tensor(places, dtype=torch.int64)), want[:, places])
    assert (store.count, store.data.dtype) == (30, x.dtype)


@given(STORES, st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.booleans()), max_size=9))
@settings(max_examples=60, deadline=None)
def test_after_dropping_tokens_it_is_as_if_they_had_never_been_written(folder, which, steps):
    """Write some tokens, perhaps set a mark, perhaps go back to the newest one; a mark may be gone back to again."""
    kind, per_channel, spilled = which
    x = tokens(90, b=1, d=4)
    store, kept, at = open_store(kind, page=PAGE, per_channel=per_channel, spill=folder if spilled else None), x[:, :0], 0
    marks = [(store.mark(), kept)]
    for num_new, sets_mark, goes_back in steps:
        new, at = x[:, at : at + num_new], at + num_new
        store.write(new, 0)
        kept = torch.cat((kept, new), dim=1)
        if sets_mark:
            marks.append((store.mark(), kept))
        if goes_back:
            mark, kept = marks.pop() if len(marks) > 1 and not sets_mark else marks[-1]
            store.restore(mark)
        assert torch.equal(store.data, filled(kept, kind, per_channel).data)
        assert store.select(torch.arange(0)).shape[1] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_mark_whose_tokens_are_gone_is_refused(kind):
    store = filled(tokens(5), kind, True)
    early = store.mark()
    store.write(tokens(5), 0)
    late = store.mark()
    store.restore(early)
    with pytest.raises(LayoutError, match="The mark is of 10 tokens, but the cache holds 5; restore the newest marks first"):
        store.restore(late)


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_model_is_exact_and_bf16_is_rounded_once(folder, spilled, dtype):
    x = tokens(11, dtype=dtype)
    spill = folder if spilled else None
    assert torch.equal(filled(x, "model", True, spill).data, x)
    assert torch.equal(filled(x, "bf16", True, spill).data, x.bfloat16().to(dtype))


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("per_channel", [True, False], ids=["keys", "values"])
@pytest.mark.parametrize("kind", storage.BITS)
@given(st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=40, max_size=40))
@settings(max_examples=15, deadline=None)
def test_no_number_is_further_off_than_half_a_step_of_its_group(folder, kind, per_channel, spilled, numbers):
    """The step is the group's range over the codes but one. fp32 adds its roundings: seven of the range's size and one of the number's."""
    for x in (torch.tensor(numbers).view(1, 8, 1, 5), tokens(8)):
        got = filled(x, kind, per_channel, folder if spilled else None).data.double()
        groups = x.double().unflatten(1, (2, 4))
        span = groups.amax((2 if per_channel else -1), True) - groups.amin((2 if per_channel else -1), True)
        step, unit = span / (2 ** storage.BITS[kind] - 1), 2**-24
        bound = step / 2 + unit * (7 * span + groups.abs().amax()) + torch.finfo(torch.float32).tiny
        assert ((got.unflatten(1, (2, 4)) - groups).abs() <= bound).all()


def test_the_open_page_of_keys_is_exact():
    x = tokens(11)
    store = filled(x, "int4", True)
    assert torch.equal(store.read(8, 11), x[:, 8:])
    assert not torch.equal(store.read(4, 8), x[:, 4:8])


def test_four_bits_are_packed_two_to_a_byte_the_even_channel_low():
    values = filled(torch.tensor([0.0, 15, 7, 8]).view(1, 1, 1, 4), "int4", False)
    assert values._codes.data.flatten().tolist() == [0 | 15 << 4, 7 | 8 << 4]
    assert values._scales.data.flatten().tolist() == [0.0, 1.0]
    keys = filled(torch.tensor([[-3.0, 5], [27, 5], [-1, 5], [1, 5]]).view(1, 4, 1, 2), "int4", True)
    assert keys._codes.data.flatten().tolist() == [0, 15, 1, 2]
    assert keys._scales.data.flatten().tolist() == [-3.0, 2.0, 5.0, 0.0]
    assert keys.data.flatten().tolist() == [-3, 5, 27, 5, -1, 5, 1, 5]


@pytest.mark.parametrize("d", [1, 3])
def test_an_odd_width_is_padded_and_the_padding_is_not_read(d):
    x = torch.tensor([0.0, 15, 7])[:d].view(1, 1, 1, d)
    store = filled(x, "int4", False)
    assert store._codes.data.flatten().tolist() == [0 | 15 << 4, 7][: (d + 1) // 2] if d > 1 else [0]
    assert torch.equal(store.data, x)


def test_a_number_among_equals_is_itself():
    x = torch.full((1, 8, 3, 5), 0.1)
    assert torch.equal(filled(x, "int8", True).data, x)


@pytest.mark.parametrize(
    ("kind", "per_channel", "memory", "file", "originals"),
    [
        ("model", True, 12 * 15 * 4, 16 * 15 * 4, 0),
        ("bf16", False, 12 * 15 * 2, 16 * 15 * 2, 0),
        ("int8", True, 2 * (4 * 15 + 15 * 8), 2 * (4 * 15 + 15 * 8), 2 * 15 * 4),
        ("int8", False, 12 * (15 + 3 * 8), 16 * (15 + 3 * 8), 0),
        ("int4", True, 2 * (4 * 9 + 15 * 8), 2 * (4 * 9 + 15 * 8), 2 * 15 * 4),
        ("int4", False, 12 * (9 + 3 * 8), 16 * (9 + 3 * 8), 0),
    ],
)
def test_bytes_are_counted(folder, kind, per_channel, memory, file, originals):
    """10 tokens of 3 heads of 5 channels, fp32, pages of 4, segments of 8: originals are of the open page of keys."""
    store = filled(tokens(10, b=1), kind, per_channel)
    assert (store.bytes, store.mapped_bytes) == (memory + originals, 0)
    spilled = filled(tokens(10, b=1), kind, per_channel, folder)
    assert (spilled.bytes, spilled.mapped_bytes) == (originals, file)
    for each in (store, spilled):
        each.close()
        assert (each.bytes, each.mapped_bytes) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_is_what_a_cache_takes_at_most(kind, dtype):
    shape, layout = Shape(2, 3, 5, dtype), Layout.contiguous(23, 1)
    cache = KVCache(2, 0, 1, page=PAGE, room=23, storage=kind)
    cache.extend(layout)
    for layer in range(2):
        cache.append(layer, tokens(23, b=1, dtype=dtype), tokens(23, b=1, dtype=dtype))
        cache.encoded(layer, Attention(encoding=Rotary((1.0, 0.1))))
    assert cache.bytes == num_bytes(kind, 23, shape, PAGE, keep_rotated=True)


def test_files_are_without_a_name_and_gone_with_their_store(tmp_path):
    def num_open() -> int:
        files = Path("/proc/self/fd")
        return sum(str(tmp_path) in os.readlink(file) for file in files.iterdir() if file.is_symlink())

    if not Path("/proc/self/fd").exists():
        pytest.skip("this system does not list open files")
    stores = [filled(tokens(30), "int8", True, tmp_path) for _ in range(2)]
    assert num_open() >= 4 and not list(tmp_path.iterdir())
    stores.pop().close()
    stores.clear()
    assert num_open() == 0


def test_a_view_outlives_the_growth_of_its_file(folder):
    x = tokens(30)
    store = filled(x[:, :9], "model", True, folder)
    view = store.data
    store.write(x[:, 9:], 0)
    store.close()
    assert torch.equal(view, x[:, :9])


def test_a_full_disk_is_a_sentence(folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(ConfigError, match="a file there cannot grow to 960 bytes: No space left on device. Name a folder on a disk with"):
        filled(tokens(5, b=1), "model", True, folder, page=16)


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match="but no file can be made there: No such file or directory"):
        KVCache(1, 0, 1, spill=tmp_path / "none")


def test_an_unknown_kind_is_a_sentence():
    with pytest.raises(ConfigError, match=r"cache.storage is 'int2'; possible are model, bf16, int8, int4\."):
        KVCache(1, 0, 1, storage="int2")


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_are_not_there_are_refused(kind):
    store = filled(tokens(10), kind, True)
    for begin, end in ((0, 11), (-1, 3), (4, 3)):
        with pytest.raises(LayoutError, match="the cache holds 10; ask for 0 <= begin <= end <= that"):
            store.read(begin, end)
    for places in ([10], [-1, 2]):
        with pytest.raises(LayoutError, match="the cache holds 10 tokens; count from 0"):
            store.select(torch.tensor(places))
    with pytest.raises(LayoutError, match="pass int64 of one dim"):
        store.select(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(LayoutError, match="use another cache for them"):
        store.write(tokens(1).double(), 0)
    with pytest.raises(LayoutError, match="run the prefill first"):
        open_store(kind, page=PAGE, per_channel=True).read(0, 0)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e300])
def test_what_no_step_can_hold_is_refused(number):
    x = tokens(4).double()
    x[0, 1, 2, 3] = number
    for per_channel in (True, False):
        with pytest.raises(Unsupported, match=r"not finite in fp32 cannot be held in int8; use cache.storage: model\."):
            filled(x, "int8", per_channel)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_rotated_keys_is_kept_beside_whole_keys_only(kind):
    cache = KVCache(1, 0, 1, page=PAGE, storage=kind)
    cache.extend(Layout.contiguous(9, 1))
    cache.append(0, tokens(9, d=4), tokens(9, d=4))
    assert (cache.encoded(0, Attention(encoding=Rotary((1.0, 0.1)))) is not None) == (kind == "model")
    assert [x.shape for x in cache.read(0)] == [(2, 9, 3, 4)] * 2


MILLION = Shape(30, 3, 64, torch.float32)  # SmolLM2-135M


@pytest.mark.parametrize(
    ("gib", "spill", "want"),
    [(70, None, "model"), (50, "here", "bf16"), (20, None, "int8"), (10, None, "int4"), (5, "here", "int8")],
)
def test_auto_takes_the_first_that_fits_and_says_why(caplog, gib, spill, want):
    config = CacheConfig(storage="auto", memory_gib=gib, spill=spill)
    with caplog.at_level("INFO", logger="ringctx"):
        kind, where = choose(config, 1_000_000, MILLION)
    assert (kind, where) == (want, Path("here") if gib == 5 else None)
    assert f"Keys and values are held {'as int8 in files in here' if gib == 5 else f'in memory as {want}'}, " in caplog.text
    assert f"in GiB: model 64.4, bf16 21.5, int8 12.1, int4 6.71; cache.memory_gib is {gib}." in caplog.text


def test_auto_that_fits_nowhere_is_a_sentence():
    with pytest.raises(ConfigError, match="No storage fits: 1000000 tokens .* Raise it, use more ranks, or name a folder in cache.spill"):
        choose(CacheConfig(storage="auto", memory_gib=5), 1_000_000, MILLION)


def test_what_is_named_is_taken():
    assert choose(CacheConfig(storage="int4", spill="here"), 10 * GIB, MILLION) == ("int4", Path("here"))
