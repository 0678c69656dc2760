"""Selective Attention is what its paper says, on every layout that takes it and any number of ranks, forward and backward."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from ringctx import Attention, Layout, Ring, Unsupported, ring_attention
from ringctx import patterns as p
from ringctx.core.decode import decode_attention
from ringctx.core.entry import carried_attention
from ringctx.core.pattern import Pattern
from ringctx.errors import ConfigError
from ringctx.kernels.carried import after, before
from ringctx.methods.rotary import Rotary
from ringctx.methods.scores import Alibi, PairBias, Softcap
from ringctx.methods.selective import Selective
from ringctx.testing import dense, errors, golden_inputs
from tests.virtual import run

NAMES = ("out", "lse", "memory", "dq", "dk", "dv")
CUTS = torch.tensor([0, 13, 14, 50, 97])
ROWS = torch.stack([torch.arange(97) // 20, torch.arange(97) // 33])


def whole_tensors(length: int, heads: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, dout, dlse, dmemory."""
    torch.manual_seed(length)
    h, g = heads
    shapes = [(2, length, h, 8), (2, length, g, 8), (2, length, g, 8), (2, length, h, 8), (2, length, h), (2, length)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def on_a_rank(ring: Ring, layout: Layout, attention: Attention, whole: list[Tensor], transport: str) -> tuple[list[Tensor], Counter[str]]:
    """out, lse, memory, dq, dk, dv, and the gradients of the attention's own tensors, of one rank's share."""
    mine = [layout.shard(x, ring.rank).clone().requires_grad_() for x in whole[:3]]
    found = carried_attention(*mine, ring=ring, layout=layout, attention=attention, transport=transport, seed=5)
    leaves = [x for x in attention.params() if x.requires_grad]
    slopes = [layout.shard(x, ring.rank) for x in whole[3:]]
    grads = torch.autograd.grad([found.out, found.lse, found.memory], [*mine, *leaves], slopes)
    return [found.out.detach(), found.lse.detach(), found.memory.detach(), *grads], ring.traffic.sent


def distance(
    size: int, layout: Layout, attention: Attention, heads: tuple[int, int] = (2, 1), dtype=torch.float64, transport="auto"
) -> float:
    """The largest error of everything that ranks compute, from the oracle."""
    whole = whole_tensors(layout.length, heads, dtype)
    q, k, v, dout, dlse, dmemory = whole
    seed = 5 if attention.dropout else None
    wanted = dense(attention, q, k, v, dout=dout, dlse=dlse, dmemory=dmemory, seed=seed)
    parts = [found for found, _ in run(on_a_rank, layout, attention, whole, transport, size=size)]
    got = {name: layout.unshard([part[n] for part in parts]) for n, name in enumerate(NAMES)}
    dparams = [sum(x) for x in zip(*(part[len(NAMES) :] for part in parts), strict=True)]
    return max(errors(wanted, dout=dout, dparams=dparams, **got).values())


# -- the definition -----------------------------------------------------------------------------------------------------


def test_the_oracle_gives_the_golden_numbers() -> None:
    q, k, v, dout = golden_inputs(1, 2, 6, 4)
    found = dense(Attention(carry=Selective()), q, k, v, dout=dout)
    near = lambda x, *numbers: torch.testing.assert_close(x, torch.tensor(numbers, dtype=torch.float64), atol=1e-6, rtol=0)
    assert found.taken is not None and found.memory is not None and found.dq is not None and found.dk is not None and found.dv is not None
    assert not found.taken[0, :3].any()
    near(found.taken[0, 3], 0, 1.721834, 0, 0, 0, 0)
    near(found.taken[0, 4], 0, 2.428930, 1.780812, 0, 0, 0)
    near(found.taken[0, 5], 0, 2.428930, 2.043371, 1.270661, 0, 0)
    near(found.lse[0, :, 0], 1.732740, 2.367101, 2.818615, 2.613359, 2.269656, 2.711771)
    near(found.lse[0, :, 1], 1.806391, 2.357712, 2.537769, 2.231982, 2.269554, 2.847728)
    near(found.out[0, 5, 0], -0.435569, -1.353796, -0.144461, 1.230797)
    near(found.out[0, 5, 1], -0.782958, -1.198296, 0.278458, 1.298875)
    near(found.memory[0], 0, 1, 2, 2, 2, 2)
    near(found.dq[0, 5, 0], -0.318068, -0.070009, 0.383573, 0.288333)
    near(found.dk[0, 0, 0], -0.535073, -0.346244, 0.199630, 0.395372)
    near(found.dv[0, 0, 1], 0.493947, -1.262894, -1.578986, -0.029427)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 40])
def test_running_sums_leave_the_row_itself_out(rows: int) -> None:
    x = torch.arange(2.0 * rows * 3, dtype=torch.float64).view(2, rows, 3)
    torch.testing.assert_close(before(x), x.cumsum(1) - x)
    torch.testing.assert_close(after(x), x.flip(1).cumsum(1).flip(1) - x)


