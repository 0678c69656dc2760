"""Ranks that disagree: the same sentence on every rank, no hang, no abort, and the next call works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ringctx import Attention, Layout, RingctxError, Unsupported, decode_attention, ring_attention
from ringctx import patterns as p
from ringctx.methods.scores import Alibi, DistanceBias, PairBias, Softcap
from tests.pool import Pool

S = 24
Change = dict[str, Any]


class Untidy:
    """An elementwise score as a user may write it, without a __repr__."""

    def apply(self, logits: Tensor) -> Tensor:
        return logits.sin()

    def derivative(self, logits: Tensor) -> Tensor:
        return logits.cos()


def _call(ring: Any, change: Change, backward: bool = False) -> Tensor:
    """One call with this rank's change of what all ranks agree on."""
    size = ring.size
    given: Change = {"layout": Layout.zigzag(S, size), "batch": 2, "h": 4, "g": 2, "d": 16, "e": 16, "dtype": torch.float32, "tokens": None}
    given |= {"attention": Attention(), "transport": "rotate", "kernel": "auto", "seed": 0, "batch_offset": 0, "key_layout": None} | change
    torch.manual_seed(0)
    tokens = S // size if given["tokens"] is None else given["tokens"]

    def normal(heads: int, width: int) -> Tensor:
        return torch.randn(given["batch"], tokens, heads, width).to(given["dtype"]).requires_grad_(backward)

    q, k, v = normal(given["h"], given["d"]), normal(given["g"], given["d"]), normal(given["g"], given["e"])
    names = ("layout", "key_layout", "attention", "transport", "kernel", "seed", "batch_offset")
    out = ring_attention(q, k, v, ring=ring, **{name: given[name] for name in names})
    assert isinstance(out, Tensor)
    return out


def _disagree(ring: Any, culprit: int, changes: list[Change]) -> list[str]:
    """What this rank hears for each change of the culprit; each is followed by a call that must work."""
    heard = []
    for change in changes:
        try:
            _call(ring, _made(change, ring.size) if ring.rank == culprit else {})
            heard.append("no error")
        except RingctxError as error:
            heard.append(f"{type(error).__name__}: {error}")
        assert _call(ring, {}).isfinite().all()
    return heard


def _made(change: Change, size: int) -> Change:
    """Changes that depend on the number of ranks are functions of it."""
    return {name: value(size) if callable(value) and not isinstance(value, torch.dtype) else value for name, value in change.items()}


def _striped(size: int) -> Layout:
    return Layout.striped(S, size)


def _longer(size: int) -> Layout:
    return Layout.zigzag(S + size, size)


def _too_many(size: int) -> Layout:
    return Layout.zigzag(S, size + 1)


