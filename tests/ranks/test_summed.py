"""Weights that nothing divides: Gaussian heads, squared relu, the gated attention unit; over ranks, backward, while decoding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from ringctx import Attention, Layout, Ring, decode_attention, ring_attention
from ringctx.errors import ConfigError, Unsupported
from ringctx.methods.encodings import LogN
from ringctx.methods.gau import GatedAttentionUnit
from ringctx.methods.gaussian import Bell, gaussian, gaussian_attention
from ringctx.methods.rotary import Rotary
from ringctx.methods.scores import PairBias, SquaredRelu
from ringctx.methods.selective import Selective
from ringctx.patterns import causal
from ringctx.testing import dense, error, golden_inputs
from tests.pool import Pool

S, H, E = 45, 3, 8
OFFSETS = (-1, 0, 1)
ROTARY = Rotary((1.0, 0.3, 0.05, 0.004))


def bells(offsets: tuple[int, ...] = OFFSETS, sigma: float = 1.0, cut: float = 9.0) -> Tensor:
    """Weights (h S S) by the definition."""
    ahead = torch.arange(S, dtype=torch.float64) - torch.arange(S, dtype=torch.float64)[:, None]
    pdf = lambda x: (-((x / sigma) ** 2) / 2).exp() / (sigma * (2 * math.pi) ** 0.5)
    of = lambda off: pdf(ahead - off) * ((ahead - off).abs() <= int(cut * sigma))
    return torch.stack([of(off) for off in offsets])


def test_the_golden_bell() -> None:
    weights = Bell((-1,)).bias(torch.tensor([0]), torch.tensor([5]), torch.arange(8), ()).exp()[0, 0]
    golden = [0.000134, 0.004432, 0.053991, 0.241971, 0.398942, 0.241971, 0.053991, 0.004432]
    assert weights.tolist() == pytest.approx([0.0 + x for x in golden], abs=1e-6)


def of_values(ring: Ring, kind: str, cut: float, sigma: float) -> tuple[Tensor, Tensor, dict[str, int]]:
    """This rank's out and dv, and what it sent."""
    v, dout = golden_inputs(2, H, S, E)[2:]
    layout = getattr(Layout, kind)(S, ring.size)
    mine = layout.shard(v, ring.rank).requires_grad_()
    ring.traffic.reset()
    out = gaussian_attention(mine, ring=ring, layout=layout, attention=gaussian(OFFSETS, sigma, cut), transport="auto")
    sent = dict(ring.traffic.sent)
    out.backward(layout.shard(dout, ring.rank))
    assert mine.grad is not None
    return out.detach(), mine.grad, sent


@pytest.mark.parametrize(("size", "kind"), [(1, "contiguous"), (2, "contiguous"), (3, "zigzag"), (4, "striped")])
def test_gaussian_heads_are_the_definition_and_values_of_a_halo_travel(pool: Pool, size: int, kind: str) -> None:
    cut, sigma = 4.0, 0.8
    v, dout = golden_inputs(2, H, S, E)[2:]
    weights, layout = bells(sigma=sigma, cut=cut), getattr(Layout, kind)(S, size)
    parts = pool.run(of_values, kind, cut, sigma, size=size) if size > 1 else [of_values(Ring.alone(), kind, cut, sigma)]
    for n, want in enumerate((torch.einsum("hij,bjhe->bihe", weights, v), torch.einsum("hij,bihe->bjhe", weights, dout))):
        assert error(layout.unshard([part[n] for part in parts]), want) < 1e-12
    if kind == "contiguous" and size == 2:  # of the other's values those within int(4 x 0.8) + 1 of the seam, and no key
        assert all(part[2]["keys"] == 2 * (3 + 1) * H * E * 8 for part in parts), [part[2] for part in parts]


def test_a_decoder_is_narrowed_and_heads_must_fit() -> None:
    v = golden_inputs(1, H, S, E)[2]
    found = gaussian_attention(v, ring=Ring.alone(), layout=Layout.contiguous(S, 1), attention=gaussian(OFFSETS, pattern=causal()))
    assert error(found, torch.einsum("hij,bjhe->bihe", bells().tril(), v)) < 1e-12
    with pytest.raises(ConfigError, match=r"3 heads, and the attention bells\(offsets 0, 1.*one offset a head"):
        gaussian_attention(v, ring=Ring.alone(), layout=Layout.contiguous(S, 1), attention=gaussian((0, 1)))
    with pytest.raises(ConfigError, match="sigma above 0"):
        gaussian((0,), sigma=0)


