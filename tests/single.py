"""One call of torch's own attention in the dtype of a problem: the yardstick of half precision."""

from __future__ import annotations

import torch

from ringctx.testing import Dense, errors
from tests.cases import Problem


def single_call(given: Problem, reference: Dense) -> dict[str, float]:
    """The errors of out, dq, dk and dv of one scaled_dot_product_attention over the whole sequence, in the problem's dtype.

    Rows that see nothing are given one key and no gradient, because torch defines them otherwise. Patterns and scale only.
    """
    seen = given.attention.pattern.allows(given.i, given.j)
    seen = seen[(None,) * (4 - seen.dim())]
    dead = ~seen.any(-1, keepdim=True)
    seen = seen | dead
    q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in (given.q, given.k, given.v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=given.attention.scale, enable_gqa=True)
    dead_rows = dead.expand(*out.shape[:3], 1)
    dout = given.dout.transpose(1, 2).masked_fill(dead_rows, 0.0)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return errors(reference, out=out.detach().masked_fill(dead_rows, 0.0).transpose(1, 2), dq=dq, dk=dk, dv=dv, dout=given.dout)