def test_gradients_agree_with_finite_differences() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 9, n, 4, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2))

    def job(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = carried_attention(q, k, v, ring=Ring.alone(), layout=Layout.contiguous(9, 1), attention=Attention(carry=Selective()))
        return found.out, found.lse, found.memory

    assert torch.autograd.gradcheck(job, (q, k, v))


# -- over ranks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_ranks_compute_what_the_oracle_does(size: int, kind: str, dtype: torch.dtype) -> None:
    for length, heads in ((1, (1, 1)), (2, (2, 2)), (7, (3, 1)), (63, (8, 2)), (600, (2, 1))):
        layout = getattr(Layout, kind)(length, size)
        assert distance(size, layout, Attention(carry=Selective()), heads, dtype) < (1e-12 if dtype == torch.float64 else 5e-6)


@pytest.mark.parametrize("transport", ["rotate", "fetch", "gather"])
@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "documents", "balanced"])
@pytest.mark.parametrize(
    "pattern",
    [
        p.causal() & p.window(20),
        p.causal() & (p.window(9) | p.sinks(3)),
        p.causal() & p.dilated(3),
        p.causal() & p.documents(CUTS),
        p.causal() & p.documents(ROWS) & p.window(30),
    ],
    ids=str,
)
def test_masks_narrow_who_gives_and_who_takes(pattern: Pattern, kind: str, transport: str) -> None:
    layouts = {"contiguous": Layout.contiguous, "zigzag": Layout.zigzag}
    layout = Layout.documents(CUTS, 3) if kind == "documents" else Layout.balanced(97, 3, Attention()) if kind == "balanced" else None
    layout = layout or layouts[kind](97, 3)
    assert distance(3, layout, Attention(pattern=pattern, carry=Selective()), (4, 2), transport=transport) < 1e-12


