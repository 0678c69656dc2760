"""Every method, by the name that the table has for it: how it is computed, and where its definition is.

Values of Attention are compared with the oracle, whose parts have definitions of their own in tests/unit; functions with `whole.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ringctx import Attention, Layout, Ring
from ringctx import patterns as p
from ringctx.methods import branches, extend
from ringctx.methods.apb import PassingBlocks
from ringctx.methods.clex import Clex
from ringctx.methods.encodings import Coca, LogN, Unturned
from ringctx.methods.forgetting_gate import forgetting_attention
from ringctx.methods.gau import GatedAttentionUnit
from ringctx.methods.gaussian import gaussian
from ringctx.methods.indexer import LightningIndexer, indexed_attention
from ringctx.methods.longformer import dilated_attention, longformer_attention
from ringctx.methods.nsa import NativeSparse
from ringctx.methods.rotary import Rotary
from ringctx.methods.scores import Alibi, DistanceBias, PairBias, Softcap, SquaredRelu
from ringctx.methods.selectors import AShape, FlexPrefill, Moba, Quest, Representatives, Sparge, VerticalSlash, XAttention
from ringctx.methods.synthesizer import Dense, FactorisedDense, FactorisedRandom, Mixture, Random, synthesise
from ringctx.testing import golden_inputs
from tests.methods import whole
from tests.methods.contract import METHODS, Method, S, Tensors, of_attention, of_function
from tests.selection import keeps

H, G, D = 4, 2, 8
ROTARY = Rotary((1.0, 0.3, 0.05, 0.004))
TRAINED = extend.Trained(D, 10_000.0, 16)
CAUSAL = p.causal()


def method(name: str) -> Callable[[Callable[[], Method]], Callable[[], Method]]:
    """Put the method in the list under this name."""

    def listed(make: Callable[[], Method]) -> Callable[[], Method]:
        assert name not in METHODS, name
        METHODS[name] = make
        return make

    return listed


def inputs(b: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """q (b S 4 8), k and v (b S 2 8)."""
    return golden_inputs(b, H, S, D, G)[:3]


def qkv(b: int = 1) -> Tensors:
    """The same by name."""
    return dict(zip("qkv", inputs(b), strict=True))


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


# -- values of Attention ------------------------------------------------------------------------------------------------------


def _values() -> dict[str, Callable[[], Attention]]:
    """Those that need nothing but an attention, whose parameters are drawn anew at each call."""
    encoded = lambda encoding: partial(Attention, encoding=encoding)
    seen = lambda pattern: partial(Attention, pattern=pattern)
    branched = lambda some: partial(Attention, branches=some)
    random = p.random_blocks(6, 2, seed=1)
    return {
        "causal": Attention,
        "sliding window, sinks": seen(CAUSAL & (p.window(9) | p.sinks(2))),
        "band": seen(CAUSAL & p.band(-12, -2)),
        "atrous": seen(CAUSAL & p.dilated(4)),
        "local and atrous": seen(CAUSAL & (p.window(5) | p.dilated(5))),
        "Sparse Transformer, strided": seen(p.strided(6)),
        "Sparse Transformer, fixed": seen(p.fixed(8, 2)),
        "Longformer, shared projections": seen(CAUSAL & (p.window(7) | p.global_tokens({0, 20}))),
        "block-sparse": seen(CAUSAL & p.blocks(torch.rand(6, 6, generator=torch.Generator().manual_seed(3)) < 0.6, 7)),
        "BigBird": seen(CAUSAL & (p.window(4) | p.global_tokens({0, 1}) | random)),
        "documents": seen(CAUSAL & p.documents(cu_seqlens=[0, 9, 10, 30, S])),
        "Star Attention": seen(p.star(8, 32)),
        "rotary by halves": encoded(ROTARY),
        "rotary by neighbours": encoded(Rotary(ROTARY.frequencies, interleaved=True)),
        "PI": encoded(extend.interpolated(TRAINED, 4.0)),
        "NTK-aware": encoded(extend.ntk(TRAINED, 4.0)),
        "dynamic NTK": encoded(extend.dynamic_ntk(TRAINED, 2.0, S)),
        "YaRN": encoded(extend.yarn(TRAINED, 4.0)),
        "LongRoPE": encoded(extend.longrope(TRAINED, 4.0, S, short=(1.0,) * 4, long=(1.0, 1.5, 2.5, 4.0))),
        "CoCA, slack": encoded(Coca(False, ROTARY)),
        "CoCA, strict": encoded(Coca(True, ROTARY)),
        "log n": encoded(LogN(16, ROTARY)),
        "entropy-invariant scale": encoded(LogN(16, ROTARY, least=0.0)),
        "HWFA's last layer": encoded(LogN(16, Unturned())),
        "ReRoPE": branched(branches.rerope(7, ROTARY)),
        "Leaky ReRoPE": branched(branches.leaky_rerope(7, 4, ROTARY)),
        "Self-Extend": branched(branches.self_extend(9, 4, ROTARY)),
        "LM-Infinite": branched(branches.lm_infinite(8, 3, 10, ROTARY)),
        "StreamingLLM, positions": branched(branches.streaming(8, 2, ROTARY)),
        "dual chunk": branched(branches.dual_chunk(8, 12, ROTARY)),
        "ALiBi": lambda: Attention(scores=(Alibi.standard(H),)),
        "bias by distance": lambda: Attention(scores=(DistanceBias(drawn(H, 31)),)),
        "bias by pair": lambda: Attention(scores=(PairBias(drawn(1, S, S)),)),
        "softcap": lambda: Attention(scores=(Softcap(1.5),)),
        "learned sinks": lambda: Attention(sink=drawn(H)),
        "squared relu": lambda: Attention(normaliser="sum", scores=(SquaredRelu(1 / S),)),
        "hard-coded Gaussian": lambda: replace(gaussian((-1, 0, -1, -2), 1.5, pattern=CAUSAL)),
    }


for _name, _attention in _values().items():
    METHODS[_name] = lambda attention=_attention: of_attention(attention(), inputs())


@method("CLEX")
def _clex() -> Method:
    torch.manual_seed(0)
    flow = Clex(TRAINED, longest=4, width=2).double()
    torch.nn.init.normal_(flow.down, std=0.05)
    q, k, v = inputs()

    def define(tokens: Tensors, params: Tensors) -> Tensor:
        t = -(-S // TRAINED.length)
        f = whole.clex_frequencies(params["up"], params["down"], flow, t)
        return whole.softmax_attention(whole.turned(tokens["q"], f), whole.turned(tokens["k"], f), tokens["v"], whole.causal(S))

    def compute(ring: Ring, layout: Layout | None, keys: Layout, tokens: Tensors) -> Tensor:
        found = of_attention(Attention(encoding=flow.encoding(S)), (q, k, v)).compute(ring, layout, keys, tokens)
        return found

    return of_function(dict(zip("qkv", (q, k, v), strict=True)), compute, define, params=dict(flow.named_parameters()))


# -- selectors ------------------------------------------------------------------------------------------------------------------

SELECTORS: dict[str, Any] = {
    "vertical-slash": VerticalSlash(6, 8, 8, 2, 4, 1),
    "A-shape": AShape(3, 9),
    "FlexPrefill": FlexPrefill(0.6, 0.1, 8, 8),
    "XAttention": XAttention(0.8, 4, 8),
    "SpargeAttn": Sparge(0.05, 0.4, 6, 10),
    "Quest": Quest(3, 8),
    "InfLLM's representatives": Representatives(2, 6, 2, 5, 3, 4),
    "MoBA": Moba(2, 8),
}


def _selecting(name: str) -> Method:
    selector = SELECTORS[name]
    q, k, v = inputs(1)
    seen = keeps(selector, q[0], k[0]) if selector.prefill else whole.causal(S)
    made = of_attention(
        Attention(select=selector),
        (4 * q, k, v),
        untrained="" if selector.trains else "it selects for inference alone, and training with it is refused",
        unread="what it selects depends on where a chunk ends; chunks and tokens are compared with the definition of each",
    )
    define = lambda tokens, _: whole.softmax_attention(
        tokens["q"], tokens["k"], tokens["v"], keeps(selector, *_first(tokens)) if selector.prefill else seen
    )
    return replace(made, reference=of_function(made.tokens, made.compute, define).reference)


def _first(tokens: Tensors) -> tuple[Tensor, Tensor]:
    return tokens["q"][0].detach(), tokens["k"][0].detach()


for _name in SELECTORS:
    METHODS[_name] = partial(_selecting, _name)


# -- functions ------------------------------------------------------------------------------------------------------------------


@method("NSA")
def _nsa() -> Method:
    method_ = NativeSparse(6, 3, 7)

    def compute(ring: Ring, layout: Layout | None, keys: Layout, tokens: Tensors) -> Tensor:
        q, k, v, gates = (tokens[x] for x in ("q", "k", "v", "gates"))
        return method_.attend(q, k, v, gates, ring=ring, layout=layout, key_layout=keys, encoding=ROTARY)

    tokens = qkv(2) | {"gates": drawn(2, S, H, 3).sigmoid()}
    return of_function(tokens, compute, lambda t, _: whole.nsa(t, 6, 3, 7, ROTARY), of_queries=("q", "gates"))


@method("DSA's lightning indexer")
def _dsa() -> Method:
    torch.manual_seed(0)
    index = LightningIndexer(12, 3, 4, Rotary((1.0, 0.2))).double().requires_grad_(False)
    x = drawn(2, S, 12)

    def compute(ring: Ring, layout: Layout | None, keys: Layout, tokens: Tensors) -> Tensor:
        every, at = index(x, torch.arange(S)), (layout.indices(ring.rank) if layout else torch.arange(keys.length - 1, keys.length))
        mine = replace(every, q=every.q[:, at], w=every.w[:, at], k=every.k[:, keys.indices(ring.rank)])
        q, k, v = tokens["q"], tokens["k"], tokens["v"]
        return indexed_attention(q, k, v, mine, top=7, ring=ring, layout=layout, key_layout=keys)

    return of_function(qkv(2), compute, lambda t, _: whole.indexed(t, index(x, torch.arange(S)), 7))


@method("APB")
def _apb() -> Method:
    how = PassingBlocks(block=8, anchor=3, passing=2, context=32)

    def compute(ring: Ring, layout: Layout | None, keys: Layout, tokens: Tensors) -> Tensor:
        q, k, v, scores = (tokens[x] for x in ("q", "k", "v", "scores"))
        return how.attend(q, k, v, scores, ring=ring, layout=layout, key_layout=keys, encoding=ROTARY)

    unread = "which keys of a block pass is known when the block has been read, so chunks are whole blocks"
    return of_function(qkv(2) | {"scores": drawn(2, S, G)}, compute, lambda t, _: whole.apb(t, how, ROTARY), unread=unread)


@method("Longformer, global projections")
def _longformer() -> Method:
    tokens = qkv(2) | {f"global {name}": x.flip(1) * 0.7 for name, x in qkv(2).items()}

    def compute(ring: Ring, layout: Layout | None, keys: Layout, mine: Tensors) -> Tensor:
        local, of_all = ([mine[prefix + x] for x in "qkv"] for prefix in ("", "global "))
        return longformer_attention(tuple(local), tuple(of_all), tokens={0, 13, 40}, window=5, ring=ring, layout=keys)

    unread = "global tokens see all tokens, so it is not causal and nothing is read in part"
    return of_function(tokens, compute, lambda t, _: whole.longformer(t, {0, 13, 40}, 5), unread=unread)


@method("LongNet")
def _longnet() -> Method:
    reaches = ((6, 1), (12, 2), (48, 4))

    def compute(ring: Ring, layout: Layout | None, keys: Layout, tokens: Tensors) -> Tensor:
        q, k, v = tokens["q"], tokens["k"], tokens["v"]
        return dilated_attention(q, k, v, reaches=reaches, ring=ring, layout=layout, key_layout=keys, encoding=ROTARY)

    return of_function(qkv(2), compute, lambda t, _: whole.longnet(t, reaches, ROTARY))


@method("forgetting gate")
def _forgetting_gate() -> Method:
    def compute(ring: Ring, layout: Layout | None, keys: Layout, tokens: Tensors) -> Tensor:
        q, k, v, gates = (tokens[x] for x in ("q", "k", "v", "gates"))
        return forgetting_attention(q, k, v, gates, ring=ring, layout=layout, key_layout=keys, encoding=ROTARY)

    gates = torch.nn.functional.logsigmoid(drawn(2, S, H) + 2)
    return of_function(qkv(2) | {"gates": gates}, compute, lambda t, _: whole.forgetting(t, ROTARY))


@method("GAU, squared relu")
def _gau() -> Method:
    return _unit(softmax=False)


@method("GAU, softmax")
def _gau_softmax() -> Method:
    return _unit(softmax=True)


def _unit(softmax: bool) -> Method:
    torch.manual_seed(0)
    unit = GatedAttentionUnit(12, 20, D, softmax=softmax, attention=Attention(encoding=ROTARY)).double()
    compute = lambda ring, layout, keys, tokens: unit(tokens["x"], ring=ring, layout=keys)
    unread = "its module keeps no keys; the attention in it is the row above, or the causal one"
    params = dict(unit.named_parameters())
    return of_function(
        {"x": drawn(2, S, 12)}, compute, lambda t, x: whole.gau(t["x"], x, 20, softmax, ROTARY), params=params, unread=unread
    )


# -- Synthesizer ------------------------------------------------------------------------------------------------------------------

UNREAD = "its modules keep no keys; tables are scores of Attention, and those are read so in the row of biases by pair"


def _synthesizer(kind: str) -> Method:
    torch.manual_seed(0)
    tables: dict[str, Any] = {
        "random": lambda: Random(H, S + 3),
        "factorised random": lambda: FactorisedRandom(H, S + 3, 4),
        "dense": lambda: Dense(12, H, S + 3, 6),
        "factorised dense": lambda: FactorisedDense(12, H, (6, 8)),
        "mixture": lambda: Mixture(Random(H, S + 3)),
    }
    module = tables[kind]().double()
    x, (q, k, v) = drawn(2, S, 12), golden_inputs(2, H, S, D)[:3]
    tokens = {"v": v} | ({"x": x} if "dense" in kind else {"q": q, "k": k} if kind == "mixture" else {})

    def compute(ring: Ring, layout: Layout | None, keys: Layout, mine: Tensors) -> Tensor:
        if "dense" in kind:
            return module(mine["x"], mine["v"], ring=ring, layout=keys)
        if kind == "mixture":
            return module(mine["q"], mine["k"], mine["v"], ring=ring, layout=keys)
        return synthesise(mine["v"], module, ring=ring, layout=keys)

    params = dict(module.named_parameters())
    return of_function(tokens, compute, partial(whole.synthesizer, kind), params=params, unread=UNREAD)


for _name in ("random", "factorised random", "dense", "factorised dense", "mixture"):
    METHODS[f"Synthesizer, {_name}"] = partial(_synthesizer, _name)
