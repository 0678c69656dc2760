"""What `plan --device here` says of bytes is what reading sends, and all ranks say the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringctx import Ring
from ringctx.config import parse
from ringctx.huggingface import weights
from ringctx.runtime.engine import Engine
from ringctx.tools import planner, shapes
from ringctx.tools.planner import Option
from tests.pool import Pool

TOKENS = 700
ASKED = {"causal": "{}", "window": "{window: 100}", "sinks": "{window: 64, sinks: 3}", "layers": "[{layers: 1, window: 50}, {}]"}


def told_and_sent(ring: Ring, path: Path, attention: str, way: tuple[str, str]) -> tuple[Option, int]:
    """What is planned of a layout and transport, and bytes of keys that reading sends."""
    kind, transport = way
    text = f"model: {{path: '{path}', device: cpu, dtype: float32}}\nlayout: {{kind: {kind}}}\nring: {{transport: {transport}}}"
    config = parse(f"{text}\nattention: {attention}")
    model = shapes.shapes_of(config)
    run = planner.asked_here(config, ring, TOKENS)
    options = planner.predict(model, list(shapes.by_layer(config, model).values()), run).options
    engine = Engine.load(config, ring)
    engine.read([n % 200 + 5 for n in range(TOKENS)])
    return next(one for one in options if (one.layout, one.transport) == way), engine.ring.traffic.sent["keys"]


@pytest.mark.parametrize("attention", ASKED)
@pytest.mark.parametrize("way", [("zigzag", "rotate"), ("contiguous", "fetch"), ("striped", "gather")], ids=str)
def test_bytes_are_those_that_reading_sends(pool: Pool, attention: str, way: tuple[str, str]) -> None:
    ranks = pool.run(told_and_sent, weights.checkpoint("random-tiny"), ASKED[attention], way, size=3, timeout=120.0)
    assert sum(sent for _, sent in ranks) == ranks[0][0].bytes > 0
    assert len({(option.bytes, option.hops, option.imbalance) for option, _ in ranks}) == 1
    assert 0 < ranks[0][0].seconds["total"] < 60