def leaf(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize(
    "more",
    [
        {"scores": (Softcap(2.0),)},
        {"scores": (Alibi((0.5, 0.25, 0.125, 0.1)),)},
        {"scores": (Softcap(3.0), PairBias(leaf(4, 61, 61)))},
        {"dropout": 0.2},
        {"sink": leaf(4)},
        {"scale": 0.9},
        {"carry": Selective(tau=3.0)},
    ],
    ids=lambda more: "-".join(more),
)
def test_scores_come_first_and_what_was_given_is_taken_last(more: dict[str, Any], kind: str) -> None:
    attention = Attention(**{"carry": Selective(), **more})
    assert distance(3, getattr(Layout, kind)(61, 3), attention, (4, 2)) < 1e-12


def test_keys_turn_before_they_give() -> None:
    attention = Attention(encoding=Rotary((1.0, 0.3, 0.1, 0.03)), carry=Selective())
    assert distance(3, Layout.zigzag(61, 3), attention, (4, 2)) < 1e-12


# -- chunk by chunk, token by token -------------------------------------------------------------------------------------


def read_and_decode(
    ring: Ring, whole: list[Tensor], chunks: tuple[int, ...], attention: Attention
) -> tuple[list[tuple[Layout | None, Tensor]], Layout, Tensor]:
    """Prefill in chunks, then decode one or two tokens at a time: each call's layout and out, where keys live, and what they carry."""
    q, k, v = whole
    edges = [0, *chunks]
    owned: list[list[range]] = [[] for _ in range(ring.size)]
    carry = q.new_zeros(q.shape[0], 0)
    outs = []
    for begin, end in zip(edges, edges[1:], strict=False):
        share = -(-(end - begin) // ring.size)
        spans = [range(min(begin + r * share, end), min(begin + (r + 1) * share, end)) for r in range(ring.size)]
        for mine, span in zip(owned, spans, strict=True):
            mine.extend([span] if span else [])
        layout, keys = Layout(tuple((s,) if s else () for s in spans)), Layout(tuple(map(tuple, owned)))
        mine = [x[:, keys.indices(ring.rank)] for x in (k, v)]
        carry = torch.cat((carry, q.new_zeros(q.shape[0], keys.count(ring.rank) - carry.shape[1])), 1)
        with torch.no_grad():
            options = {"ring": ring, "layout": layout, "key_layout": keys, "attention": attention}
            found = carried_attention(q[:, layout.indices(ring.rank)], *mine, **options, carry=carry)
        assert found.carry is not None
        carry = found.carry
        outs.append((layout, found.out))
    at = edges[-1]
    while at < q.shape[1]:
        end = min(at + (1 if at % 2 else 2), q.shape[1])
        owner = at % ring.size
        owned[owner].append(range(at, end))
        keys = Layout(tuple(map(tuple, owned)))
        mine = [x[:, keys.indices(ring.rank)] for x in (k, v)]
        carry = torch.cat((carry, q.new_zeros(q.shape[0], keys.count(ring.rank) - carry.shape[1])), 1)
        out = decode_attention(q[:, at:end], *mine, key_layout=keys, ring=ring, attention=attention, carry=carry)
        outs.append((None, out))
        at = end
    return outs, keys, carry


@pytest.mark.parametrize("pattern", [p.causal(), p.causal() & (p.window(15) | p.sinks(2))], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_chunks_and_decoding_equal_one_dense_pass(size: int, pattern: Pattern) -> None:
    attention = Attention(pattern=pattern, carry=Selective())
    whole = whole_tensors(57, (4, 2), torch.float64)[:3]
    wanted = dense(attention, *whole)
    found = run(read_and_decode, whole, (20, 21, 48), attention, size=size)
    at = 0
    for n, (layout, _) in enumerate(found[0][0]):
        parts = [outs[n][1] for outs, _, _ in found]
        if layout is None:
            assert all(torch.equal(part, parts[0]) for part in parts)
        out = torch.cat(parts, 1) if layout else parts[0]
        torch.testing.assert_close(out, wanted.out[:, at : at + out.shape[1]], rtol=0, atol=1e-12)
        at += out.shape[1]
    assert at == 57 and wanted.taken is not None
    more = [torch.cat((x, x[:, :1]), 1) for x in whole]  # what the keys carry is what a further query would find
    after_all = dense(attention, *more).taken
    order = torch.cat([found[0][1].indices(r) for r in range(size)])
    carried = torch.cat([carry for _, _, carry in found], 1)[:, order.argsort()]
    assert after_all is not None
    torch.testing.assert_close(carried, after_all[:, 57, :57], rtol=0, atol=1e-12)


def test_decoding_without_the_carry_is_refused() -> None:
    x = torch.ones(1, 4, 2, 8)
    with pytest.raises(ConfigError, match="no carry"):
        decode_attention(x[:, :1], x, x, key_layout=Layout.contiguous(4, 1), ring=Ring.alone(), attention=Attention(carry=Selective()))


# -- what travels -------------------------------------------------------------------------------------------------------


def sent(layout: Layout, size: int, attention: Attention) -> Counter[str]:
    """Bytes of all ranks, forward alone, 8 key heads of width 64 in fp32."""

    def job(ring: Ring) -> Counter[str]:
        x = torch.ones(1, layout.count(ring.rank), 8, 64)
        with torch.no_grad():
            ring_attention(x, x, x, ring=ring, layout=layout, attention=attention, transport="rotate")
        return ring.traffic.sent

    return sum(run(job, size=size), Counter())


@pytest.mark.parametrize("size", [2, 4])
def test_one_pass_sends_a_number_per_key_and_two_passes_one_key_head(size: int) -> None:
    plain, selective = Attention(), Attention(carry=Selective())
    for kind, most in (("contiguous", 0.01), ("zigzag", 1 / (2 * 8) + 0.01)):
        layout = getattr(Layout, kind)(256, size)
        before, now = sent(layout, size, plain), sent(layout, size, selective)
        extra = now["keys"] + now["carries"] - before["keys"]
        assert 0 < extra <= most * before["keys"]
    assert sent(Layout.contiguous(256, size), size, selective)["keys"] == sent(Layout.contiguous(256, size), size, plain)["keys"]


# -- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layout": Layout.striped(64, 2)}, "striped"),
        ({"transport": "pass_q"}, "use rotate, fetch or gather"),
        ({"transport": "heads"}, "use rotate, fetch or gather"),
        ({"attention": Attention(pattern=p.full(), carry=Selective())}, "not causal by its wording"),
        (
            {"attention": Attention(pattern=p.per_head({p.causal(): [0], p.causal() & p.window(4): [1]}), carry=Selective())},
            "differs by head",
        ),
        (
            {"attention": Attention(pattern=p.causal() & (p.documents(torch.tensor([0, 5, 64])) | p.sinks(2)), carry=Selective())},
            "documents",
        ),
    ],
)
def test_what_cannot_be_carried_says_why(options: dict[str, Any], said: str) -> None:
    call = {"layout": Layout.zigzag(64, 2), "attention": Attention(carry=Selective()), **options}

    def job(ring: Ring) -> None:
        x = torch.ones(1, 32, 2, 8)
        ring_attention(x, x, x, ring=ring, **call)

    with pytest.raises(Unsupported, match=said):
        run(job, size=2)


def test_a_value_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="more than 0"):
        Selective(tau=0.0)
    with pytest.raises(ConfigError, match="carry must be a Carry"):
        Attention(carry=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="without a carry"):
        x = torch.ones(1, 4, 1, 8)
        carried_attention(x, x, x, ring=Ring.alone(), layout=Layout.contiguous(4, 1), attention=Attention())
