"""Asking: a planted text is read once, every question about it is answered, and what all that took is counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ringctx.runtime.answer import Listener
from ringctx.runtime.engine import Engine
from ringctx.runtime.prompts import common
from ringctx.runtime.talk import share
from ringctx.tools.eval import watch
from ringctx.tools.eval.density import density
from ringctx.tools.eval.planting import Planted, is_number

ANSWER_TOKENS = 8
"""Enough for a space and five digits, however they are split."""


@dataclass(frozen=True)
class Said:
    """answers, are_correct: of each question. cost: the values of a Row's keys from seconds on, by name."""

    answers: list[str]
    are_correct: list[bool]
    prompt_tokens: int
    cost: dict[str, Any]


def ask(engine: Engine, planted: Planted, listener: Listener) -> Said:
    """Read what all prompts share, answer each, compare. All ranks call it together and return the same but for the seconds."""
    prompts = planted.prompts
    longest = max(map(len, prompts))
    with watch.anonymous() as peak:
        if len(prompts) == 1:
            answers, prefill, sent = [engine.complete(prompts[0], listener)], 0.0, 0
        else:
            shared = min(common(prompts[0], prompt) for prompt in prompts[1:])
            reading = engine.read(prompts[0][:shared], listener, room=longest - shared + engine.config.generation.max_new_tokens)
            prefill, sent = reading.seconds, engine.ring.traffic.sent.total()
            answers = [engine.answer(reading, prompt, listener) for prompt in prompts]
    everyone = share(engine.ring, {"anonymous": peak.bytes, "sent": sent}, engine.device, "cost on each rank")
    prefill += sum(answer.seconds.prefill for answer in answers)
    decode = sum(answer.seconds.decode for answer in answers)
    cost = {
        "seconds": prefill + decode,
        "prefill_seconds": prefill,
        "answer_seconds": decode,
        "density": density(engine),
        "bytes": sum(rank["sent"] for rank in everyone) + sum(sum(answer.bytes.values()) for answer in answers),
        "memory": answers[-1].memory,
        "anonymous": [rank["anonymous"] for rank in everyone],
    }
    texts = [answer.answer for answer in answers]
    are_correct = [is_number(text, question.number) for text, question in zip(texts, planted.questions, strict=True)]
    return Said(texts, are_correct, longest, cost)
