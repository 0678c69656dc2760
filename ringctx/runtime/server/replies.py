"""Replies: answers in the form of OpenAI's interface, whole or as pieces of a stream."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from ringctx.runtime.server.desk import Done


def usage(done: Done) -> dict[str, Any]:
    """Tokens of the prompt (those read before are `cached`) and of the answer."""
    assert done.answer is not None
    prompt, completion = done.answer.prompt_tokens, len(done.answer.tokens)
    return {
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": done.num_cached},
    }  # fmt: skip


def event(data: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


@dataclass(frozen=True, kw_only=True)
class Form:
    """The frame of one reply. is_chat: of /v1/chat/completions, else of /v1/completions."""

    model: str
    is_chat: bool
    number: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, done: Done) -> dict[str, Any]:
        """The reply at once."""
        assert done.answer is not None
        text = done.answer.answer
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.is_chat else {"text": text}
        return self._frame([{"index": 0, **said, "logprobs": None, "finish_reason": done.finish}], "") | {"usage": usage(done)}

    def opening(self) -> dict[str, Any] | None:
        """The first piece of a chat: who speaks."""
        return self._piece({"delta": {"role": "assistant", "content": ""}}) if self.is_chat else None

    def piece(self, text: str) -> dict[str, Any]:
        """Some of the text."""
        return self._piece({"delta": {"content": text}} if self.is_chat else {"text": text})

    def ending(self, done: Done) -> dict[str, Any]:
        """The last piece: why it ended."""
        return self._piece({"delta": {}} if self.is_chat else {"text": ""}, done.finish)

    def counted(self, done: Done) -> dict[str, Any]:
        """A piece with no text, after the last: what it took."""
        return self._frame([], ".chunk") | {"usage": usage(done)}

    def _piece(self, said: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return self._frame([{"index": 0, **said, "logprobs": None, "finish_reason": finish}], ".chunk")

    def _frame(self, choices: list[dict[str, Any]], suffix: str) -> dict[str, Any]:
        kind, prefix = (f"chat.completion{suffix}", "chatcmpl") if self.is_chat else ("text_completion", "cmpl")
        return {"id": f"{prefix}-{self.number}", "object": kind, "created": self.created, "model": self.model, "choices": choices}
