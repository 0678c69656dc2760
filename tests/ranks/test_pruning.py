"""Context pruning of Selective Attention: outputs and kept keys are those of a dense definition, on any number of ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

pytest.importorskip("transformers")

from ringctx.config import parse
from ringctx.core.attention import Attention
from ringctx.errors import ConfigError, Unsupported
from ringctx.methods.eviction import Forgotten
from ringctx.methods.rotary import Rotary
from ringctx.methods.scores import Alibi, Softcap
from ringctx.methods.selective import Selective
from ringctx.patterns import causal, window
from ringctx.runtime.cache import KVCache
from ringctx.testing import golden_inputs
from tests import evicting, virtual
from tests.evicting import BATCH, HEADS, KEY_HEADS, calls, inputs, on_rank
from tests.pool import Pool

PLAIN = Attention(encoding=Rotary((1.0, 0.3)), carry=Selective())
SCORED = Attention(
    pattern=causal() & window(30), encoding=Rotary((1.0, 0.3)), carry=Selective(), scores=(Softcap(3.0), Alibi.standard(HEADS)),
    sink=torch.tensor([0.3, -0.2, 0.1, 0.5]).double(),
)  # fmt: skip
POLICIES = {"budget": Forgotten(9), "layers": Forgotten((9,)), "threshold": Forgotten(threshold=1.5), "both": Forgotten(12, 2.0)}


def by_definition(
    policy: Forgotten, attention: Attention, tensors: tuple[Tensor, Tensor, Tensor], spans: list[tuple[range, bool]]
) -> tuple[Tensor, list[set[int]]]:
    """out (b S h d), and for each batch row the indices that are left: one row of queries and one key after the other."""
    q, k, v = tensors
    b, length, h, d = q.shape
    every = torch.arange(length)
    if attention.encoding is not None:
        q, k = attention.encoding.queries(q, every), attention.encoding.keys(k, every)
    out, left = torch.zeros_like(q), []
    for row in range(b):
        held, forgotten = list[int](), torch.zeros(length, dtype=torch.float64)
        for span, _ in spans:
            held += span
            for i in span:
                seen = [j for j in held if j <= i and bool(attention.pattern.allows(torch.tensor([i]), torch.tensor([j])).all())]
                given = torch.zeros(length, dtype=torch.float64)
                for head in range(h):
                    logits = k[row, seen, head * k.shape[2] // h] @ q[row, i, head] / math.sqrt(d)
                    for score in attention.elementwise:
                        logits = score.apply(logits)
                    for score in attention.additive:
                        logits = logits + score.bias(torch.tensor([head]), torch.tensor([i]), torch.tensor(seen), score.params())[0, 0]
                    if head == 0:
                        given[seen] = logits.relu()
                    more = [] if attention.sink is None else [attention.sink[head : head + 1]]
                    weights = torch.cat([logits - forgotten[seen], *more]).softmax(0)[: len(seen)]
                    out[row, i, head] = weights @ v[row, seen, head * k.shape[2] // h]
                given[0] = given[i] = 0
                forgotten += given
            held = [j for j in held if float(forgotten[j]) <= policy.threshold]
            budget = policy.budget(0, 1, span.stop)
            held = sorted(sorted(held, key=lambda j: (float(forgotten[j]), j))[:budget])
        left.append(set(held))
    return out, left


def check(ranks: list[Any], policy: Forgotten, attention: Attention) -> None:
    out, kept = by_definition(policy, attention, inputs(), calls())
    got = torch.full_like(inputs()[0], torch.nan)
    for outs, _, _ in ranks:
        for indices, part in outs:
            got[:, indices] = part
    assert_close(got, out, atol=1e-11, rtol=0)
    for b in range(BATCH):
        for g in range(KEY_HEADS):
            parts = [sets[b][g] for _, sets, _ in ranks]
            assert set().union(*parts) == kept[b] and sum(map(len, parts)) == len(kept[b])


def test_budgeted_decoding_differs_from_the_whole_by_the_golden_numbers() -> None:
    q, k, v, _ = golden_inputs(1, 2, 64, 8)
    attention, steps = Attention(carry=Selective()), [(range(n, n + 1), True) for n in range(64)]
    whole = by_definition(Forgotten(64), attention, (q, k, v), steps)[0]
    for keys, far in ((8, "1.33e-01"), (16, "3.93e-03"), (32, "1.79e-06")):
        assert f"{float((by_definition(Forgotten(keys), attention, (q, k, v), steps)[0] - whole).abs().max()):.2e}" == far


@pytest.mark.parametrize(("size", "kind"), [(1, "zigzag"), (2, "contiguous"), (3, "zigzag"), (4, "zigzag")], ids=str)
@pytest.mark.parametrize("name", POLICIES)
def test_outputs_and_kept_keys_are_those_of_the_definition(name: str, size: int, kind: str) -> None:
    check(virtual.run(on_rank, POLICIES[name], PLAIN, kind, True, size=size), POLICIES[name], PLAIN)


def test_a_bound_drops_keys_that_cannot_matter() -> None:
    q, k, v = inputs()
    every = torch.arange(q.shape[1])
    assert PLAIN.encoding is not None
    turned = PLAIN.encoding.queries(q, every), PLAIN.encoding.keys(k, every).repeat_interleave(HEADS // KEY_HEADS, 2)
    logits = torch.einsum("bqhd,bkhd->bhqk", *turned) / math.sqrt(q.shape[3])
    swing = float((logits - logits.diagonal(dim1=2, dim2=3).unsqueeze(-1)).abs().max())
    bound = 0.01
    policy = Forgotten(bound=bound, swings=(swing,))
    ranks = virtual.run(on_rank, policy, PLAIN, "zigzag", True, size=2)
    whole = by_definition(Forgotten(len(every)), PLAIN, inputs(), calls())[0]
    held = set().union(*(sets[0][0] for _, sets, _ in ranks))
    assert 0 in held and len(held) < len(every) - 3
    for outs, _, _ in ranks:
        for indices, part in outs:
            assert float((part - whole[:, indices]).abs().max()) <= 2 * bound * float(v.abs().max())


@pytest.mark.parametrize("size", [1, 3])
def test_scores_sinks_and_windows_count(size: int) -> None:
    check(virtual.run(on_rank, POLICIES["both"], SCORED, "zigzag", True, size=size), POLICIES["both"], SCORED)


def test_ranks_without_tokens_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evicting, "CHUNK", 3)
    check(virtual.run(on_rank, POLICIES["budget"], PLAIN, "contiguous", True, size=4), POLICIES["budget"], PLAIN)


def test_the_same_over_gloo(pool: Pool) -> None:
    check(pool.run(on_rank, POLICIES["budget"], PLAIN, "zigzag", True, size=3), POLICIES["budget"], PLAIN)


def bytes_of(ring: Any, policy: Forgotten | None) -> tuple[int, int]:
    """Bytes of keys and values that this rank sent while it read, and the keys it holds at the end."""
    from ringctx.core.layout import Layout
    from ringctx.huggingface import Context
    from ringctx.runtime.evict import Evictor

    make = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 1024, n, 32, generator=make) for n in (4, 4, 4))
    context = Context(ring, transport="rotate", evictor=None if policy is None else Evictor(policy, 1, True))
    cache = KVCache(1, ring.rank, ring.size, page=4)
    for begin in range(0, 1024, 128):
        layout = Layout.zigzag(128, ring.size).shifted(begin)
        cache.extend(layout)
        own = layout.indices(ring.rank)
        with context.running(layout, cache), torch.no_grad():
            context.attend(0, q[:, own], k[:, own], v[:, own], Attention(carry=Selective()))
    return ring.traffic.sent["keys"], sum(int((part.indices >= 0).sum()) // 4 for part in cache.parts(0))


def test_pruned_keys_are_not_sent() -> None:
    whole = sum(sent for sent, _ in virtual.run(bytes_of, None, size=2))
    for keys in (257, 129):
        found = virtual.run(bytes_of, Forgotten(keys), size=2)
        assert sum(held for _, held in found) == keys - 1
        visits = [min(begin, keys - 1) + 128 for begin in range(0, 1024, 128)]  # keys that each chunk meets
        want = sum(visits) / sum(begin + 128 for begin in range(0, 1024, 128))
        assert sum(sent for sent, _ in found) / whole == pytest.approx(want, rel=0.1)


# -- behind the configuration -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cache: {evict: {kind: forgotten, budgets: [9]}}", "set attention.carry.kind to selective"),
        ("{attention: {carry: {kind: selective}}, cache: {evict: {kind: forgotten}}}", "forgotten needs budgets of 2 or more"),
        (
            "{attention: {carry: {kind: selective}}, cache: {evict: {kind: forgotten, budgets: [1]}}}",
            "forgotten needs budgets of 2 or more",
        ),
        ("{attention: {carry: {kind: selective}}, cache: {evict: {kind: h2o}}}", "or evict forgotten ones"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(text)


def test_budgets_must_fit_the_model_and_heads_must_agree() -> None:
    with pytest.raises(ConfigError, match="budgets of 1 layers, but the model has 2"):
        Forgotten((9,)).budget(0, 2, 50)
    cache = KVCache(1, 0, 1)
    from ringctx.core.layout import Layout

    cache.extend(Layout.contiguous(4, 1))
    cache.append(0, torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8))
    cache.carry_on(0, torch.zeros(1, 4))
    with pytest.raises(Unsupported, match="all heads must keep the same"):
        cache.evict(0, [torch.tensor([[[True] * 4, [False] * 4]])], [[[0], [1]]])


def answers(ring: Any, evict: str) -> list[int]:
    from ringctx.runtime.engine import Engine

    model = "model: {path: random-tiny, dtype: float32, device: cpu}"
    text = f"{{{model}, attention: {{carry: {{kind: selective}}}}, cache: {{evict: {evict}}}}}"
    engine = Engine.load(parse(text, ["generation.max_new_tokens=12", "layout.chunk=32"]), ring)
    return engine.generate("In the beginning God created the heaven and the earth. " * 3, "Who?").tokens


def test_a_pruned_model_says_the_same_on_any_number_of_ranks(pool: Pool) -> None:
    from ringctx.core.ring import Ring

    evict = "{kind: forgotten, budgets: [5], each_chunk: true}"
    want = answers(Ring.alone(), evict)
    assert want != answers(Ring.alone(), "{kind: none}")
    for size in (2, 4):
        assert pool.run(answers, evict, size=size) == [want] * size
