"""Prompts: a document and a question as the model's tokens, and where the part begins that changes with the question.

Knows the tokenizer and the configured frame. Knows nothing of models or ranks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ringctx.errors import ConfigError
from ringctx.runtime.tokenise import tokenise

TAIL = 2_000
"""Characters of a document's end that are tokenised to learn a prompt's ending: no tokenizer joins tokens over so many."""
OTHERS = ("A", "0", " A", "\nA")
"""Questions that begin differently: the tokens that prompts share with all of them are those of the document."""


@dataclass(frozen=True)
class Prompts:
    """frame: the user's message, with {document} and {question}; the model's chat template goes around it where it has one."""

    tokenizer: Any
    frame: str

    def whole(self, document: str, question: str) -> list[int]:
        """The tokens of the user's message."""
        return self.chat([{"role": "user", "content": self.framed(document, question)}])

    def framed(self, document: str, question: str) -> str:
        """The text of the user's message."""
        parts = {"{document}": document, "{question}": question}
        return re.sub("|".join(parts), lambda found: parts[found[0]], self.frame)

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """The tokens of a conversation, each message with a role and a content, up to where the model speaks next.

        Raises ConfigError for roles or turns that the model's chat template does not take; without a template, one message is the text.
        """
        if self.tokenizer.chat_template is None:
            if len(messages) > 1:
                raise ConfigError(f"The model has no chat template, so it takes one user message, not {len(messages)} messages.")
            return tokenise(self.tokenizer, messages[0]["content"], special=True)
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise ConfigError(f"The model's chat template does not take these messages: {error}.") from error
        return tokenise(self.tokenizer, text)

    def ending(self, document: str, question: str) -> list[int]:
        """The last tokens of `whole`, from the first on that may change with the question. It looks at the document's end alone."""
        tail = document[-TAIL:]
        prompt = self.whole(tail, question)
        return prompt[min(common(prompt, self.whole(tail, other)) for other in OTHERS) :]

    def opening(self, document: str) -> list[int]:
        """The first tokens of `whole`, which are the same for every question: what is read once and asked many times."""
        prompt = self.whole(document, OTHERS[0])
        ending = self.ending(document, OTHERS[0])
        if prompt[len(prompt) - len(ending) :] == ending:
            return prompt[: len(prompt) - len(ending)]
        return prompt[: min(common(prompt, self.whole(document, other)) for other in OTHERS[1:])]


def common(a: list[int], b: list[int]) -> int:
    """How many first tokens two prompts share."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
