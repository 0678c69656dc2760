"""The oracle against values that nothing here computed, against torch's own attention, and against finite differences."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from ringctx.core.pattern import Causal, Full, Pattern
from ringctx.errors import Unsupported
from ringctx.testing import dense, error, errors, golden_inputs


@dataclass(frozen=True)
class Spec:
    """As much of an Attention as the oracle reads."""

    pattern: Pattern = field(default_factory=Causal)
    encoding: object = None
    scores: tuple = ()
    branches: tuple = ()
    carry: object = None
    sink: Tensor | None = None
    select: object = None
    normaliser: str = "softmax"
    dropout: float = 0.0
    scale: float | None = None


@dataclass(frozen=True)
class Late(Pattern):
    """Sees only keys below `n`, and only from index `first` on: the rows before it see nothing."""

    first: int
    n: int

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        return (i[:, None] >= self.first) & (j < self.n)


class Table:
    """An additive score with one learned number per head and distance."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def params(self) -> tuple[Tensor, ...]:
        return (self.table,)

    def bias(self, heads: Tensor, i: Tensor, j: Tensor, params: tuple[Tensor, ...]) -> Tensor:
        distance = (i[:, None] - j).clamp(0, params[0].shape[1] - 1)
        return params[0][heads][:, distance]


class Cap:
    """An elementwise score."""

    def apply(self, logits: Tensor) -> Tensor:
        return 3 * torch.tanh(logits / 3)

    def derivative(self, logits: Tensor) -> Tensor:
        return 1 - torch.tanh(logits / 3) ** 2


class Turn:
    """An encoding that scales queries and keys by numbers of their positions."""

    def queries(self, q: Tensor, positions: Tensor) -> Tensor:
        return q * torch.cos(positions.double())[:, None, None]

    def keys(self, k: Tensor, positions: Tensor) -> Tensor:
        return k * torch.sin(positions.double() + 1)[:, None, None]


def test_golden_values() -> None:
    q, k, v, dout = golden_inputs()
    found = dense(Spec(), q, k, v, dout=dout)
    expected = [
        (found.out[0, 63, 0, :4], [0.274196, 0.645363, 0.126723, -0.626017]),
        (found.out[0, 5, 1, :4], [-0.833719, -1.155860, 0.381411, 1.299811]),
        (found.dq[0, 63, 0, :4], [0.612508, 0.083525, -0.627417, -0.345446]),
        (found.dk[0, 0, 0, :4], [-1.981796, -0.669996, 1.557437, 0.905425]),
        (found.dv[0, 0, 1, :4], [1.606864, -1.193618, -2.875797, -0.279374]),
    ]
    for got, wanted in expected:
        assert (got - torch.tensor(wanted, dtype=torch.float64)).abs().max() < 6e-7


