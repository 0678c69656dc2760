"""What every method is held to: the definition, on 1 to 4 ranks, forward and backward, and read in chunks or token by token.

A method says how it is computed on a rank and what it is on whole tensors; the rest is here. Everything is in float64.
Letters: b batch, S tokens of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ringctx import Attention, Layout, Ring, decode_attention, ring_attention
from ringctx.testing import dense

S, FIRST, NEW = 41, 17, 3
"""Tokens; those of the first chunk; those decoded one by one at the end."""
LAYOUTS = {1: "contiguous", 2: "zigzag", 3: "striped", 4: "contiguous"}
Tensors = dict[str, Tensor]
Compute = Callable[[Ring, Layout | None, Layout, Tensors], Tensor]
"""Ring, where queries live (None: every rank has the newest), where keys do, this rank's tokens -> this rank's out."""


def stock_layout(length: int, size: int) -> Layout:
    """Another kind for each number of ranks."""
    return getattr(Layout, LAYOUTS[size])(length, size)


@dataclass(frozen=True)
class Method:
    """tokens (b S ...) by name, of which `of_queries` go with queries and the others with keys; params: leaves that `compute` uses.

    reference: the whole out, and the gradients of tokens and params for `slope`, by the definition. layout: of so many tokens and ranks.
    untrained, unread: why there is no backward, or why a sequence is not read in chunks and token by token by the same call.
    """

    tokens: Tensors
    compute: Compute
    reference: Callable[[], tuple[Tensor, Tensors]]
    params: Tensors = field(default_factory=dict)
    of_queries: tuple[str, ...] = ("q",)
    layout: Callable[[int, int], Layout] = stock_layout
    untrained: str = ""
    unread: str = ""


METHODS: dict[str, Callable[[], Method]] = {}
"""By the name that the table of methods has for it. `tests.methods.listed` fills it."""


def of_attention(attention: Attention, inputs: tuple[Tensor, Tensor, Tensor], oracle: Attention | None = None, **more: Any) -> Method:
    """A method that is a value of Attention; the definition is the oracle's, of another value if that says it otherwise."""
    params = {f"parameter {n}": x for n, x in enumerate(attention.params())}

    def reference() -> tuple[Tensor, Tensors]:
        asked = oracle or attention
        sinks = int(asked.sink is not None)
        found = dense(asked, *inputs, dout=slope(inputs[0].new_empty(*inputs[0].shape[:3], inputs[2].shape[3])))
        slopes = [*found.dparams[len(found.dparams) - sinks :], *found.dparams[: len(found.dparams) - sinks]]
        assert found.dq is not None and found.dk is not None and found.dv is not None
        return found.out, {"q": found.dq, "k": found.dk, "v": found.dv} | dict(zip(params, slopes, strict=True))

    def compute(ring: Ring, layout: Layout | None, keys: Layout, tokens: Tensors) -> Tensor:
        q, k, v = tokens["q"], tokens["k"], tokens["v"]
        if layout is None:
            return decode_attention(q, k, v, key_layout=keys, ring=ring, attention=attention)
        found = ring_attention(q, k, v, ring=ring, layout=layout, key_layout=keys, attention=attention)
        assert isinstance(found, Tensor)
        return found

    return Method(dict(zip("qkv", inputs, strict=True)), compute, reference, params, **more)


def of_function(tokens: Tensors, compute: Compute, define: Callable[[Tensors, Tensors], Tensor], **more: Any) -> Method:
    """A method that is a function of its own; define: of whole tokens and params, by the paper's words, differentiable."""
    params: Tensors = more.get("params", {})

    def reference() -> tuple[Tensor, Tensors]:
        leaves = {name: x.detach().clone().requires_grad_() for name, x in (tokens | params).items()}
        out = define({name: leaves[name] for name in tokens}, {name: leaves[name] for name in params})
        out.backward(slope(out.detach()))
        return out.detach(), _slopes(leaves)

    return Method(tokens, compute, reference, **more)


def slope(out: Tensor) -> Tensor:
    """The gradient that every comparison begins from, of a whole out."""
    return torch.cos(torch.arange(out.numel(), dtype=torch.float64) * 0.37).view(out.shape)


def made(name: str) -> Method:
    """A method anew."""
    import tests.methods.listed  # noqa: F401  (fills METHODS, in every rank's process)

    return METHODS[name]()


def trained(ring: Ring, name: str) -> tuple[Tensor, Tensors, Tensors]:
    """This rank's out, the gradients of its tokens, and its share of those of the parameters."""
    method = made(name)
    layout = method.layout(S, ring.size)
    at, train = layout.indices(ring.rank), not method.untrained
    mine = {key: x[:, at].detach().requires_grad_(train) for key, x in method.tokens.items()}
    for x in method.params.values():
        x.requires_grad_(train)
    out = method.compute(ring, layout, layout, mine)
    if train:
        out.backward(slope(out.new_empty(len(out), S, *out.shape[2:]))[:, at])
    return out.detach(), _slopes(mine), _slopes(method.params)


def _slopes(leaves: Tensors) -> Tensors:
    return {key: torch.zeros_like(x) if x.grad is None else x.grad for key, x in leaves.items()}


def read(ring: Ring, name: str) -> tuple[Tensor, list[Tensor]]:
    """In two chunks, then token by token: this rank's rows of the chunks, in the order of `rows_read`, and what each decoded token gave."""
    method, found, steps = made(name), [], []
    keys = Layout(((),) * ring.size)
    with torch.no_grad():
        for chunk in _chunks(method, ring.size):
            keys = _joined(keys, chunk)
            found.append(method.compute(ring, chunk, keys, _tokens(method, chunk.indices(ring.rank), keys.indices(ring.rank))))
        for n in range(S - NEW, S):
            keys = _joined(keys, Layout(tuple((range(n, n + 1),) if r == n % ring.size else () for r in range(ring.size))))
            steps.append(method.compute(ring, None, keys, _tokens(method, torch.tensor([n]), keys.indices(ring.rank))))
    return torch.cat(found, 1), steps


def rows_read(method: Method, size: int) -> Tensor:
    """The indices of all ranks' rows of `read`, in rank order."""
    return torch.cat([layout.indices(rank) for rank in range(size) for layout in _chunks(method, size)])


def _chunks(method: Method, size: int) -> list[Layout]:
    return [method.layout(last - first, size).shifted(first) for first, last in ((0, FIRST), (FIRST, S - NEW))]


def _joined(one: Layout, other: Layout) -> Layout:
    return Layout(tuple(a + b for a, b in zip(one.spans, other.spans, strict=True)))


def _tokens(method: Method, queries: Tensor, keys: Tensor) -> Tensors:
    return {name: x[:, queries if name in method.of_queries else keys] for name, x in method.tokens.items()}