def test_heads_without_width_have_logits_from_scores_alone() -> None:
    table, v = torch.randn(2, S, S, dtype=torch.float64, requires_grad=True), golden_inputs(1, 2, S, E)[2]
    nothing = v.new_zeros(1, S, 2, 0)
    out, lse = ring_attention(
        nothing,
        nothing,
        v,
        ring=Ring.alone(),
        layout=Layout.contiguous(S, 1),
        attention=Attention(scores=(PairBias(table),)),
        return_lse=True,
    )
    seen = causal().allows(torch.arange(S), torch.arange(S))
    want = table.masked_fill(~seen, -torch.inf)
    assert error(out, torch.einsum("hij,bjhe->bihe", want.softmax(-1), v)) < 1e-12 and error(lse, want.logsumexp(-1).T[None]) < 1e-12
    (slope,) = torch.autograd.grad(out.square().sum(), table)
    (wanted,) = torch.autograd.grad(torch.einsum("hij,bjhe->bihe", want.softmax(-1), v).square().sum(), table)
    assert error(slope, wanted) < 1e-12


def unit(ring: Ring, softmax: bool, kind: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """This rank's out and dx, and its share of the parameters' gradients."""
    torch.manual_seed(0)
    attention = Attention(encoding=LogN(16, ROTARY) if softmax else ROTARY)
    module = GatedAttentionUnit(12, 20, E, softmax=softmax, attention=attention).double()
    layout = getattr(Layout, kind)(S, ring.size)
    x = layout.shard(torch.randn(2, S, 12, dtype=torch.float64), ring.rank).requires_grad_()
    out = module(x, ring=ring, layout=layout)
    out.square().sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad, [p.grad for p in module.parameters() if p.grad is not None]


def by_hand(softmax: bool) -> Tensor:
    torch.manual_seed(0)
    module = GatedAttentionUnit(12, 20, E).double()
    x = torch.randn(2, S, 12, dtype=torch.float64)
    u, v, z = silu(x @ module.inward.weight.T).split((20, 20, E), -1)
    at, (q, k) = torch.arange(S), ((z * module.gamma[n] + module.beta[n])[:, :, None] for n in (0, 1))
    q, k = ROTARY.queries(q, at)[:, :, 0], ROTARY.keys(k, at)[:, :, 0]
    logits = torch.einsum("bid,bjd->bij", q, k) / E**0.5
    if softmax:
        scale = ((at + 1.0).double().log() / torch.tensor(16.0).double().log()).clamp(min=1)
        weights = (logits * scale[:, None]).masked_fill(~torch.ones(S, S, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    else:
        weights = logits.relu().square().tril() / S
    return (u * (weights @ v)) @ module.outward.weight.T


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize(("size", "kind"), [(2, "zigzag"), (3, "contiguous")])
def test_the_gated_attention_unit_is_its_equations_on_any_ranks(pool: Pool, size: int, kind: str, softmax: bool) -> None:
    alone, layout = unit(Ring.alone(), softmax, "contiguous"), getattr(Layout, kind)(S, size)
    assert error(alone[0], by_hand(softmax)) < 1e-6  # rotary angles are float32
    parts = pool.run(unit, softmax, kind, size=size)
    for n in (0, 1):
        assert error(layout.unshard([part[n] for part in parts]), alone[n]) < 1e-12
    for n, whole in enumerate(alone[2]):
        assert error(torch.stack([part[2][n] for part in parts]).sum(0), whole) < 1e-11


def decoded(ring: Ring, attention: Attention) -> Tensor:
    q, k, v, _ = golden_inputs(1, H, S, E)
    layout = Layout.zigzag(S, ring.size)
    return decode_attention(
        q[:, -2:], layout.shard(k, ring.rank), layout.shard(v, ring.rank), key_layout=layout, ring=ring, attention=attention
    )


@pytest.mark.parametrize(
    "attention", [Attention(normaliser="sum", scores=(SquaredRelu(0.1),)), gaussian(OFFSETS, 2.0, 2.0, causal())], ids=str
)
def test_decoding_sums_too(pool: Pool, attention: Attention) -> None:
    q, k, v, _ = golden_inputs(1, H, S, E)
    want = dense(attention, q, k, v).out[:, -2:]
    for found in pool.run(decoded, attention, size=3):
        assert error(found, want) < 1e-12


@pytest.mark.parametrize("asked", [{"sink": torch.zeros(H)}, {"carry": Selective()}])
def test_what_softmax_alone_defines_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(Unsupported, match="divides weights by nothing"):
        Attention(normaliser="sum", **asked)
    with pytest.raises(ConfigError, match="there are 'softmax' and 'sum'"):
        Attention(normaliser="max")