CHANGES: dict[str, tuple[Change, str]] = {
    "length": ({"tokens": 5}, "5 tokens"),
    "no tokens": ({"tokens": 0}, "0 tokens"),
    "layout": ({"layout": _striped}, "layout is"),
    "longer layout": ({"layout": _longer, "tokens": S // 4 + 1}, "layout is"),
    "layout of another size": ({"layout": _too_many}, "ranks"),
    "key layout": ({"key_layout": _striped}, "key layout is"),
    "dtype": ({"dtype": torch.float64}, "float64"),
    "half": ({"dtype": torch.bfloat16}, "bfloat16"),
    "integers": ({"dtype": torch.int64}, "int64"),
    "pattern": ({"attention": Attention(pattern=p.causal() & p.window(5))}, "window"),
    "window off by one": ({"attention": Attention(pattern=p.causal() & p.window(7))}, "window"),
    "scores": ({"attention": Attention(scores=(Softcap(30.0),))}, "softcap"),
    "scale": ({"attention": Attention(scale=0.5)}, "scale"),
    "sink": ({"attention": Attention(sink=torch.zeros(4))}, "sink"),
    "sink of another size": ({"attention": Attention(sink=torch.zeros(3))}, "sink"),
    "dropout": ({"attention": Attention(dropout=0.1)}, "dropout"),
    "batch": ({"batch": 3}, "batch is"),
    "query heads": ({"h": 8}, "heads is"),
    "key heads": ({"g": 4}, "key heads is"),
    "heads that do not divide": ({"h": 3}, "multiple"),
    "width": ({"d": 32}, "width is"),
    "value width": ({"e": 32}, "value width is"),
    "transport": ({"transport": "fetch"}, "transport is"),
    "no such transport": ({"transport": "teleport"}, "teleport"),
    "kernel": ({"kernel": "reference"}, "kernel is"),
    "no such kernel": ({"kernel": "rferenec"}, "rferenec"),
    "seed": ({"seed": 1}, "seed is"),
    "batch offset": ({"batch_offset": 2}, "batch offset is"),
    "refused": ({"kernel": "sdpa", "attention": Attention(scores=(Softcap(30.0),))}, "sdpa"),
    "alibi for other heads": ({"attention": Attention(scores=(Alibi.standard(3),))}, "lib"),
    "documents too short": ({"attention": Attention(pattern=p.documents(cu_seqlens=[0, 9]))}, "9"),
}


@pytest.mark.parametrize("culprit", [0, 3])
def test_one_sentence_on_every_rank(pool: Pool, culprit: int) -> None:
    heard = pool.run(_disagree, culprit, [change for change, _ in CHANGES.values()], size=4, timeout=60)
    for number, (name, (_, words)) in enumerate(CHANGES.items()):
        said = [rank[number] for rank in heard]
        assert len(set(said)) == 1, f"{name}: ranks were told differently: {said}"
        assert said[0].startswith("RanksDisagree: ") and words in said[0], f"{name}: {said[0]}"
        assert "\n" not in said[0] or name in ("refused", "no such kernel"), name


def _same_everywhere(ring: Any, change: Change) -> str:
    try:
        _call(ring, change)
    except RingctxError as error:
        _call(ring, {})
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"transport": "teleport"}, "ConfigError"),
        ({"kernel": "sdpa", "attention": Attention(scores=(Softcap(30.0),))}, "Unsupported"),
        ({"tokens": 5}, "LayoutError"),
        ({"h": 3}, "LayoutError"),
        ({"attention": Attention(pattern=p.documents(cu_seqlens=[0, 9]))}, "LayoutError"),
        ({"attention": Attention(pattern=p.documents(ids=torch.zeros(3, S, dtype=torch.int64)))}, ""),
    ],
    ids=["transport", "refusal", "length", "heads", "documents", "documents of another batch"],
)
def test_a_mistake_of_all_ranks_keeps_its_own_error(pool: Pool, change: Change, error: str) -> None:
    said = pool.run(_same_everywhere, change, size=4, timeout=60)
    assert all(s.startswith(error) and s != "no error" for s in said), said


