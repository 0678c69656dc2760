"""Text to learn from: the sources of Python's standard library and the King James Bible, with a held-out part that never changes.

Every HELD_OUT-th document (a module; a stretch of the book) is held out, by its place in the list. The tokenizer is trained on the
others alone. Knows files and tokenizers. Knows nothing of models or ranks.
"""

from __future__ import annotations

import gzip
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from ringctx.errors import ConfigError

HELD_OUT = 20
STRETCH = 20_000
"""Characters of the book that count as a document."""
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "lib2to3", "idlelib", "__pycache__"}
BOOK = Path("launch") / "documents" / "kjv.txt.gz"
END = "<|end|>"


@dataclass(frozen=True)
class Corpus:
    """tokens to train on and held-out tokens, each one long line (n,) with END after each document, and what made them."""

    train: Tensor
    held_out: Tensor
    tokenizer: Any


def documents(book: Path) -> list[str]:
    """All documents, in an order that is the same wherever the same Python is installed."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path.relative_to(library) for path in library.rglob("*.py") if not LEFT_OUT & set(path.relative_to(library).parts))
    modules = [(library / path).read_text(encoding="utf-8", errors="replace") for path in files]
    try:
        text = gzip.decompress(book.read_bytes()).decode()
    except OSError as error:
        raise ConfigError(f"The book {str(book)!r} cannot be read ({error.strerror}); run ringctx where the repository lies.") from error
    return [one for one in (*modules, *(text[a : a + STRETCH] for a in range(0, len(text), STRETCH))) if one.strip()]


def corpus(folder: Path, vocabulary: int, book: Path = BOOK) -> Corpus:
    """The corpus, made in the folder by whoever comes first, with a tokenizer of so many tokens; all ranks see the same folder."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    made = folder / f"text-{vocabulary}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "text.lock"):
        if not (made / "tokens.safetensors").is_file():
            texts = documents(book)
            tokenizer = _tokenizer([t for n, t in enumerate(texts) if n % HELD_OUT], vocabulary)
            tokenizer.save_pretrained(made)
            both = corpus_by(tokenizer, book)
            save_file({"train": both.train.int(), "held_out": both.held_out.int()}, made / "draft")
            (made / "draft").replace(made / "tokens.safetensors")
    found = load_file(made / "tokens.safetensors")
    return Corpus(found["train"].long(), found["held_out"].long(), AutoTokenizer.from_pretrained(made, local_files_only=True))


def corpus_by(tokenizer: Any, book: Path = BOOK) -> Corpus:
    """The corpus in the tokens of a model that is there already."""
    texts = documents(book)
    parts = ([t for n, t in enumerate(texts) if n % HELD_OUT], texts[::HELD_OUT])
    train, held_out = (_line(tokenizer, some, tokenizer.eos_token_id).long() for some in parts)
    return Corpus(train, held_out, tokenizer)


def _tokenizer(texts: list[str], vocabulary: int) -> Any:
    """Byte pairs (Sennrich et al. 2016, arXiv 1508.07909), trained on these texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)


def _line(tokenizer: Any, texts: list[str], end: int) -> Tensor:
    """The tokens of all texts, with `end` after each."""
    lines = [[*ids, end] for ids in tokenizer(texts, verbose=False).input_ids]
    return torch.tensor([token for line in lines for token in line], dtype=torch.int32)


def windows(tokens: Tensor, count: int, length: int, seed: int | None) -> Tensor:
    """(count length): windows that begin anywhere, drawn by the seed; with None the first ones, side by side."""
    if len(tokens) < length:
        raise ConfigError(f"The text has {len(tokens)} tokens, and a window {length}; set training.context lower.")
    if seed is None:
        begins = torch.arange(min(count, len(tokens) // length)) * length
    else:
        begins = torch.randint(len(tokens) - length + 1, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([tokens[a : a + length] for a in begins.tolist()])
