"""Asking: a planted text is read once, every question about it is answered, and what all that took is counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ringctx.runtime.answer import Listener
from ringctx.runtime.engine import Engine
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
    opening, longest = planted.opening, max(map(len, planted.rests))
    with watch.anonymous() as peak:
        if len(planted.rests) == 1:
            answers = [engine.complete([*opening, *planted.rests[0]], listener, num_read=len(opening))]
            prefill, sent = 0.0, 0
        else:
            reading = engine.read(opening, listener, room=longest + engine.config.generation.max_new_tokens)
            prefill, sent = reading.seconds, engine.ring.traffic.sent.total()
            answers = [engine.answer(reading, prompt, listener) for prompt in planted.prompts]
    everyone = share(engine.world, {"anonymous": peak.bytes, "sent": sent}, engine.device, "cost on each rank")
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
    return Said(texts, are_correct, len(opening) + longest, cost)
