"""Merging partials: associative, commutative, with an identity, and never NaN."""

import pytest
import torch

from ringctx.core.partial import Partial

SHAPE = (2, 5, 3, 4)


def some(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out, lse = (
        torch.randn(SHAPE, generator=generator, dtype=torch.float64),
        5 * torch.randn(SHAPE[:3], generator=generator, dtype=torch.float64),
    )
    return out, lse


def merged(*parts: tuple[torch.Tensor, torch.Tensor]) -> Partial:
    total = Partial.empty(SHAPE, torch.float64, torch.device("cpu"))
    for out, lse in parts:
        total.merge_(out.clone(), lse.clone())
    return total


def close(a: Partial, b: Partial) -> None:
    torch.testing.assert_close(a.out, b.out, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(a.lse, b.lse, rtol=1e-13, atol=1e-13)


def test_merging_is_commutative_and_associative():
    a, b, c = some(1), some(2), some(3)
    close(merged(a, b, c), merged(c, a, b))
    bc = merged(b, c)
    close(merged(a, b, c), merged(a, (bc.out, bc.lse)))


def test_the_empty_partial_is_the_identity():
    a, nothing = some(1), Partial.empty(SHAPE, torch.float64, torch.device("cpu"))
    close(merged(a), Partial(*a))
    close(merged(a, (nothing.out, nothing.lse)), Partial(*a))


def test_rows_that_saw_nothing_stay_zero_and_minus_infinity():
    nothing = Partial.empty(SHAPE, torch.float64, torch.device("cpu"))
    total = merged((nothing.out, nothing.lse), (nothing.out, nothing.lse))
    assert torch.equal(total.out, torch.zeros(SHAPE, dtype=torch.float64))
    assert bool((total.lse == -torch.inf).all())


@pytest.mark.parametrize("far", [1e3, 1e5])
def test_partials_of_very_different_weight_do_not_overflow(far):
    (out, lse), (other, low) = some(1), some(2)
    total = merged((other, low - far), (out, lse + far), (other, low - far))
    close(total, Partial(out, lse + far))


def test_merging_is_softmax_over_all_keys():
    logits, values = torch.randn(2, 5, 3, 7, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    part = lambda keys: (logits[..., keys].softmax(-1) @ values[keys], logits[..., keys].logsumexp(-1))
    close(merged(part(slice(0, 2)), part(slice(2, 3)), part(slice(3, 7))), Partial(logits.softmax(-1) @ values, logits.logsumexp(-1)))


def test_half_precision_parts_are_summed_in_the_accumulation_dtype():
    total = Partial.empty(SHAPE, torch.float32, torch.device("cpu"))
    for seed in range(64):
        out, lse = some(seed)
        total.merge_(out.bfloat16(), lse.float())
    assert total.out.dtype == total.lse.dtype == torch.float32
    exact = merged(*((some(n)[0].bfloat16().double(), some(n)[1]) for n in range(64)))
    torch.testing.assert_close(total.out.double(), exact.out, rtol=1e-5, atol=1e-5)


def test_a_sink_shares_the_denominator_without_a_value():
    out, lse = some(1)
    sink = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    total = merged((out, lse))
    total.add_sink_(sink)
    torch.testing.assert_close(total.lse, torch.logaddexp(lse, sink.expand_as(lse)))
    torch.testing.assert_close(total.out, out * torch.sigmoid(lse - sink).unsqueeze(-1))


def test_merging_into_rows_leaves_the_others_alone():
    out, lse = some(1)
    total = merged((out, lse))
    more, log = some(2)
    total.rows(1, 3).merge_(more[:, 1:3], log[:, 1:3])
    both = merged((out, lse), (more, log))
    assert torch.equal(total.out[:, 3:], out[:, 3:])
    torch.testing.assert_close(total.out[:, 1:3], both.out[:, 1:3])


def test_a_first_part_of_all_rows_is_taken_as_it_is_and_one_of_some_rows_is_not():
    out, lse = some(1)
    whole = Partial.empty(SHAPE, torch.float64, torch.device("cpu"))
    whole.rows(0, 5).merge_(out, lse)
    assert whole.out.data_ptr() == out.data_ptr()
    part = Partial.empty(SHAPE, torch.float64, torch.device("cpu"))
    part.rows(1, 3).merge_(out[:, 1:3], lse[:, 1:3])
    assert torch.equal(part.out[:, 1:3], out[:, 1:3]) and not part.out[:, 3:].any() and part.out.data_ptr() != out.data_ptr()
    assert bool((part.lse[:, :1] == -torch.inf).all())
