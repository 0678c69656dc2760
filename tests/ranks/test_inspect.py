"""`ringctx inspect`: what it measures is what transformers' own matrices say, on one rank and on several."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from ringctx import cli
from ringctx.config import parse
from ringctx.core.ring import Ring
from ringctx.errors import ConfigError
from ringctx.huggingface.weights import save
from ringctx.methods import sparsity
from ringctx.tools import inspect
from ringctx.tools.inspect.report import near
from ringctx.training.data import words
from tests.pool import Pool
from tests.tiny import tiny

TOKENS, FIRST = 150, 4
TEXT = " ".join(f"w{(7 * n * n + n // 3) % 90}" for n in range(TOKENS))
SELECTORS = inspect.selectors_of(["{kind: a_shape, initial: 4, local: 20}", "{kind: x_attention, threshold: 0.6, stride: 4, block: 8}"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("inspect") / "model"
    save(tiny(), folder)
    words([f"w{n}" for n in range(97)]).save_pretrained(folder)
    return folder


def measured(ring: Ring, folder: str, rows: int) -> inspect.Result:
    config = parse(f"model: {{path: {folder}, dtype: float32, device: cpu}}")
    return inspect.measure(config, ring, inspect.Asked(text=TEXT, rows=rows, first=FIRST, selectors=SELECTORS))


def matrices(folder: Path) -> list[torch.Tensor]:
    """(h S S) of each layer, by transformers."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = torch.tensor([[int(word[1:]) for word in TEXT.split()]])
    with torch.no_grad():
        return [layer[0] for layer in model(ids, output_attentions=True, use_cache=False).attentions]


def test_measures_are_those_of_transformers_matrices(model: Path) -> None:
    found = measured(Ring.alone(), str(model), TOKENS)
    assert (found.tokens, found.rows, found.edges) == (TOKENS, TOKENS - 1, [0, 1, 2, 4, 8, 16, 32, 64, 128])
    far = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    kept = (far < 20) | (torch.arange(TOKENS) < 4)
    for layer, whole in enumerate(matrices(model)):
        for head, p in enumerate(whole[:, 1:].double()):
            (one,) = [x for x in found.heads if (x.layer, x.head) == (layer, head)]
            assert one.entropy == pytest.approx(float(sparsity.entropy(p).mean()), abs=1e-5)
            assert one.effective_count == pytest.approx(float(sparsity.effective_count(p).mean()), rel=1e-5)
            assert one.hoyer == pytest.approx(mean(float(sparsity.hoyer(row[: n + 2])) for n, row in enumerate(p)), abs=1e-5)
            assert one.largest == pytest.approx(float(p.amax(-1).mean()), abs=1e-5)
            assert one.first == pytest.approx(float(p[:, :FIRST].sum(-1).mean()), abs=1e-5)
            assert near(found, one) == pytest.approx(float((p * (far < 64)[1:]).sum(-1).mean()), abs=1e-5)
            assert sum(one.distance) == pytest.approx(1, abs=1e-5)
            a_shape = one.selectors["kind: a_shape, initial: 4, local: 20"]
            assert a_shape["retained"] == pytest.approx(float((p * kept[1:]).sum(-1).mean()), abs=1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_measure_what_one_does(pool: Pool, model: Path, size: int) -> None:
    alone = measured(Ring.alone(), str(model), 40)
    for found in pool.run(measured, str(model), 40, size=size):
        for one, other in zip(found.heads, alone.heads, strict=True):
            assert one.entropy == pytest.approx(other.entropy, abs=1e-5) and one.distance == pytest.approx(other.distance, abs=1e-5)
            for kind, pair in other.selectors.items():
                assert one.selectors[kind] == pytest.approx(pair, abs=1e-5)


def test_the_command_tells_writes_and_draws(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(f"model: {{path: {model}, dtype: float32, device: cpu}}")
    (tmp_path / "text.txt").write_text(TEXT)
    asked = ["inspect", str(tmp_path / "c.yaml"), "--document", str(tmp_path / "text.txt"), "--rows", "30", "--tokens", "100"]
    assert cli.main([*asked, "--out", str(tmp_path / "out"), "--selector", "a_shape"]) == 0
    said = capsys.readouterr().out
    assert "100 tokens on 1 ranks, 30 rows" in said and "a_shape" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"inspect.json", "heads.png", "distance.png", "selectors.png"}
    assert all(path.stat().st_size > 5000 for path in (tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize(
    ("block", "selector", "said"),
    [
        ("attention: {select: {kind: moba}}", "none", "attention.select narrows"),
        ("attention: {carry: {kind: selective}}", "none", "attention.carry takes"),
        ("cache: {evict: {kind: window, budgets: [9]}}", "none", "cache.evict"), ("model: {tensor_parallel: 2}", "none", "tensor_parallel"),
        ("{}", "quest", "does not select while a text is read"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(block: str, selector: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        inspect.check(parse(block), inspect.Asked(text=TEXT, selectors=inspect.selectors_of([selector])))
