"""Share: labels are shifted on whole sequences, documents are found in whatever a collator says, and all of it is cut by one layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from ringctx import Layout
from ringctx.errors import ConfigError, Unsupported
from ringctx.training.share import shared

CPU = torch.device("cpu")
IDS = torch.arange(3, 17).view(2, 7)


def of_all(batch: dict[str, Any], size: int, kind: str = "zigzag") -> list[dict[str, Any]]:
    return [shared(batch, kind, rank, size, CPU) for rank in range(size)]


def whole(parts: list[dict[str, Any]], name: str) -> Tensor:
    layout: Layout = parts[0]["share"].layout
    kept = [part[name][:, : layout.count(rank)] for rank, part in enumerate(parts)]
    return layout.unshard(kept)


@pytest.mark.parametrize("kind", ["zigzag", "contiguous", "striped", "documents"])
@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_every_token_is_followed_by_its_label_wherever_it_lives(size: int, kind: str) -> None:
    parts = of_all({"input_ids": IDS, "labels": IDS}, size, kind)
    assert whole(parts, "input_ids").equal(IDS)
    assert whole(parts, "labels").equal(torch.tensor([[4, 5, 6, 7, 8, 9, -100], [11, 12, 13, 14, 15, 16, -100]]))
    assert whole(parts, "position_ids").equal(torch.arange(7)[None])


def test_a_rank_without_tokens_has_one_without_a_label() -> None:
    parts = of_all({"input_ids": IDS, "labels": IDS}, 9, "contiguous")
    empty = [part for rank, part in enumerate(parts) if not part["share"].layout.count(rank)]
    assert len(empty) == 2
    assert all(part["input_ids"].shape == (2, 1) and bool((part["labels"] == -100).all()) for part in empty)


def test_shifted_labels_are_taken_as_they_are() -> None:
    (part,) = of_all({"input_ids": IDS, "shift_labels": IDS + 50}, 1)
    assert part["labels"].equal(IDS + 50)


def sees(batch: dict[str, Any]) -> Tensor | None:
    """Who shares a document, (b S S), as the share says."""
    (part,) = of_all({"input_ids": IDS, **batch}, 1)
    pattern = part["share"].documents
    if pattern is None:
        return None
    index = torch.arange(7)
    return pattern.allows(index, index).expand(2, 7, 7) if pattern.allows(index, index).dim() == 2 else pattern.allows(index, index)[:, 0]


def of_numbers(*rows: list[int]) -> Tensor:
    numbers = torch.tensor(rows)
    return (numbers[:, :, None] == numbers[:, None, :]).expand(2, 7, 7)


SAME = of_numbers([0, 0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize(
    "batch",
    [
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1]])},
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1]]).expand(2, 7)},
        {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 2, 2]])},
        {"cu_seq_lens_q": torch.tensor([0, 3, 5, 7, 10, 12, 14])},
    ],
    ids=["positions", "positions of each", "seq_idx", "borders"],
)
def test_documents_are_found_in_what_the_collator_says(batch: dict[str, Any]) -> None:
    found = sees(batch)
    assert found is not None
    assert found.equal(SAME)


def test_sequences_may_be_cut_differently() -> None:
    found = sees({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 0, 1]])})
    assert found is not None
    assert found.equal(of_numbers([0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 1, 1]))


def test_padding_is_a_document_of_its_own() -> None:
    found = sees({"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1]])})
    assert found is not None
    assert found.equal(of_numbers([0, 0, 0, 0, 0, 1, 1], [1, 0, 0, 0, 0, 0, 0]))


def test_one_document_without_padding_is_no_pattern() -> None:
    assert sees({"attention_mask": torch.ones(2, 7, dtype=torch.int64), "position_ids": torch.arange(7)[None]}) is None


def test_documents_are_cut_each_by_itself_where_the_layout_says_so() -> None:
    parts = of_all({"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])}, 2, "documents")
    assert parts[0]["share"].layout == Layout.documents([0, 3, 7], 2)


@pytest.mark.parametrize(
    ("batch", "error", "says"),
    [
        ({"input_ids": IDS, "token_type_ids": IDS}, Unsupported, "'token_type_ids'"),
        ({"labels": IDS}, Unsupported, "no input_ids"),
        ({"input_ids": IDS[0]}, ConfigError, r"got \(7,\)"),
        ({"input_ids": IDS[:, :0]}, ConfigError, "a token at least"),
        ({"input_ids": IDS, "labels": IDS[:, :5]}, ConfigError, "give each token one"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 7, 7)}, Unsupported, "Attention"),
    ],
)
def test_what_nobody_could_share_out_is_refused(batch: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        shared(batch, "zigzag", 0, 2, CPU)


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ConfigError, match="a job has zigzag"):
        shared({"input_ids": IDS}, "spiral", 0, 2, CPU)
