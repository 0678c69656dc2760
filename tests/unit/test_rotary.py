"""Rotary: bit for bit transformers' own in fp32, relative, and partial where asked."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from ringctx.methods.rotary import Rotary

rope_utils = pytest.importorskip("transformers.models.llama.modeling_llama")


def tables(rotary: Rotary, positions):
    angles = positions[:, None].float() * torch.tensor(rotary.frequencies)
    angles = torch.cat((angles, angles), -1)
    return (angles.cos() * rotary.scaling)[None], (angles.sin() * rotary.scaling)[None]


@pytest.mark.parametrize("scaling", [1.0, 1.25])
def test_it_is_transformers_own_bit_for_bit_in_fp32(scaling):
    rotary = Rotary(tuple((1 / 10_000 ** (torch.arange(0, 64, 2) / 64)).tolist()), scaling)
    q, k, positions = torch.randn(2, 50, 4, 64), torch.randn(2, 50, 2, 64), torch.randint(0, 1_000_000, (50,))
    cos, sin = tables(rotary, positions)
    want_q, want_k = rope_utils.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    assert torch.equal(rotary.queries(q, positions), want_q.transpose(1, 2))
    assert torch.equal(rotary.keys(k, positions), want_k.transpose(1, 2))


def test_products_depend_on_the_distance_alone():
    rotary = Rotary((1.0, 0.3, 0.01))
    q, k = torch.randn(1, 1, 1, 6, dtype=torch.float64), torch.randn(1, 1, 1, 6, dtype=torch.float64)
    products = [(rotary.queries(q, torch.tensor([i])) * rotary.keys(k, torch.tensor([i - 5]))).sum() for i in (5, 17, 400)]
    assert_close(torch.stack(products), products[0].expand(3), atol=1e-6, rtol=0)


def test_dims_beyond_the_width_are_left_alone():
    x = torch.randn(1, 3, 2, 8)
    turned = Rotary((1.0, 0.5)).keys(x, torch.arange(3))
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert not torch.equal(turned[:, 1:, :, :4], x[:, 1:, :, :4])
    assert torch.equal(turned[:, 0], x[:, 0])


def test_positions_may_differ_in_each_sequence_of_the_batch():
    rotary, x = Rotary((1.0, 0.5)), torch.randn(2, 3, 1, 4)
    positions = torch.tensor([[0, 1, 2], [7, 8, 9]])
    each = [rotary.keys(x[b : b + 1], positions[b]) for b in range(2)]
    assert torch.equal(rotary.keys(x, positions), torch.cat(each))


def test_kept_tables_do_not_answer_for_other_positions_or_dtypes():
    rotary, x = Rotary((1.0, 0.5)), torch.randn(1, 3, 1, 4)
    for positions in (torch.arange(3), torch.arange(3) + 1, torch.arange(3)):
        assert torch.equal(rotary.keys(x, positions), Rotary((1.0, 0.5)).keys(x, positions))
    assert rotary.keys(x.double(), torch.arange(3)).dtype == torch.float64
    assert rotary.keys(x.bfloat16(), torch.arange(3)).dtype == torch.bfloat16


def test_it_is_equal_by_content_and_differentiable():
    assert hash(Rotary((1.0, 0.5))) == hash(Rotary((1.0, 0.5))) and Rotary((1.0,)) != Rotary((2.0,))
    x = torch.randn(1, 3, 1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Rotary((1.0, 0.5)).keys(x, torch.arange(3)), x)


def test_interleaved_pairs_are_products_of_complex_numbers():
    rotary, x, at = Rotary((1.0, 0.3, 0.01), 1.1, interleaved=True), torch.randn(2, 9, 3, 8, dtype=torch.float64), torch.arange(5, 14)
    turns = torch.polar(torch.full((9, 3), 1.1, dtype=torch.float64), at[:, None] * torch.tensor(rotary.frequencies).double())
    want = torch.view_as_real(torch.view_as_complex(x[..., :6].unflatten(-1, (3, 2))) * turns[:, None]).flatten(-2)
    turned = rotary.queries(x, at)
    assert_close(turned, torch.cat((want, x[..., 6:]), -1), atol=1e-6, rtol=0)
    assert_close(rotary.queries_grad(turned, at)[..., :6], 1.1**2 * x[..., :6], atol=1e-9, rtol=1e-9)
    assert torch.equal(turned[..., 6:], x[..., 6:])
