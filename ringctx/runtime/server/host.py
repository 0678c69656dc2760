"""Host: all ranks perform one order after another. Rank 0 makes orders out of jobs; the others wait for its word.

Every order ends with a word from every rank, so a rank that fared otherwise than the others is noticed at once.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from ringctx.config import GenerationConfig, ServerConfig
from ringctx.core.ring import Ring
from ringctx.errors import ConfigError, LayoutError, RanksDisagree, Unsupported
from ringctx.runtime.answer import Abandoned, Answer, Listener
from ringctx.runtime.prompts import TAIL, Prompts
from ringctx.runtime.server.bodies import Ask, unknown_document
from ringctx.runtime.server.desk import Desk, Done, Forget, Job, Read, Text, stopping
from ringctx.runtime.server.refusal import Refusal, malformed
from ringctx.runtime.talk import share, tell
from ringctx.runtime.tokenise import tokenise

logger = logging.getLogger(__name__)

BEAT = 10.0
"""Seconds after which rank 0 says that there is nothing to do, or a third of the ring's deadline if that is less."""
REFUSED = (ConfigError, LayoutError, Unsupported)
LEAVE, REST = "leave", "rest"


class Reading(Protocol):
    """What was read."""

    tokens: list[int]
    length: int


class Reader(Protocol):
    """What the server needs of an engine."""

    device: torch.device
    tokenizer: Any

    @property
    def ring(self) -> Ring:
        """The ranks."""

    @property
    def prompts(self) -> Prompts:
        """How text becomes tokens."""

    def read(self, tokens: list[int], listener: Listener | None = None, *, room: int | None = None) -> Any:
        """A Reading of these tokens."""

    def answer(self, reading: Any, prompt: list[int], listener: Listener | None = None, *, generation: GenerationConfig) -> Answer:
        """Go on from a reading."""

    def ends(self) -> set[int]:
        """The tokens that end a text."""


@dataclass(frozen=True)
class Opening:
    """A document as the beginning of prompts. tokens: all of it. tail: the part of its text that a question is tokenised with, and
    shared: the first tokens of such a prompt, in whose place `tokens` stand.
    """

    tokens: list[int]
    tail: str
    shared: list[int]

    @classmethod
    def of(cls, prompts: Prompts, text: str) -> Opening:
        """It looks at the whole text twice, so that no question has to."""
        tokens, whole = prompts.opening(text), prompts.whole(text, "A")
        for tail in (text[-TAIL:], text):
            shared = prompts.opening(tail)
            if prompts.whole(tail, "A")[len(shared) :] == whole[len(tokens) :]:
                break
        return cls(tokens, tail, shared)

    def prompt(self, prompts: Prompts, messages: tuple[dict[str, str], ...]) -> list[int]:
        """The tokens of a conversation about the document, which stands before the first question. Raises Refusal (400)."""
        if messages[0]["role"] != "user":
            raise malformed("With a document, messages begin with the user's question; say there what a system message would.", "messages")
        first = {"role": "user", "content": prompts.framed(self.tail, messages[0]["content"])}
        asked = prompts.chat([first, *messages[1:]])
        if asked[: len(self.shared)] != self.shared or len(asked) == len(self.shared):
            raise malformed("The question joins the document's last token; begin it with a space or another word.", "messages")
        return self.tokens + asked[len(self.shared) :]


