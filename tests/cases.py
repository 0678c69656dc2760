"""Cases: one exactness experiment as a value, what each rank does in it, and how far the answer is from the oracle.

A case names everything by strings and numbers, so that it prints, pickles, and is its own id. Lengths mean queries; `keys` says
where the keys live. Indices run over the whole sequence, of `Problem.length` tokens.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ringctx import Attention, Layout, Unsupported, ring_attention
from ringctx import patterns as p
from ringctx.core import loop, tiles
from ringctx.core.branch import Branch
from ringctx.core.call import forget_plans
from ringctx.core.layout import ranges_of
from ringctx.core.pattern import Pattern
from ringctx.methods import branches
from ringctx.methods.branches import Branches
from ringctx.methods.encodings import Coca, LogN
from ringctx.methods.rotary import Rotary
from ringctx.methods.scores import Alibi, DistanceBias, PairBias, Softcap, SquaredRelu
from ringctx.testing import Dense, dense, errors
from tests.pool import Fold

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp64": 1e-12, "fp32": 5e-6}
ROUTES: dict[str, tuple[str, Fold]] = {
    "rotate": ("rotate", Fold()),
    "fetch": ("fetch", Fold()),
    "gather": ("gather", Fold()),
    "heads": ("heads", Fold()),
    "pass_q": ("pass_q", Fold()),
    "auto": ("auto", Fold()),
    "double": ("rotate", Fold(nodes=2)),
    "usp": ("rotate", Fold(heads=2)),
    "usp_fetch": ("fetch", Fold(heads=2)),
    "usp_pass_q": ("pass_q", Fold(heads=2)),
    "usp_auto": ("auto", Fold(heads=2)),
    "usp_double": ("rotate", Fold(heads=2, nodes=2)),
}
LAYOUTS = ("contiguous", "zigzag", "striped", "residue", "documents", *(("balanced",) if hasattr(Layout, "balanced") else ()))
KEYS = ("same", "moved", "chunk", "gaps", "cross", "one_rank")
BRANCHES: dict[str, Callable[[Rotary], Branches]] = {
    "rerope": lambda rotary: branches.rerope(7, rotary),
    "leaky_rerope": lambda rotary: branches.leaky_rerope(5, 4, rotary),
    "self_extend": lambda rotary: branches.self_extend(9, 4, rotary),
    "lm_infinite": lambda rotary: branches.lm_infinite(6, 3, 10, rotary),
    "streaming": lambda rotary: branches.streaming(8, 2, rotary),
    "dual_chunk": lambda rotary: branches.dual_chunk(6, 10, rotary),
}
SCORES = (
    *("none", "softcap", "alibi", "distance", "pair", "sink", "dropout", "rotary", "scale", "all"),
    *("coca", "coca_strict", "log_n", "log_n_rerope", "summed", "squared_relu"),
    *BRANCHES,
    "branches_all",
)


@dataclass(frozen=True, order=True)
class Case:
    """One experiment; `route` names a transport and how the ring is folded. layout and pattern: names, or the things themselves."""

    size: int
    length: int
    layout: str | Layout
    pattern: str | Pattern
    route: str
    dtype: str = "fp64"
    heads: tuple[int, int] = (2, 2)
    widths: tuple[int, int] = (16, 16)
    batch: int = 1
    scores: str = "none"
    keys: str = "same"
    lse: bool = False

    def __str__(self) -> str:
        extras = [x for x in (self.scores, self.keys) if x not in ("none", "same")] + ["dlse"] * self.lse
        h, g = self.heads
        shape = f"b{self.batch}h{h}g{g}d{self.widths[0]}e{self.widths[1]}"
        layout = self.layout if isinstance(self.layout, str) else f"layout{zlib.crc32(repr(self.layout.spans).encode())}"
        return "-".join([layout, str(self.pattern), f"{self.size}ranks", self.route, self.dtype, f"S{self.length}", shape, *extras])

    @property
    def seed(self) -> int:
        """Equal on every machine and in every process."""
        return zlib.crc32(str(self).encode())

    @property
    def transport(self) -> str:
        return ROUTES[self.route][0]

    @property
    def fold(self) -> Fold:
        return ROUTES[self.route][1]

    @property
    def cost(self) -> float:
        """About how long it takes on two cores, in seconds."""
        return (
            0.15
            + 0.03 * self.size
            + self.batch * self.heads[0] * (self.length / 1000) ** 2 * (0.25 if self.scores in ("none", "sink") else 0.6)
        )


@dataclass(frozen=True)
class Problem:
    """A case with its tensors, all whole and on one process."""

    layout: Layout
    key_layout: Layout
    attention: Attention
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None
    i: Tensor
    j: Tensor

    @property
    def length(self) -> int:
        """One more than the largest index of any token."""
        return max(self.layout.length, self.key_layout.length)

    def part(self, x: Tensor, rank: int, layout: Layout, indices: Tensor) -> Tensor:
        """This rank's tokens of a whole tensor whose tokens have these ascending indices."""
        return x[:, torch.searchsorted(indices, layout.indices(rank))]

    def whole(self, parts: list[Tensor], layout: Layout) -> Tensor:
        """The whole tensor in ascending order of indices, from what the ranks hold."""
        order = torch.cat([layout.indices(rank) for rank in range(layout.size)])
        return torch.cat(parts, 1)[:, order.argsort()]