def _order(ring: Any, kind: str) -> str:
    """Rank 1 calls in another order than the others."""
    odd = ring.rank == 1
    try:
        if kind == "patterns swapped":
            first, second = Attention(), Attention(pattern=p.full())
            for attention in (second, first) if odd else (first, second):
                _call(ring, {"attention": attention})
        elif kind == "forward against backward":
            out = _call(ring, {}, backward=True)
            _call(ring, {}) if odd else out.sum().backward()
        elif kind == "gradient of lse on one rank":
            q = torch.randn(2, S // ring.size, 4, 16, requires_grad=True)
            layout = Layout.zigzag(S, ring.size)
            out, lse = ring_attention(q, q, q, ring=ring, layout=layout, transport="rotate", return_lse=True)
            (out.sum() + lse.sum() if odd else out.sum()).backward()
        elif kind == "decode on one rank":
            if odd:
                layout, part = Layout.contiguous(S, ring.size), torch.randn(1, S // ring.size, 2, 16)
                decode_attention(torch.randn(1, 1, 4, 16), part, part, ring=ring, key_layout=layout)
            else:
                _call(ring, {})
        elif kind == "backward on one rank":
            out = _call(ring, {}, backward=odd)
    except RingctxError as error:
        said = f"{type(error).__name__}: {error}"
    else:
        said = "no error"
    _call(ring, {})
    return said


@pytest.mark.parametrize(
    "kind", ["patterns swapped", "forward against backward", "gradient of lse on one rank", "backward on one rank", "decode on one rank"]
)
def test_another_order_of_calls(pool: Pool, kind: str) -> None:
    said = pool.run(_order, kind, size=4, timeout=60)
    assert len(set(said)) == 1 and said[0].startswith("RanksDisagree: "), said


def _decode(ring: Any, change: Change) -> str:
    layout = Layout.contiguous(S, ring.size)
    q, k, v = torch.randn(1, 1, 4, 16), torch.randn(1, S // ring.size, 2, 16), torch.randn(1, S // ring.size, 2, 16)
    given: Change = {"attention": Attention(), "key_layout": layout}
    mine = given | (_made(change, ring.size) if ring.rank == 1 else {})
    n_q, heads, dtype = mine.pop("n_q", 1), mine.pop("heads", 4), mine.pop("dtype", torch.float32)
    try:
        decode_attention(torch.randn(1, n_q, heads, 16).to(dtype), k.to(dtype), v.to(dtype), ring=ring, **mine)
        said = "no error"
    except RingctxError as error:
        said = f"{type(error).__name__}: {error}"
    decode_attention(q, k, v, ring=ring, **given)
    _call(ring, {})
    return said


@pytest.mark.parametrize(
    "change",
    [
        {"attention": Attention(pattern=p.full())},
        {"key_layout": _striped},
        {"attention": Attention(scale=0.5)},
        {"n_q": 2},
        {"heads": 8},
        {"dtype": torch.float64},
    ],
    ids=["pattern", "key layout", "scale", "queries", "heads", "dtype"],
)
def test_decode_disagrees_in_one_sentence(pool: Pool, change: Change) -> None:
    said = pool.run(_decode, change, size=4, timeout=60)
    assert len(set(said)) == 1 and said[0].startswith("RanksDisagree: "), said


def _refused_in_backward(ring: Any) -> str:
    """A refusal must come before anything moves: the sdpa kernel takes a bias but not its gradient."""
    table = torch.zeros(4, 9, requires_grad=True)
    try:
        out = _call(ring, {"kernel": "sdpa", "attention": Attention(scores=(DistanceBias(table),))}, backward=True)
        out.sum().backward()
    except Unsupported as error:
        _call(ring, {})
        return str(error)
    return "no error"


def test_a_refusal_in_backward_leaves_the_ring_usable(pool: Pool) -> None:
    said = pool.run(_refused_in_backward, size=4, timeout=60)
    assert len(set(said)) == 1 and "gradient of a bias" in said[0]


def _broken_score(ring: Any, kind: str) -> str:
    """A mistake that shows only once tiles are computed: it is told at once and as what it is, also on a causal ring's idle ranks."""
    score = {"alibi": Alibi.standard(3), "pair": PairBias(torch.zeros(1, S - 1, S - 1)), "distance": DistanceBias(torch.zeros(3, 9))}[kind]
    return _same_everywhere(ring, {"attention": Attention(scores=(score,))})


@pytest.mark.parametrize("kind", ["alibi", "pair", "distance"])
def test_a_score_that_does_not_fit(pool: Pool, kind: str) -> None:
    said = pool.run(_broken_score, kind, size=4, timeout=60)
    assert all(s.startswith(("ConfigError", "LayoutError")) for s in said), said


def _untidy(ring: Any) -> bool:
    return bool(_call(ring, {"attention": Attention(scores=(Untidy(),))}).isfinite().all())


def test_a_score_without_a_repr_is_no_disagreement(pool: Pool) -> None:
    assert pool.run(_untidy, size=2, timeout=60) == [True, True]


def _lse_with(ring: Any, makers: Callable[[float], Attention], size_of_q: float, values: list[float]) -> list[float]:
    layout = Layout.contiguous(4, ring.size)
    q = torch.ones(1, 4 // ring.size, 2, 8, dtype=torch.float64) * size_of_q
    found = []
    for value in values:
        _, lse = ring_attention(q, q, q, ring=ring, layout=layout, attention=makers(value), return_lse=True)
        found.append(float(lse.sum()))
    return found


def _capped(x: float) -> Attention:
    return Attention(scores=(Softcap(x),))


def _sloped(x: float) -> Attention:
    return Attention(scores=(Alibi((x / 1000, x / 1000)),))


@pytest.mark.parametrize(("maker", "size_of_q"), [(_capped, 1e4), (_sloped, 1.0)], ids=["softcap", "alibi"])
def test_scores_that_print_alike_are_not_confused(pool: Pool, maker: Callable[[float], Attention], size_of_q: float) -> None:
    [(a, b)] = pool.run(_lse_with, maker, size_of_q, [1000.0, 1000.0004], size=1)
    assert a != b