@dataclass
class Host:
    """An engine and the documents it has read, on this rank. openings: on rank 0 alone."""

    engine: Reader
    config: ServerConfig
    readings: dict[str, Any] = field(default_factory=dict)
    openings: dict[str, Opening] = field(default_factory=dict)

    def follow(self) -> None:
        """On ranks other than 0: do what rank 0 says until it says to leave."""
        while (order := self._tell(None))["do"] != LEAVE:
            self._perform(order, Listener())

    def lead(self, desk: Desk) -> None:
        """On rank 0: take jobs from the desk, in the order in which they came, until it is told to stop; then all ranks leave."""
        beat = min(BEAT, self.engine.ring.timeout / 3)
        while not desk.is_stopping:
            job = desk.get(beat)
            if job is None:
                self._tell({"do": REST})
                continue
            began, desk.is_working = time.monotonic(), True
            try:
                job.tell(self._work(job, desk))
            finally:
                desk.is_working = False
            desk.took(time.monotonic() - began)
        self._tell({"do": LEAVE})

    def _work(self, job: Job, desk: Desk) -> Done | Refusal:
        """One job on all ranks, and how it ended."""
        listener = Listener(text=lambda piece: job.tell(Text(piece)), is_gone=lambda: job.is_gone or desk.is_stopping)
        try:
            order = self._order(job.work)
            answer = self._perform(self._tell(order), listener)
        except Abandoned:
            return stopping()  # to whoever still listens
        except Refusal as refusal:
            return refusal
        except REFUSED as error:
            return Refusal(400, "refused", str(error))
        if isinstance(job.work, Ask):
            assert answer is not None
            cached = len(self.readings[order["document"]].tokens) if order["document"] else 0
            return Done(answer, self._finish(answer, job.work.generation), cached)
        return Done(num_tokens=len(order.get("tokens", ())))

    def _order(self, work: Ask | Read | Forget) -> dict[str, Any]:
        """The job as all ranks are told it. Raises Refusal for what can be seen to be wrong beforehand."""
        if isinstance(work, Forget):
            self.openings.pop(work.document, None)
            return {"do": "forget", "document": work.document}
        if isinstance(work, Read):
            return self._reading(work)
        prompt, generation = self._prompt(work), asdict(work.generation)
        if not prompt:
            raise malformed("The prompt has no tokens.")
        if work.document is None and len(prompt) > self.config.document_tokens:
            most = self.config.document_tokens
            raise Refusal(
                413, "prompt_too_large", f"The prompt has {len(prompt)} tokens; at most {most} are taken (server.document_tokens)."
            )
        if work.document is not None and len(prompt) + work.generation.max_new_tokens > self.readings[work.document].length:
            room = self.readings[work.document].length - len(self.readings[work.document].tokens)
            raise malformed(
                f"The question and max_tokens take more than the {room} tokens kept for them after each document; "
                "ask for less, or raise server.question_tokens.", "messages",
            )  # fmt: skip
        return {"do": "answer", "document": work.document, "prompt": prompt, "generation": generation}

    def _reading(self, work: Read) -> dict[str, Any]:
        opening = Opening.of(self.engine.prompts, work.text)
        held = sum(len(one.tokens) for one in self.openings.values())
        if held + len(opening.tokens) > self.config.document_tokens:
            raise Refusal(
                413, "document_too_large",
                f"The document takes {len(opening.tokens)} tokens, but of the {self.config.document_tokens} for all documents "
                f"{self.config.document_tokens - held} are left; delete one, or send less.",
            )  # fmt: skip
        self.openings[work.document] = opening
        return {"do": "read", "document": work.document, "tokens": opening.tokens}

    def _prompt(self, ask: Ask) -> list[int]:
        prompts = self.engine.prompts
        if ask.document is not None:
            if ask.document not in self.readings:
                raise unknown_document(ask.document)
            return self.openings[ask.document].prompt(prompts, ask.messages)
        if ask.messages:
            return prompts.chat(list(ask.messages))
        if isinstance(ask.prompt, str):
            return tokenise(self.engine.tokenizer, ask.prompt, special=True)
        size = len(self.engine.tokenizer)
        if not all(0 <= token < size for token in ask.prompt):
            raise malformed(f"prompt has tokens that the model does not know; they go from 0 to {size - 1}.", "prompt")
        return list(ask.prompt)

    def _finish(self, answer: Answer, generation: GenerationConfig) -> str:
        """length when max_tokens ended the answer, else stop."""
        text = self.engine.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        is_ended = answer.tokens[-1] in self.engine.ends() or any(stop in text for stop in generation.stop)
        return "stop" if is_ended or len(answer.tokens) < generation.max_new_tokens else "length"

    def _tell(self, order: dict[str, Any] | None) -> dict[str, Any]:
        told: dict[str, Any] = tell(self.engine.ring, order, self.engine.device, "the next order")
        return told

    def _perform(self, order: dict[str, Any], listener: Listener) -> Answer | None:
        """What every rank does. On rank 0 a refusal or Abandoned goes on to the caller; the others wait for the next order."""
        answer, error = None, None
        try:
            answer = self._do(order, listener)
        except (Abandoned, *REFUSED) as raised:
            error = raised
            if order["do"] == "read":
                self.openings.pop(order["document"], None)
        if order["do"] != REST:
            how = None if error is None else type(error).__name__
            everyone = share(self.engine.ring, how, self.engine.device, "how the order ended")
            if len(set(everyone)) > 1:
                raise RanksDisagree(f"An order ended differently on the ranks: {everyone}; start them again.") from error
        if error is not None and self.engine.ring.rank == 0:
            raise error
        return answer

    def _do(self, order: dict[str, Any], listener: Listener) -> Answer | None:
        engine, document = self.engine, order.get("document")
        if order["do"] == "read":
            room = self.config.question_tokens + self.config.max_tokens
            self.readings[document] = engine.read(order["tokens"], listener, room=room)  # type: ignore[index]
        elif order["do"] == "forget":
            self.readings.pop(document, None)  # type: ignore[arg-type]
        elif order["do"] == "answer":
            generation = GenerationConfig(**order["generation"] | {"stop": tuple(order["generation"]["stop"])})
            prompt = order["prompt"]
            reading = self.readings[document] if document else engine.read([], room=len(prompt) + generation.max_new_tokens)
            return engine.answer(reading, prompt, listener, generation=generation)
        return None
