"""CoCA, log n and no encoding: the equations, what cannot be, and what a wrapped model makes of them."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers")

from ringctx import Attention, Layout, Ring, ring_attention
from ringctx.asked.attention import attention_of
from ringctx.asked.layers import layers_of
from ringctx.config import parse
from ringctx.errors import ConfigError
from ringctx.huggingface import trained_of, wrap
from ringctx.huggingface.families import attention_modules
from ringctx.methods import extend
from ringctx.methods.branches import rerope, rotated_by
from ringctx.methods.encodings import Coca, LogN, Unturned
from ringctx.methods.rotary import Rotary
from ringctx.testing import golden_inputs
from ringctx.training.model import job_of
from ringctx.training.model import llama as llama_of
from tests.tiny import tiny
from tests.training import config

ROTARY = Rotary((1.0, 0.3, 0.05, 0.004))
S, H, D = 24, 3, 8
Q, K, V, _ = golden_inputs(2, H, S, D)
AT = torch.arange(S)


def logits(encoding, positions=AT):
    q, k = encoding.queries(Q, positions), encoding.keys(K, positions)
    return torch.einsum("bmhd,bnhd->bhmn", q, k)


def halves(x):
    return x[..., : D // 2], x[..., D // 2 :]


def of_the_paper(strict: bool) -> torch.Tensor:
    """Its equations 9 and 12, by products over the whole of (m, n, pair), in halves as its code has them."""
    theta = torch.tensor(ROTARY.frequencies, dtype=torch.float32).double()
    t = sum(halves(K)).div(2).relu()  # (b n h pairs)
    a, b = halves(Q)
    m, n = (AT[:, None] * theta for _ in range(2))
    if strict:
        angle = (m[:, None] - n[None]).cos()  # (m n pairs)
        return torch.einsum("bnhp,bmhp,mnp->bhmn", t, a.square() + b.square(), angle)
    turned = (a * m.cos()[:, None] - b * m.sin()[:, None], b * m.cos()[:, None] + a * m.sin()[:, None])
    keys = (t * n.cos()[:, None] - t * n.sin()[:, None], t * n.cos()[:, None] + t * n.sin()[:, None])
    return sum(torch.einsum("bmhp,bnhp,bmhp->bhmn", x, y, z) for x, y, z in zip((a, b), keys, turned, strict=True))


@pytest.mark.parametrize("strict", [False, True])
def test_coca_is_the_papers_product_of_three(strict):
    assert_close(logits(Coca(strict, ROTARY)), of_the_paper(strict), atol=1e-12, rtol=0)


def test_strict_depends_on_distance_alone_and_slack_does_not():
    far = AT + 100
    assert_close(logits(Coca(True, ROTARY), far), logits(Coca(True, ROTARY)), atol=1e-6, rtol=0)
    assert (logits(Coca(False, ROTARY), far) - logits(Coca(False, ROTARY))).abs().max() > 0.5


def test_slack_is_strict_where_queries_are_equal_within_pairs():
    q = torch.cat((halves(Q)[0],) * 2, -1)
    both = [torch.einsum("bmhd,bnhd->bhmn", e.queries(q, AT), e.keys(K, AT)) for e in (Coca(False, ROTARY), Coca(True, ROTARY))]
    assert_close(both[0], both[1], atol=1e-12, rtol=0)


def test_coca_without_frequencies_or_with_those_of_fewer_dims_is_refused():
    with pytest.raises(ConfigError, match="all 8 dims of a head, and the rotary encoding here is none"):
        Coca().queries(Q, AT)
    with pytest.raises(ConfigError, match="not interleaved"):
        Coca(rotary=Rotary((1.0,) * 4, interleaved=True)).queries(Q, AT)
    with pytest.raises(ConfigError, match="of 4 dims; give one of 8"):
        Coca(rotary=Rotary((1.0, 0.1))).keys(K, AT)


@pytest.mark.parametrize(("least", "want"), [(1.0, [1.0, 1.0, 1.146241]), (0.0, [0.0, 0.75, 1.146241])])
def test_log_n_multiplies_queries(least, want):
    scaled = LogN(16, ROTARY, least).queries(Q, AT) / ROTARY.queries(Q, AT)
    for m, factor in zip((0, 7, 23), want, strict=True):
        assert_close(scaled[:, m], torch.full_like(scaled[:, m], factor), atol=1e-6, rtol=0)
    assert torch.equal(LogN(16, ROTARY).keys(K, AT), ROTARY.keys(K, AT))
    with pytest.raises(ConfigError, match="give 2 or more"):
        LogN(1)


def test_log_n_keeps_the_entropy_of_equal_noise_where_it_was():
    noise = torch.randn(1, 4096, 64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, k = 3 * noise[:, :, :32], noise[:, :, 32:]

    def entropy(q, n):
        p = torch.einsum("bhd,bnhd->bhn", q[:, n - 1], k[:, :n]).div(4).softmax(-1)
        return float(-(p * p.log()).sum(-1).mean())

    scaled = LogN(256).queries(q, torch.arange(4096))
    assert entropy(q, 4096) - entropy(q, 256) > 2 * abs(entropy(scaled, 4096) - entropy(scaled, 256))


def test_a_wrapped_model_gives_its_frequencies_where_none_were_given():
    other = Rotary((0.5,) * 4)
    for asked, own, anew in (
        (None, ROTARY, other), (Coca(), Coca(rotary=ROTARY), Coca(rotary=other)), (LogN(9), LogN(9, ROTARY), LogN(9, other)),
        (LogN(9, Coca(True)), LogN(9, Coca(True, ROTARY)), LogN(9, Coca(True, other))), (Unturned(), Unturned(), Unturned()),
        (LogN(9, Unturned()), LogN(9, Unturned()), LogN(9, Unturned())), (Coca(rotary=other), Coca(rotary=other), Coca(rotary=other)),
    ):  # fmt: skip
        given = rotated_by(Attention(encoding=asked), ROTARY)
        assert given.encoding == own and rotated_by(given, other, anew=True).encoding == anew
    branches = tuple(type(b)(b.pattern, LogN(9, b.encoding)) for b in rerope(5))
    found = rotated_by(Attention(branches=branches), ROTARY).branches
    assert [b.encoding.inner.rotary for b in found] == [ROTARY, ROTARY]


@pytest.mark.parametrize(
    ("asked", "want"),
    [
        ("{encoding: {kind: coca}}", Coca(rotary=ROTARY)),
        ("{encoding: {kind: coca_strict, log_n: 64}}", LogN(64, Coca(True, ROTARY))),
        ("{encoding: {kind: none, log_n: 64, least: 0}}", LogN(64, Unturned(), 0)),
        ("{encoding: {log_n: 64}, window: 9}", LogN(64, ROTARY)),
        ("{}", ROTARY),
    ],
)
def test_a_configuration_asks_for_it(asked, want):
    block = parse(f"attention: {asked}").attention
    assert rotated_by(attention_of(block) or Attention(), ROTARY).encoding == want


def test_a_configuration_that_cannot_be_is_refused():
    for asked, said in (
        ("{encoding: {log_n: 1}}", "2 or more"), ("{encoding: {least: 0.5}}", "means nothing without log_n"),
        ("{encoding: {kind: coca}, branches: {kind: rerope, window: 5}}", "set one of the two"),
        ("[{layers: 0, heads: 0, encoding: {kind: coca}}, {}]", "differ in attention.encoding"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            layers_of(parse(f"attention: {asked}").attention, tiny().config)


def test_layers_of_a_model_differ_as_in_hwfa_and_log_n_goes_over_branches():
    model = tiny()
    wrap(
        model,
        Ring.alone(),
        layers_of(parse("attention: [{layers: 0, window: 5}, {encoding: {kind: none, log_n: 64}}]").attention, model.config),
    )
    own, *_, last = (module.ringctx.asked.encoding for module in attention_modules(model))
    assert isinstance(own, Rotary) and last == LogN(64, Unturned())
    branches = attention_of(parse("attention: {branches: {kind: rerope, window: 5}, encoding: {log_n: 64}}").attention).branches
    assert all(b.encoding.trained == 64 and b.encoding.inner.rotary is None for b in branches)


def test_training_turns_by_the_positions_that_were_asked_for(tmp_path):
    asked = config(tmp_path, "attention.positions.kind=pi", "attention.positions.factor=4", "attention.encoding.kind=coca")
    job = job_of(asked, Ring.alone(), 40)
    own = extend.interpolated(trained_of(llama_of(asked.training.scratch, 40, asked.training.context, 0)), 4)
    assert {module.ringctx.asked.encoding for module in attention_modules(job.model)} == {Coca(rotary=own)}


@pytest.mark.parametrize("encoding", [Coca(False, ROTARY), Coca(True, ROTARY), LogN(9, ROTARY), LogN(9, Coca(rotary=ROTARY), 0.0)])
def test_gradients_are_those_of_finite_differences(encoding):
    q, k = Q[:1, :5, :1].clone().requires_grad_(), (K[:1, :5, :1] + 0.01).clone().requires_grad_()
    ring, layout, attention = Ring.alone(), Layout.contiguous(5, 1), Attention(encoding=encoding)
    assert torch.autograd.gradcheck(lambda q, k: ring_attention(q, k, V[:1, :5, :1], ring=ring, layout=layout, attention=attention), (q, k))