@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (8, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("pattern", [Causal(), Full(), Late(0, 3)], ids=str)
def test_matches_torch(pattern: Pattern, heads: tuple[int, int]) -> None:
    h, g = heads
    q, k, v, dout = (x.requires_grad_() for x in golden_inputs(2, h, 50, 4, g))
    mask = pattern.allows(torch.arange(50), torch.arange(50))
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(qt, kt, vt, attn_mask=mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    found = dense(Spec(pattern=pattern, scale=0.3), q, k, v, dout=dout)
    assert max(errors(found, out=out, dq=dq, dk=dk, dv=dv, dout=dout).values()) < 1e-14


def test_groups_of_heads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, dout = golden_inputs(2, 6, 20, 4, 2)
    spec = Spec(scores=(Table(torch.linspace(0, 1, 30).view(6, 5)),), sink=torch.linspace(-1, 1, 6))
    whole = dense(spec, q, k, v, dout=dout)
    monkeypatch.setattr("ringctx.testing.LOGITS_AT_ONCE", 1)
    parts = dense(spec, q, k, v, dout=dout)
    found = errors(whole, out=parts.out, lse=parts.lse, dq=parts.dq, dk=parts.dk, dv=parts.dv, dparams=parts.dparams)
    assert len(found) == 7 and max(found.values()) < 1e-14


def test_every_gradient_by_differences() -> None:
    """Every term at once: encoding, softcap, bias, sink, gaps in the keys, values of another width, and a gradient of lse."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    q, k, v, dout, dlse = normal(2, 6, 4, 3), normal(2, 7, 2, 3), normal(2, 7, 2, 5), normal(2, 6, 4, 5), normal(2, 6, 4)
    table, sink = normal(4, 5), normal(4)
    i, j = torch.tensor([2, 3, 4, 9, 10, 11]), torch.tensor([0, 1, 3, 4, 5, 9, 10])

    def value(q: Tensor, k: Tensor, v: Tensor, table: Tensor, sink: Tensor) -> Tensor:
        found = dense(Spec(encoding=Turn(), scores=(Table(table), Cap()), sink=sink, scale=0.7), q, k, v, i=i, j=j)
        return (found.out * dout).sum() + (found.lse * dlse).sum()

    inputs = [q, k, v, table, sink]
    spec = Spec(encoding=Turn(), scores=(Table(table), Cap()), sink=sink, scale=0.7)
    found = dense(spec, q, k, v, i=i, j=j, dout=dout, dlse=dlse)
    for n, grad in enumerate([found.dq, found.dk, found.dv, *found.dparams]):
        assert grad.shape == inputs[n].shape
        direction = torch.randn(inputs[n].shape, dtype=torch.float64, generator=generator)
        near = [[x + sign * 1e-6 * direction if m == n else x for m, x in enumerate(inputs)] for sign in (1, -1)]
        slope = (value(*near[0]) - value(*near[1])) / 2e-6
        assert abs(slope - (grad * direction).sum()) < 1e-7


@pytest.mark.parametrize("sink", [None, torch.tensor([0.5, -2.0])], ids=["plain", "sink"])
def test_rows_that_see_nothing(sink: Tensor | None) -> None:
    q, k, v, dout = golden_inputs(1, 2, 9, 4)
    found = dense(Spec(pattern=Late(4, 3), sink=sink), q, k, v, dout=dout, dlse=torch.ones(1, 9, 2))
    assert not found.out[:, :4].any() and not found.dq[:, :4].any()
    expected = torch.full((2,), -torch.inf, dtype=torch.float64) if sink is None else sink.double()
    assert torch.equal(found.lse[0, 0], expected)
    assert all(x.isfinite().all() for x in (found.out, found.dq, found.dk, found.dv, *found.dparams, found.lse[:, 4:]))
    assert not found.dk[:, 3:].any() and not found.dv[:, 3:].any() and found.dv[:, :3].all()


def test_no_keys_and_no_queries() -> None:
    q, k, v, dout = golden_inputs(1, 2, 5, 4)
    found = dense(Spec(pattern=Full()), q, k[:, :0], v[:, :0], dout=dout)
    assert not found.out.any() and found.lse.isneginf().all() and not found.dq.any() and found.dk.shape == (1, 0, 2, 4)
    found = dense(Spec(pattern=Full()), q[:, :0], k, v, dout=dout[:, :0])
    assert found.out.shape == (1, 0, 2, 4) and not found.dk.any()


def test_error_is_strict() -> None:
    reference = torch.tensor([3.0, 4.0, -torch.inf])
    assert error(reference, reference) == 0
    assert error(torch.tensor([3.0, 4.5, -torch.inf]), reference) == 0.1
    assert error(torch.tensor([3.0, 4.0, -1e30]), reference) == float("inf")
    assert error(torch.tensor([3.0, -torch.inf, -torch.inf]), reference) == float("inf")
    assert error(torch.tensor([3.0, torch.nan, -torch.inf]), reference) == float("inf")
    assert error(torch.ones(2), torch.zeros(2)) == float("inf") and error(torch.zeros(2), torch.zeros(2)) == 0
    assert error(torch.ones(1), torch.zeros(1), floor=2.0) == 0.5
    with pytest.raises(ValueError, match="shape"):
        error(torch.zeros(2), torch.zeros(1))


def test_refusals() -> None:
    q, k, v, _ = golden_inputs(1, 2, 4, 4)
    with pytest.raises(Unsupported, match="normaliser='relu'"):
        dense(Spec(normaliser="relu"), q, k, v)
    with pytest.raises(Unsupported, match="seed"):
        dense(Spec(dropout=0.5), q, k, v)
