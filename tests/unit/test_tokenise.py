"""Tokenising piece by piece gives what one go gives, for every kind of tokenizer."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ringctx.runtime import tokenise as module
from ringctx.runtime.tokenise import tokenise

KJV = gzip.decompress((Path(__file__).parents[2] / "launch" / "documents" / "kjv.txt.gz").read_bytes()).decode()[:60_000]
ODD = "naïve ﬁnd Ⅳ 😀👩‍👩‍👧 中文字\u00a0x\t\n\n  <|end|> É"


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(
        [KJV], trainers.BpeTrainer(vocab_size=800, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    )
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    made.train_from_iterator(
        [KJV], trainers.UnigramTrainer(vocab_size=600, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    )
    made.post_processor = processors.TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 0)])
    return made


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    made.train_from_iterator([KJV], trainers.WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False))
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return made


KINDS = {make.__name__: make for make in (byte_level, unigram, word_piece)}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    made = KINDS[request.param]()
    made.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=made)


def mixed(seed: int, length: int) -> str:
    """Text with oddities strewn in, so that seams fall on them."""
    draw = random.Random(seed)
    parts = []
    while sum(map(len, parts)) < length:
        at = draw.randrange(len(KJV) - 50)
        parts.append(draw.choice([KJV[at : at + draw.randint(1, 50)], draw.choice(ODD), ODD, " " * draw.randint(1, 5)]))
    return "".join(parts)[:length]


@pytest.mark.parametrize("special", [False, True])
def test_pieces_give_what_one_go_gives(tokenizer, monkeypatch, special):
    calls = []
    monkeypatch.setattr(module, "PIECE", 500)
    monkeypatch.setattr(module, "REACH", 200)
    piece = module._piece
    monkeypatch.setattr(module, "_piece", lambda *args: calls.append(args) or piece(*args))
    for seed in range(40):
        text = mixed(seed, 2_000 + 37 * seed)
        whole = tokenizer(text, add_special_tokens=special).input_ids
        calls.clear()
        assert tokenise(tokenizer, text, special=special) == whole
        assert len(calls) == -(-len(text) // 500)  # piece by piece, not in one go after all


def test_a_text_of_several_real_pieces(tokenizer):
    text = KJV * 9
    assert tokenise(tokenizer, text) == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("size", [module.PIECE + module.REACH, module.PIECE + module.REACH + 1, 2 * module.PIECE, 2 * module.PIECE + 1])
def test_lengths_at_which_the_number_of_pieces_changes(tokenizer, size):
    text = (KJV * 8)[:size]
    assert tokenise(tokenizer, text, special=True) == tokenizer(text).input_ids


def test_a_text_that_pieces_cut_differently_is_tokenised_in_one_go(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 500)
    monkeypatch.setattr(module, "REACH", 200)
    text = "ab" * 3_001
    assert tokenise(tokenizer, text) == tokenizer(text, add_special_tokens=False).input_ids
