"""A double of the engine for the server's tests: a token is a byte, and the answer to a prompt is known beforehand."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from ringctx.config import GenerationConfig
from ringctx.core.ring import Ring
from ringctx.errors import Unsupported
from ringctx.runtime.answer import Abandoned, Answer, Listener, Seconds
from ringctx.runtime.prompts import Prompts
from ringctx.runtime.stream import Stream

END = 0


class Tokenizer:
    """Bytes; a message is its role's first letter, its content and a line's end."""

    chat_template = "there is one"
    is_fast = False

    def __call__(self, text: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=list(text.encode()))

    def __len__(self) -> int:
        return 256

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "".join(f"{m['role'][0]}{m['content']}\n" for m in messages) + "a"

    def decode(self, tokens: list[int], **_: Any) -> str:
        return bytes(token for token in tokens if token != END).decode(errors="replace")


def said(prompt: str) -> str:
    """The answer: the prompt's letters from behind, with what makes it unlike any other prompt's."""
    return prompt.strip()[::-1] + f"<{len(prompt)}>"


@dataclass
class FakeEngine:
    """documents: every one that was read. asked, abandoned: prompts. A prompt with "wait" in it waits until `go` is set;
    with "second" too, its first token comes before."""

    ring: Ring = field(default_factory=Ring.alone)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    documents: list[list[int]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    abandoned: list[str] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)
    generation: GenerationConfig | None = None

    @property
    def prompts(self) -> Prompts:
        return Prompts(self.tokenizer, "{document}|{question}")

    def ends(self) -> set[int]:
        return {END}

    def read(self, tokens: list[int], listener: Listener | None = None, *, room: int | None = None) -> Any:
        if b"wait" in bytes(tokens):  # one chunk, in which nobody asks whether it goes on
            assert self.go.wait(10)
        self.documents += [tokens] if tokens else []
        return SimpleNamespace(tokens=tokens, length=len(tokens) + (room or 0))

    def answer(self, reading: Any, prompt: list[int], listener: Listener | None = None, *, generation: GenerationConfig) -> Answer:
        listener = listener or Listener()
        text, self.generation = bytes(prompt).decode(), generation
        assert prompt[: len(reading.tokens)] == reading.tokens
        self.asked.append(text)
        if "refuse me" in text:
            raise Unsupported("The engine does not take this.")
        stream, tokens = Stream(self.tokenizer, listener.text, generation.stop), []
        for token in [*said(text).encode(), END][: generation.max_new_tokens]:
            while "wait" in text and (tokens or "second" not in text) and not self.go.wait(0.005):
                if listener.is_gone():
                    self.abandoned.append(text)
                    raise Abandoned
            if stream.is_stopped:
                break
            tokens.append(token)
            stream.push(token)
        seconds = Seconds(load=0.0, prefill=0.0, first_token=0.0, decode=0.0)
        text = stream.close()
        return Answer(
            answer=text, tokens=tokens, prompt_tokens=len(prompt), ranks=1, seconds=seconds, tokens_per_second={}, bytes={}, memory=[]
        )  # fmt: skip
