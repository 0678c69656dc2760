"""`ringctx plan`: what it says of bytes and work is what plans say, published runs are met within a stated error, and it scales."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from ringctx import Attention, Layout, cli
from ringctx.config import parse
from ringctx.core.pattern import Pattern
from ringctx.core.plan import make_plan
from ringctx.errors import ConfigError
from ringctx.patterns import causal, sinks, window
from ringctx.tools.planner import Asked, device_named, link_of, predict
from ringctx.tools.shapes import KNOWN, Shapes, by_layer, shapes_of

SMALL = Shapes(layers=3, hidden=64, heads=4, key_heads=2, width=16, intermediate=128, vocabulary=100)
H100 = device_named("h100")


def asked(tokens: int, ranks: int, **more: int) -> Asked:
    return Asked(tokens=tokens, ranks=ranks, device=H100, link=link_of("ndr"), node_link=link_of("nvlink4"), **more)


@pytest.mark.parametrize("pattern", [causal(), causal() & (window(50) | sinks(3))])
def test_bytes_hops_and_balance_are_the_plans(pattern: Pattern) -> None:
    found = predict(SMALL, [Attention(pattern)] * 3, asked(700, 5))
    assert {(one.layout, one.transport) for one in found.options} == {
        (layout, transport) for layout in ("zigzag", "contiguous", "striped") for transport in ("rotate", "fetch", "gather")
    }
    for one in found.options:
        layout = getattr(Layout, one.layout)(700, 5)
        plans = [make_plan((pattern,), layout, layout, rank, one.transport) for rank in range(5)]
        assert one.bytes == 2 * sum(plan.tokens_sent for plan in plans) * 2 * 2 * 16 * 2  # of the last layer nothing is attended to
        assert one.hops == max(len(plan.hops) for plan in plans)
        costs = [plan.cost for plan in plans]
        assert one.imbalance == pytest.approx(max(costs) * 5 / sum(costs))


def test_layers_add_up() -> None:
    whole, windowed = Attention(causal()), Attention(causal() & window(50))
    both = predict(SMALL, [whole, windowed, windowed, whole], asked(700, 4), ["zigzag"])
    alone = [predict(SMALL, [one] * 2, asked(700, 4), ["zigzag"]) for one in (whole, windowed)]
    for one in both.options:
        parts = [next(x for x in found.options if x.transport == one.transport) for found in alone]
        assert one.bytes == parts[0].bytes + 2 * parts[1].bytes
        assert one.seconds["attention"] == pytest.approx(parts[0].seconds["attention"] + 2 * parts[1].seconds["attention"])


def test_the_first_is_as_quick_as_any_and_a_window_is_read_contiguously() -> None:
    for pattern, tokens in ((causal(), 100_000), (causal() & window(1000), 100_000)):
        found = predict(KNOWN["llama-3-8b"], [Attention(pattern)] * 32, asked(tokens, 8))
        assert found.best.seconds["total"] <= 1.01 * min(one.seconds["total"] for one in found.options)
        assert found.best.layout == ("zigzag" if pattern == causal() else "contiguous")


@pytest.mark.parametrize(
    ("tokens", "ranks", "published", "error"),
    [(131_072, 1, 42.01, 0.05), (131_072, 4, 10.95, 0.10), (131_072, 8, 5.85, 0.15), (1_000_000, 16, 77.0, 0.15)],
)
def test_published_runs_of_llama_405b(tokens: int, ranks: int, published: float, error: float) -> None:
    """Seconds of prefill in rows of 8 H100 (Yang et al. 2024, arXiv 2411.01783, of pass-KV); nothing was fitted to them."""
    shapes = KNOWN["llama-3-405b"]
    found = predict(shapes, [Attention()] * shapes.layers, asked(tokens, ranks, tensor=8), ["zigzag"])
    assert found.best.seconds["total"] == pytest.approx(published, rel=error)


def test_a_hundred_million_tokens_are_planned() -> None:
    began = time.perf_counter()
    found = predict(KNOWN["llama-3-8b"], [Attention()] * 32, asked(100_000_000, 64, nodes=8), ["zigzag"])
    assert found.best.imbalance == pytest.approx(1, abs=1e-3) and found.best.seconds["total"] > 1000
    assert time.perf_counter() - began < 60


def test_shapes_are_those_of_the_model_that_is_trained() -> None:
    scratch = "{layers: 2, hidden: 64, heads: 4, key_heads: 2, intermediate: 128, vocabulary: 100}"
    config = parse(f"attention: [{{layers: 1, window: 8}}, {{}}]\ntraining: {{scratch: {scratch}, context: 32}}")
    shapes = shapes_of(config)
    assert (shapes.layers, shapes.heads, shapes.key_heads, shapes.width, shapes.trained) == (2, 4, 2, 16, 32)
    assert shapes.layer_params == 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    assert shapes.read_params == shapes.layer_params + 64 * 64 + 64 * 32 * 2
    layers = by_layer(config, shapes)
    assert [layer.pattern for layer in layers.values()] == [causal(), causal() & window(8)]
    with pytest.raises(ConfigError, match="once a text is read"):
        by_layer(parse("attention: {select: {kind: moba}}"), shapes)


def test_the_command_tells_and_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("model: {path: llama-3-8b}")
    typed = ["plan", str(tmp_path / "c.yaml"), "--seq-len", "65536", "--ranks", "4"]
    assert cli.main([*typed, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {"ranks", "layout", "transport", "bytes", "hops", "memory", "imbalance", "seconds", "why"} == set(told)
    assert (told["ranks"], told["layout"], told["imbalance"]) == (4, "zigzag", 1.0)
    assert cli.main(typed) == 0
    said = capsys.readouterr().out
    assert "Take the first" in said and "H100" in said and "arXiv 2407.08608" in said
    assert cli.main([*typed, "--set", "model.path=llama-3-405b"]) == 0
    assert "That is more than the 80 GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--device", "abacus"], "There is no device 'abacus'"), (["--link", "rope"], "gigabytes a second"),
        (["--nodes", "3", "--ranks", "4"], "equal runs"), (["--nodes", "2", "--ranks", "4"], "--link"),
        (["--device", "here", "--nodes", "2"], "ranks of one machine"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused(more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("model: {path: llama-3-8b}")
    assert cli.main(["plan", str(tmp_path / "c.yaml"), *more]) == 2
    assert said in capsys.readouterr().err