# -- patterns -----------------------------------------------------------------------------------------------------------


def _cuts(n: int) -> list[int]:
    """cu_seqlens of uneven documents, a few of them of one token."""
    draw = random.Random(n)
    return sorted({0, n, *(draw.randrange(1, n) for _ in range(min(5, n - 1)))}) if n > 1 else [0, n]


def _blocks(n: int, heads: int | None = None) -> Pattern:
    side = 24
    count = -(-n // side)
    shape = (count, count) if heads is None else (heads, count, count)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(n)) < 0.4
    mask[..., 0, :] = False  # the first rows see nothing
    return p.blocks(mask, side)


def _ids(n: int, batch: int) -> Tensor:
    """(b, S) document ids, other in every batch row, and coming back."""
    return torch.stack([(torch.arange(n) * (3 + b) // max(n, 1)) % (2 + b) for b in range(batch)])


def _per_head(h: int) -> Pattern:
    half = max(1, h // 2)
    near = p.causal() & p.window(9)
    return p.per_head({p.causal(): range(half), near: range(half, h)} if h > 1 else {near: range(1)})


PATTERNS: dict[str, Callable[[int, int, int], Pattern]] = {
    "full": lambda n, h, b: p.full(),
    "causal": lambda n, h, b: p.causal(),
    "window9": lambda n, h, b: p.window(9),
    "causal&window9": lambda n, h, b: p.causal() & p.window(9),
    "causal&window300": lambda n, h, b: p.causal() & p.window(300),
    "causal&(window40|sinks4)": lambda n, h, b: p.causal() & (p.window(40) | p.sinks(4)),
    "documents": lambda n, h, b: p.documents(cu_seqlens=_cuts(n)),
    "causal&documents": lambda n, h, b: p.causal() & p.documents(cu_seqlens=_cuts(n)),
    "causal&ids": lambda n, h, b: p.causal() & p.documents(ids=_ids(n, b)),
    "prefix11": lambda n, h, b: p.prefix(11),
    "dilated3": lambda n, h, b: p.dilated(3),
    "band": lambda n, h, b: p.band(-9, 4),
    "causal&dilated4": lambda n, h, b: p.causal() & p.dilated(4),
    "strided8": lambda n, h, b: p.strided(8),
    "fixed8,2": lambda n, h, b: p.fixed(8, 2),
    "longformer": lambda n, h, b: (p.causal() & p.window(9)) | p.global_tokens({0, n // 2, n - 1}),
    "blocks": lambda n, h, b: _blocks(n),
    "blocks_of_heads": lambda n, h, b: _blocks(n, h),
    "per_head": lambda n, h, b: _per_head(h),
    "future": lambda n, h, b: ~p.causal(),
    "causal&~sinks2": lambda n, h, b: p.causal() & ~p.sinks(2),
    "nothing": lambda n, h, b: ~p.full(),
}


# -- layouts ------------------------------------------------------------------------------------------------------------


def make_layout(name: str | Layout, length: int, size: int) -> Layout:
    """A stock layout of indices 0..length-1."""
    if isinstance(name, Layout):
        return name
    match name:
        case "residue":
            return Layout.residue(length, size, 4)
        case "documents":
            return Layout.documents(_cuts(length), size)
        case "balanced":
            return Layout.balanced(length, size, Attention(pattern=p.causal() & p.window(40)))
    return getattr(Layout, name)(length, size)


def _layouts(case: Case) -> tuple[Layout, Layout]:
    """Where queries live and where keys do."""
    layout = make_layout(case.layout, case.length, case.size)
    other = "striped" if case.layout in ("contiguous", "documents") else "contiguous"
    match case.keys:
        case "same":
            return layout, layout
        case "moved":
            return layout, make_layout(other, case.length, case.size)
        case "chunk":  # a later chunk of queries against everything before it and itself
            before = 2 * case.length // 3 + 5
            shifted = Layout(tuple(tuple(range(r.start + before, r.stop + before, r.step) for r in spans) for spans in layout.spans))
            return shifted, make_layout(case.layout, before + case.length, case.size)
        case "gaps":  # a third of the keys evicted
            kept = torch.rand(case.length, generator=torch.Generator().manual_seed(case.length)) > 0.33
            parts = [[r2 for r in spans for r2 in ranges_of(_kept(r, kept))] for spans in layout.spans]
            return layout, Layout(tuple(map(tuple, parts)))
        case "cross":
            return layout, make_layout(other, case.length // 2 + 3, case.size)
        case "one_rank":
            return layout, Layout((*((),) * (case.size - 1), (range(case.length),)))
    raise AssertionError(case.keys)


def _kept(r: range, kept: Tensor) -> Tensor:
    indices = torch.arange(r.start, r.stop, r.step)
    return indices[kept[indices]]


# -- scores and tensors -------------------------------------------------------------------------------------------------


def _attention(case: Case, n: int, normal: Callable[..., Tensor]) -> Attention:
    h = case.heads[0]
    pattern = PATTERNS[case.pattern](n, h, case.batch) if isinstance(case.pattern, str) else case.pattern
    rotary = Rotary(tuple(2.0**-x for x in range(2, 2 + case.widths[0] // 4)))  # powers of two: angles are exact in fp32 too
    match case.scores:
        case "softcap":
            return Attention(pattern=pattern, scores=(Softcap(1.5),))
        case "alibi":
            return Attention(pattern=pattern, scores=(Alibi.standard(h),))
        case "distance":
            return Attention(pattern=pattern, scores=(DistanceBias(normal(h, 31)),))
        case "pair":
            return Attention(pattern=pattern, scores=(PairBias(normal(1, n, n)),))
        case "sink":
            return Attention(pattern=pattern, sink=normal(h))
        case "dropout":
            return Attention(pattern=pattern, dropout=0.3)
        case "rotary":
            return Attention(pattern=pattern, encoding=rotary)
        case "coca" | "coca_strict":
            whole = Rotary(tuple(2.0**-x for x in range(2, 2 + case.widths[0] // 2)))
            return Attention(pattern=pattern, encoding=Coca(case.scores == "coca_strict", whole))
        case "log_n":
            return Attention(pattern=pattern, encoding=LogN(n // 2 + 2, rotary))
        case "log_n_rerope":
            by_branch = tuple(Branch(b.pattern, LogN(9, b.encoding, 0.0)) for b in BRANCHES["rerope"](rotary))
            return Attention(pattern=pattern, branches=by_branch)
        case "summed":
            return Attention(pattern=pattern, normaliser="sum", encoding=rotary)
        case "squared_relu":
            return Attention(pattern=pattern, normaliser="sum", scores=(SquaredRelu(0.1),))
        case "scale":
            return Attention(pattern=pattern, scale=0.45)
        case "all" | "branches_all":
            scores = (Softcap(3.0), Alibi.standard(h), DistanceBias(normal(1, 31)))
            turned: dict[str, Any] = {"encoding": rotary} if case.scores == "all" else {"branches": branches.self_extend(9, 4, rotary)}
            return Attention(pattern=pattern, scores=scores, sink=normal(h), dropout=0.2, scale=0.3, **turned)
        case name if name in BRANCHES:
            return Attention(pattern=pattern, branches=BRANCHES[name](rotary))
    assert case.scores == "none", case.scores
    return Attention(pattern=pattern)


def problem(case: Case, device: str = "cpu") -> Problem:
    """The same tensors in every process that asks; the indices stay on the CPU."""
    layout, key_layout = _layouts(case)
    n = max(layout.length, key_layout.length)
    generator = torch.Generator().manual_seed(case.seed)
    dtype = DTYPES[case.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(device, dtype)

    i, j = (torch.cat([x.indices(r) for r in range(x.size)]).sort().values for x in (layout, key_layout))
    (h, g), (d, e), b = case.heads, case.widths, case.batch
    q, k, v = normal(b, len(i), h, d), normal(b, len(j), g, d), normal(b, len(j), g, e)
    dout, dlse = normal(b, len(i), h, e), normal(b, len(i), h)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # the gradient of log sum relu(x)^2 is 2 x / sum x^2: without bound near 0, where x has few digits left in less than fp64
    has_lse = case.lse and not (case.scores == "squared_relu" and wide == torch.float32)
    return Problem(layout, key_layout, _attention(case, n, normal), q, k, v, dout, dlse.to(wide) if has_lse else None, i, j)


@contextmanager
def small_tiles(side: int = 8) -> Iterator[None]:
    """Masked tiles of so few tokens a side that few make many tiles; what was planned otherwise is forgotten before and after."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "LEAF", side)
        forget_plans()
        yield
    forget_plans()


@contextmanager
def small_steps(step_bytes: int = 1) -> Iterator[None]:
    """Backward leaves in steps of so many bytes, and of 8 tokens at least, so that short sequences have some too."""
    with small_tiles(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "STEP_BYTES", step_bytes)
        yield


# -- what a rank does ---------------------------------------------------------------------------------------------------


def on_rank(ring: Any, case: Case, device: str = "cpu") -> dict[str, Any]:
    """Forward and backward of this rank's share, answered on the CPU. A refusal is an answer too, if forward gives it."""
    given = problem(case, device)
    q = given.part(given.q, ring.rank, given.layout, given.i).requires_grad_()
    k, v = (given.part(x, ring.rank, given.key_layout, given.j).requires_grad_() for x in (given.k, given.v))
    params = [x.requires_grad_() for x in given.attention.params()]
    call = {"layout": given.layout, "key_layout": None if case.keys == "same" else given.key_layout, "attention": given.attention}
    try:
        out, lse = ring_attention(q, k, v, ring=ring, transport=case.transport, return_lse=True, seed=case.seed, **call)
    except Unsupported as refusal:
        return {"refused": str(refusal)}
    ends, slopes = [out], [given.part(given.dout, ring.rank, given.layout, given.i)]
    if given.dlse is not None:
        ends, slopes = [out, lse], [*slopes, given.part(given.dlse, ring.rank, given.layout, given.i)]
    dq, dk, dv, *dparams = torch.autograd.grad(ends, [q, k, v, *params], slopes)
    found = {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}
    return {**{name: x.cpu() for name, x in found.items()}, "dparams": [x.cpu() for x in dparams]}


def oracle(case: Case, given: Problem) -> Dense:
    """The truth, from the same numbers in float64."""
    return dense(given.attention, given.q, given.k, given.v, i=given.i, j=given.j, seed=case.seed, dout=given.dout, dlse=given.dlse)


def compare(given: Problem, reference: Dense, ranks: list[dict[str, Any]]) -> dict[str, float]:
    """The error of out, lse, dq, dk, dv and each parameter's gradient, from what the ranks returned."""
    whole = {name: given.whole([r[name] for r in ranks], given.layout) for name in ("out", "lse", "dq")}
    whole |= {name: given.whole([r[name] for r in ranks], given.key_layout) for name in ("dk", "dv")}
    dparams = [sum(r["dparams"][n].double() for r in ranks) for n in range(len(ranks[0]["dparams"]))]
    sinks = int(given.attention.sink is not None)
    return errors(reference, dout=given.dout, dparams=[*dparams[sinks:], *dparams[:sinks]], **whole)  # type: ignore[arg-type]
