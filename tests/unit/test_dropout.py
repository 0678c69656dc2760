"""Counter-based dropout: known answers, the same on every layout, the right share kept."""

from __future__ import annotations

import pytest
import torch

from ringctx.core import dropout
from ringctx.core.dropout import keep, philox
from ringctx.errors import ConfigError


@pytest.mark.parametrize(
    "counter, key, want",
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_answers(counter, key, want):
    """The known-answer vectors of Random123 for Philox4x32-10."""
    words = philox(tuple(torch.tensor([int(word, 16)]) for word in counter.split()), tuple(int(word, 16) for word in key.split()))
    assert [f"{int(word):08x}" for word in words] == want.split()


def test_a_pairs_word_is_philox_of_its_own_numbers():
    """counter (j // 4, i, head, batch), key the seed's halves, word j % 4; kept at or above p 2^32."""
    seed, p = 0x123456789ABCDEF0, 0.3
    got = keep(p, seed, torch.tensor([7]), torch.tensor([3]), torch.tensor([1000]), torch.arange(90, 110))
    for n, j in enumerate(range(90, 110)):
        counter = tuple(torch.tensor([x]) for x in (j // 4, 1000, 3, 7))
        word = int(philox(counter, (0x9ABCDEF0, 0x12345678))[j % 4])
        assert bool(got[0, 0, 0, n]) == (word >= p * 2**32)


BATCH, HEADS, LENGTH = torch.arange(3), torch.arange(5), torch.arange(43)


@pytest.mark.parametrize("chunk", [7, 1 << 16])
def test_any_subset_of_indices_is_a_slice_of_the_whole(monkeypatch, chunk):
    whole = keep(0.4, 11, BATCH, HEADS, LENGTH, LENGTH)
    monkeypatch.setattr(dropout, "_CHUNK", chunk)
    subsets = [LENGTH[::3], LENGTH[1:2], LENGTH[17:40], torch.tensor([42, 0, 3, 3, 41])]
    for i in subsets:
        for j in subsets:
            heads, batch = torch.tensor([4, 1]), torch.tensor([2])
            assert torch.equal(keep(0.4, 11, batch, heads, i, j), whole[batch][:, heads][:, :, i][..., j])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_kept_is_one_minus_p_everywhere(p):
    """A seeded draw of 480,000: within five standard deviations as a whole, by head, by place in the word, and between seeds."""
    got = keep(p, 5, torch.arange(2), torch.arange(4), torch.arange(200), torch.arange(300))
    assert set(got.unique().tolist()) == {0.0, float(torch.tensor(1.0 / (1.0 - p)))}
    other = keep(p, 6, torch.arange(2), torch.arange(4), torch.arange(200), torch.arange(300))
    kept = (got > 0).double()
    slices = [kept, *kept.unbind(1), *kept.unbind(0), *(kept[..., n::4] for n in range(4))]
    for part in slices:
        assert abs(float(part.mean()) - (1 - p)) < 5 * (p * (1 - p) / part.numel()) ** 0.5
    centred = kept - (1 - p)
    neighbours = [
        (centred[..., 1:] * centred[..., :-1], "keys"),
        (centred[:, :, 1:] * centred[:, :, :-1], "queries"),
        (centred[:, 1:] * centred[:, :-1], "heads"),
        (centred[1:] * centred[:-1], "batches"),
        (centred * ((other > 0).double() - (1 - p)), "seeds"),
    ]
    for product, what in neighbours:
        assert abs(float(product.mean())) < 5 * p * (1 - p) / product.numel() ** 0.5, what


def test_all_64_bits_of_the_seed_and_negative_seeds_count():
    draws = [keep(0.5, seed, *(torch.arange(n) for n in (1, 1, 8, 64))) for seed in (0, 1, 1 << 32, 1 << 63, -1)]
    for n, one in enumerate(draws):
        assert not any(torch.equal(one, other) for other in draws[:n])
    assert torch.equal(
        keep(0.5, -1, *(torch.arange(n) for n in (1, 1, 8, 64))), keep(0.5, 2**64 - 1, *(torch.arange(n) for n in (1, 1, 8, 64)))
    )


def test_indices_beyond_two_to_the_31_are_told_apart():
    near, far = torch.arange(64), torch.arange(64) + 3_000_000_000
    zero = torch.zeros(1, dtype=torch.long)
    assert not torch.equal(keep(0.5, 1, zero, zero, near, near), keep(0.5, 1, zero, zero, far, near))


def test_no_dropout_and_no_tokens():
    assert torch.equal(keep(0.0, 1, BATCH, HEADS, LENGTH, LENGTH), torch.ones(3, 5, 43, 43))
    assert keep(0.5, 1, BATCH, HEADS, LENGTH[:0], LENGTH).shape == (3, 5, 0, 43)
    assert keep(0.5, 1, BATCH, HEADS, LENGTH, LENGTH[:0]).shape == (3, 5, 43, 0)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_a_probability_that_is_none_is_refused(p):
    with pytest.raises(ConfigError, match="at least 0 and less than 1"):
        keep(p, 1, BATCH, HEADS, LENGTH, LENGTH)
