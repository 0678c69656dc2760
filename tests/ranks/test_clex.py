"""CLEX: it begins as NTK-aware scaling, its flow is learned through attention, and ranks learn it together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ringctx import Attention, Layout, Ring, ring_attention
from ringctx.asked.attention import encoding_of
from ringctx.config import parse
from ringctx.errors import ConfigError
from ringctx.methods.clex import Clex, Flowed
from ringctx.methods.extend import Trained, ntk
from ringctx.testing import dense, error, golden_inputs
from tests.pool import Pool

TRAINED = Trained(8, 10_000.0, 16)
S, H, D = 45, 2, 8


def flow(seed: int | None = 0) -> Clex:
    """One that has begun to learn; with None, one that has not."""
    torch.manual_seed(0 if seed is None else seed)
    made = Clex(TRAINED, longest=4, width=2).double()
    if seed is not None:
        torch.nn.init.normal_(made.down, std=0.05)
    return made


@pytest.mark.parametrize("t", [1.0, 1.7, 2.0, 3.0])
def test_it_begins_as_ntk_aware_scaling(t: float) -> None:
    want = torch.tensor(ntk(TRAINED, 2 * t - 1).frequencies, dtype=torch.float64)
    assert torch.allclose(flow(None).frequencies(t), want, rtol=2e-5)


def test_a_length_is_rounded_up_and_capped() -> None:
    made = flow()
    for length, t in ((5, 1), (16, 1), (17, 2), (45, 3), (1000, 4)):
        assert torch.equal(made.encoding(length).frequencies, made.frequencies(t))


def test_half_the_step_changes_little_and_the_last_pair_more_than_the_first() -> None:
    made, finer = flow(), flow()
    finer.step = 0.05
    assert torch.allclose(made.frequencies(4), finer.frequencies(4), rtol=1e-6)
    with pytest.raises(ConfigError, match="at most 1 a step"):
        Clex(TRAINED, longest=4, step=2)


def learned(ring: Ring, kind: str) -> tuple[list[Tensor], list[Tensor]]:
    """This rank's out, dq, dk, and its share of the flow's gradients."""
    made, layout = flow(), getattr(Layout, kind)(S, ring.size)
    q, k, v, dout = (layout.shard(x, ring.rank).requires_grad_(n < 2) for n, x in enumerate(golden_inputs(1, H, S, D)))
    out = ring_attention(q, k, v, ring=ring, layout=layout, attention=Attention(encoding=made.encoding(S)))
    assert isinstance(out, Tensor)
    out.backward(dout)
    return [out.detach(), *(x.grad for x in (q, k) if x.grad is not None)], [p.grad for p in made.parameters() if p.grad is not None]


@pytest.mark.parametrize(("size", "kind"), [(2, "zigzag"), (3, "contiguous")])
def test_ranks_learn_the_flow_of_one(pool: Pool, size: int, kind: str) -> None:
    alone, layout = learned(Ring.alone(), "contiguous"), getattr(Layout, kind)(S, size)
    parts = pool.run(learned, kind, size=size)
    for n, want in enumerate(alone[0]):
        assert error(layout.unshard([part[0][n] for part in parts]), want) < 1e-12
    assert len(alone[1]) == 2 and all(x.abs().max() > 1e-6 for x in alone[1])
    for n, want in enumerate(alone[1]):
        assert error(torch.stack([part[1][n] for part in parts]).sum(0), want) < 1e-11


def test_the_oracle_and_finite_differences_agree() -> None:
    made = flow()
    q, k, v, _ = (x[:, :7] for x in golden_inputs(1, H, S, D))
    ask = lambda up, down: torch.func.functional_call(made, {"up": up, "down": down}, (7,))
    made.forward = lambda length: made.frequencies(3)  # type: ignore[method-assign]

    def out(up: Tensor, down: Tensor) -> Tensor:
        asked = Attention(encoding=Flowed(ask(up, down)))
        found = ring_attention(q, k, v, ring=Ring.alone(), layout=Layout.contiguous(7, 1), attention=asked)
        assert isinstance(found, Tensor)
        return found

    leaves = [p.detach().clone().requires_grad_() for p in (made.up, made.down)]
    assert torch.autograd.gradcheck(out, leaves)
    assert error(out(*leaves), dense(Attention(encoding=made.encoding(45)), q, k, v).out) < 1e-12


def test_a_configuration_reads_a_flow_and_without_one_is_ntk(tmp_path: Path) -> None:
    made, file = flow(), tmp_path / "flow.safetensors"
    save_file(made.state_dict(), file)
    asked = lambda more: encoding_of(parse(f"attention: {{positions: {{kind: clex, factor: 4{more}}}}}").positions, TRAINED, S)
    assert torch.allclose(torch.tensor(asked(f", flow: '{file}'").frequencies).double(), made.frequencies(3), rtol=1e-6)
    assert torch.allclose(torch.tensor(asked("").frequencies), torch.tensor(ntk(TRAINED, 5.0).frequencies), rtol=2e-5)
    with pytest.raises(ConfigError, match="CLEX's flow .* cannot be used"):
        asked(f", flow: '{tmp_path / 'none'}'")
    save_file({"up": torch.zeros(3, 7), "down": torch.zeros(7, 3)}, file)
    with pytest.raises(ConfigError, match="a model that rotates 8 dims"):
        asked(f", flow: '{file}'")
    with pytest.raises(ConfigError, match="flow means nothing with kind yarn"):
        parse("attention: {positions: {kind: yarn, factor: 4, flow: x}}")
