"""Engine: a document over the ring, a question, an answer.

document -> tokens -> layout -> ring prefill, keys stay where they are -> decode: the query is everywhere, keys are not.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from ringctx.asked.attention import encoding_of, warn_if_long
from ringctx.asked.layers import layers_of
from ringctx.config import Config, GenerationConfig
from ringctx.core.layout import Layout
from ringctx.core.ring import Ring
from ringctx.device import device_of, dtype_of, keep_freed_memory, peak_memory
from ringctx.errors import ConfigError
from ringctx.huggingface import Context, shards, trained_of, turn, wrap
from ringctx.huggingface.bounds import swings_of
from ringctx.huggingface.weights import checkpoint
from ringctx.methods import extend
from ringctx.runtime.answer import Abandoned, Answer, Folders, Listener, Seconds
from ringctx.runtime.budget import Shape, choose
from ringctx.runtime.cache import KVCache
from ringctx.runtime.evict import Evictor, evictor_of
from ringctx.runtime.prompts import Prompts
from ringctx.runtime.reading import QUESTION_ROOM, Reading
from ringctx.runtime.recall import heads_of, recall
from ringctx.runtime.sampling import Sampler
from ringctx.runtime.snapshot import Snapshot, source_of
from ringctx.runtime.stream import Stream
from ringctx.runtime.talk import broadcast, share

logger = logging.getLogger(__name__)

ABANDONED = -1
"""What rank 0 says in a token's place when nobody listens any more."""


@dataclass
class Engine:
    """A wrapped model with its tokenizer, on this rank.

    evictor: drops keys as `cache.evict` says; None where all are kept.
    trained: what the rotary encoding was trained with where `attention.positions` extends it, else None.
    all_ranks: what the ring is a column of where `model.tensor_parallel` spreads the weights; None where it is all ranks.
    """

    model: Any
    tokenizer: Any
    context: Context
    config: Config
    device: torch.device
    load_seconds: float = 0.0
    trained: extend.Trained | None = None
    attention_seconds: dict[str, float] = field(default_factory=dict)
    evictor: Evictor | None = None
    all_ranks: Ring | None = None

    @classmethod
    def load(cls, config: Config, ring: Ring, *, began: float | None = None) -> Self:
        """Fetch the weights if need be, load them on this rank, or its part of them, and make the model attend over the ring.

        ring: all ranks. began: the `time.perf_counter()` from which loading counts; now by default.
        """
        began = time.perf_counter() if began is None else began
        keep_freed_memory()
        folder = checkpoint(config.model.path)
        from transformers import AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        device = device_of(config.model)
        dtype = dtype_of(config.model, device)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, column = shards.load(folder, ring, config.model.tensor_parallel, dtype=dtype, device=device)
        known = trained_of(model) if config.positions.kind != "none" else None
        asked, swings = layers_of(config.attention, model.config), swings_of(model) if config.cache.evict.bound else ()
        context = wrap(model, column, asked, transport=config.ring.transport, kernel=config.ring.kernel)
        engine = cls(model, tokenizer, context, config, device, time.perf_counter() - began, known, all_ranks=ring)
        engine.evictor = context.evictor = evictor_of(config.cache.evict, engine.num_layers, engine._shape().heads, swings)
        engine.extend(1)  # what this model cannot take is refused now, not after the prompt
        heads_of(config.cache.recall, model)
        logger.info("%s in %s on %s, loaded in %.1f s.", config.model.path, str(dtype).removeprefix("torch."), device, engine.load_seconds)
        return engine

    @property
    def ring(self) -> Ring:
        """The ranks that share the sequence, each with other tokens."""
        return self.context.ring

    @property
    def world(self) -> Ring:
        """All ranks: the ring's, and with `model.tensor_parallel` those that have the same tokens and other heads."""
        return self.ring if self.all_ranks is None else self.all_ranks

    @property
    def num_layers(self) -> int:
        """How many layers attend."""
        return int(self.model.config.num_hidden_layers)

    @property
    def prompts(self) -> Prompts:
        """How documents and questions become tokens."""
        return Prompts(self.tokenizer, self.config.generation.prompt)

    def generate(self, document: str, question: str, listener: Listener | None = None, folders: Folders = Folders()) -> Answer:
        """Prefill over the ring, then decode until the model ends its text, a stop string ends it or `max_new_tokens` are reached.

        All ranks call it together, with the same text, and all return the same answer. folders: of snapshots of the document; any
        number of ranks goes on with what another number saved, and any question may be asked of it.
        """
        began = time.perf_counter()
        prompt, ending = self.prompts.whole(document, question), self.prompts.ending(document, question)
        num_read = len(prompt) - len(ending) if prompt[-len(ending) :] == ending else None
        return self.complete(prompt, listener, folders, num_read=num_read, began=began)

    def complete(
        self,
        prompt: list[int],
        listener: Listener | None = None,
        folders: Folders = Folders(),
        *,
        num_read: int | None = None,
        began: float | None = None,
    ) -> Answer:
        """`generate` after a prompt of tokens; all ranks give the same ones.

        num_read: the first tokens, which are read for themselves and kept in snapshots; all but the last chunk by default.
        began: from which the first token's time counts.
        """
        began = time.perf_counter() if began is None else began
        if num_read is None:
            num_read = 0 if self.config.layout.chunk is None else (len(prompt) - 1) // self.config.layout.chunk * self.config.layout.chunk
        if self.evictor is not None:  # the prompt is read as one: its last queries may lie on both sides of the question's begin
            num_read = 0
        warn_if_long(self.config, getattr(self.model.config, "max_position_embeddings", None), len(prompt))
        room = len(prompt) - num_read + self.config.generation.max_new_tokens
        reading = self.read(prompt[:num_read], listener, folders, room=room)
        return self._answer(reading, prompt, listener, self.config.generation, began, is_new=True)

    @torch.no_grad()
    def read(
        self, tokens: list[int], listener: Listener | None = None, folders: Folders = Folders(), *, room: int | None = None
    ) -> Reading:
        """Prefill these tokens over the ring; their keys stay where they are. All ranks call it together with the same tokens.

        room: how many tokens a question and its answer may take; it sets memory aside and, for positions that stretch with
        the length, says how far.
        """
        listener, began = listener or Listener(), time.perf_counter()
        self.ring.traffic.reset()
        room = QUESTION_ROOM + self.config.generation.max_new_tokens if room is None else room
        layouts = self.chunks(0, len(tokens))
        cache = self.begin(layouts, room)
        reading = Reading(tokens, cache, len(tokens) + room)
        saved, done = self._resume(reading, layouts, folders)
        reading.num_resumed = cache.layout.length
        if layouts[done:]:
            listener.began(len(tokens) - reading.num_resumed, len(layouts) - done)
        whole = torch.tensor(tokens, dtype=torch.int64)
        with self.timed("prefill", listener):
            for layout in layouts[done:]:
                self._go_on(listener)
                self._cache(whole, layout, cache)
                if saved and (layout is layouts[-1] or layout.length - saved.read >= self.config.cache.save_every):
                    saved.save(cache)
        reading.seconds = time.perf_counter() - began
        return reading

    def answer(
        self,
        reading: Reading,
        prompt: list[int],
        listener: Listener | None = None,
        *,
        generation: GenerationConfig | None = None,
        began: float | None = None,
    ) -> Answer:
        """Go on from what was read with the rest of the prompt, then decode; the cache is left as it was found.

        prompt: begins with the reading's tokens and has at least one more. generation: the configuration's by default.
        All ranks call it together and return the same answer. Raises ConfigError when the prompt begins otherwise.
        """
        self.ring.traffic.reset()
        began = time.perf_counter() if began is None else began
        return self._answer(reading, prompt, listener, generation or self.config.generation, began, is_new=False)

    @torch.no_grad()
    def _answer(
        self,
        reading: Reading,
        prompt: list[int],
        listener: Listener | None,
        generation: GenerationConfig,
        began: float,
        *,
        is_new: bool,
    ) -> Answer:
        """`answer`; is_new: the reading was made for this answer alone, so its cost belongs to it."""
        listener, num_read = listener or Listener(), len(reading.tokens)
        if len(prompt) <= num_read or prompt[:num_read] != reading.tokens:
            raise ConfigError(
                f"The prompt of {len(prompt)} tokens does not begin with the {num_read} tokens that were read, or adds none to them; "
                "give it the tokens that were read and the question's after them."
            )
        self.extend(reading.length)
        prefill_began = time.perf_counter()
        with self._going_on(reading, prompt[num_read:], is_new) as (cache, rest):
            logits = self._rest(cache, rest, listener)
            prefill_seconds = time.perf_counter() - prefill_began
            listener.prefilled()
            decode_began = time.perf_counter()
            stream = Stream(self.tokenizer, listener.text, generation.stop)
            tokens, first_at = self._decode(logits, cache, prompt, stream, generation, listener)
            decode_seconds = time.perf_counter() - decode_began
        num_new = len(prompt) - num_read
        if is_new:
            prefill_seconds, num_new = prefill_seconds + reading.seconds, len(prompt) - reading.num_resumed
        seconds = Seconds(load=self.load_seconds, prefill=prefill_seconds, first_token=first_at - began, decode=decode_seconds)
        return self._report(stream.close(), tokens, len(prompt), num_new, seconds)

    @contextmanager
    def _going_on(self, reading: Reading, rest: list[int], is_new: bool) -> Iterator[tuple[KVCache, list[int]]]:
        """The cache that the rest of the prompt goes on from, and what is read then: all that was read, or what the rest recalls of it."""
        if self.config.cache.recall.blocks and reading.tokens:
            with self.context.recalling():
                yield recall(self.config.cache, self.model, self.context, reading.cache, reading.tokens, rest)
            return
        mark = None if is_new and self.evictor is not None else reading.cache.mark()  # a mark would keep what is evicted
        try:
            yield reading.cache, rest
        finally:
            if mark is not None:
                reading.cache.restore(mark)

    def _rest(self, cache: KVCache, rest: list[int], listener: Listener) -> Tensor:
        """Read the rest of a prompt after what the cache holds; the last token's logits (1 1 vocabulary), on every rank."""
        begin = cache.layout.length
        tokens, layouts = torch.tensor([0] * begin + rest), self.chunks(begin, begin + len(rest))
        if self.evictor is not None:
            self.evictor.prompt = range(begin, len(tokens))
        listener.began(len(rest), len(layouts))
        with self.timed("question", listener):
            for layout in layouts[:-1]:
                self._go_on(listener)
                self._cache(tokens, layout, cache)
            self._go_on(listener)
            logits = self._read(tokens, layouts[-1], cache)
        return broadcast(self.ring, logits.contiguous(), layouts[-1].owner(len(tokens) - 1), "the prompt's last logits")

    def _decode(
        self, logits: Tensor, cache: KVCache, prompt: list[int], stream: Stream, generation: GenerationConfig, listener: Listener
    ) -> tuple[list[int], float]:
        """The answer's tokens, and when the first of them was there."""
        chosen_by = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
        sampler = Sampler(**{name: getattr(generation, name) for name in chosen_by}, seen=set(prompt))
        tokens: list[int] = []
        first_at = 0.0
        with self.timed("decode", Listener()):
            while True:
                tokens.append(self._agree(sampler.choose(logits[0, -1]), listener, f"token {len(tokens)} of the answer"))
                first_at = first_at or time.perf_counter()
                sampler.seen.add(tokens[-1])
                stream.push(tokens[-1])
                if stream.is_stopped or tokens[-1] in self.ends() or len(tokens) == generation.max_new_tokens:
                    return tokens, first_at
                logits = self._step(tokens[-1], cache)

    @contextmanager
    def timed(self, phase: str, listener: Listener) -> Iterator[None]:
        """Count the seconds inside attention under this name, and tell the listener of each layer."""
        self.context.after_layer, self.context.seconds = listener.layer, 0.0
        try:
            yield
        finally:
            self.context.after_layer = None
            self.attention_seconds[phase], self.context.seconds = self.context.seconds, 0.0

    def begin(self, layouts: list[Layout], num_new: int) -> KVCache:
        """An empty cache with room for these tokens and num_new after them; positions are set for as many."""
        if self.evictor is not None:
            self.evictor.prompt = None
        ring, config, num_tokens = self.ring, self.config, layouts[-1].length if layouts else 0
        more = -(-num_new // ring.size) + config.cache.page
        rooms = [sum(x.count(rank) for x in layouts) + more for rank in range(ring.size)]
        storage, spill = choose(config.cache, max(rooms), self._shape())
        self.extend(num_tokens + num_new)
        page, keep_rotated = config.cache.page, config.cache.keep_rotated
        return KVCache(self.num_layers, ring.rank, ring.size, page, keep_rotated, rooms[ring.rank], storage, spill)

    def _resume(self, reading: Reading, layouts: list[Layout], folders: Folders) -> tuple[Snapshot | None, int]:
        """The snapshot to save in, and how many chunks were read before; their keys are put in the cache."""
        save, resume = folders.save, folders.resume
        if save is None and resume is None:
            return None, 0
        if self.context.parts > 1:
            raise ConfigError("A snapshot holds all heads of a token; leave --save and --resume out, or set model.tensor_parallel to 1.")
        source = source_of(self.config, self.model, reading.tokens, reading.length, reading.cache.storage)
        old = Snapshot.open(resume, source, self.ring, self.device) if resume is not None else None
        saved, done = None, 0
        if save is not None:
            goes_on = old is not None and save.resolve() == old.folder.resolve()
            saved = old if goes_on else Snapshot.new(save, source, self.ring, self.device)
        if old is not None:
            done = sum(layout.length <= old.read for layout in layouts)
            old.load(reading.cache, layouts[:done])
            logger.info("%d of %d tokens were read before.", reading.cache.layout.length, len(reading.tokens))
        return saved, done

    def chunks(self, begin: int, end: int) -> list[Layout]:
        """Where the tokens begin..end-1 live, chunk by chunk."""
        chunk, make = self.config.layout.chunk or max(end - begin, 1), getattr(Layout, self.config.layout.kind)
        return [make(min(chunk, end - a), self.ring.size).shifted(a) for a in range(begin, end, chunk)]

    def _cache(self, tokens: Tensor, layout: Layout, cache: KVCache) -> None:
        """One chunk through the model as far as its keys, which go to the cache; what comes after the last of them is left out."""
        cache.extend(layout)
        _, inputs = self.inputs(tokens, layout)
        needs = self.evictor is not None, self.config.selects, self.config.carries  # these judge, count or sum the last layer's attention
        with self.context.running(layout, cache) if any(needs) else self.context.caching(layout, cache, self.num_layers - 1):
            self.model.base_model(**inputs, use_cache=False)

    def _read(self, prompt: Tensor, layout: Layout, cache: KVCache) -> Tensor:
        """One chunk through the model; its keys go to the cache. The logits of the chunk's last token, on the rank that owns it."""
        cache.extend(layout)
        indices, inputs = self.inputs(prompt, layout)
        last = (indices == layout.length - 1).nonzero()[:, 0]
        with self.context.running(layout, cache):
            keep = last.to(self.device) if len(last) else 1  # transformers takes 0 for all of them
            logits: Tensor = self.model(**inputs, use_cache=False, logits_to_keep=keep).logits
        return logits

    def inputs(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
        """The indices (s,) of this rank's tokens and what the model takes of them."""
        own = layout.indices(self.ring.rank)
        fed = own if len(own) else torch.zeros(1, dtype=torch.int64)  # transformers takes no empty input; attention leaves it out again
        return own, {"input_ids": tokens[fed].to(self.device)[None], "position_ids": fed.to(self.device)[None]}

    def _shape(self) -> Shape:
        model = self.model.config
        width = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
        return Shape(self.num_layers, shards.key_heads_of(self.model), width, self.model.dtype)

    def extend(self, length: int) -> None:
        """Turn positions as `attention.positions` says for a sequence of this many tokens, the answer's included.

        It is the whole sequence's length, so ranks agree on it, and it holds for prefill and decode alike.
        """
        if self.trained is not None:
            turn(self.model, encoding_of(self.config.positions, self.trained, length))

    def _step(self, token: int, cache: KVCache) -> Tensor:
        """One token more: every rank computes it against its own keys, one of them keeps its key. Logits (1 1 vocabulary)."""
        index = cache.layout.length
        cache.grow()
        with self.context.running(cache=cache, decoding=True):
            ids, position = torch.tensor([[[token]], [[index]]], device=self.device)
            logits: Tensor = self.model(input_ids=ids, position_ids=position, use_cache=False).logits
        return logits

    def _go_on(self, listener: Listener) -> None:
        """Raises Abandoned, on all ranks, if rank 0's listener is gone."""
        self._agree(0, listener, "whether the reading goes on")

    def _agree(self, token: int, listener: Listener, what: str) -> int:
        """Rank 0's token, on all ranks: machines that round differently must not part ways. Abandoned if its listener is gone."""
        token = ABANDONED if self.world.rank == 0 and listener.is_gone() else token
        if self.world.size > 1:
            token = int(broadcast(self.world, torch.tensor([token], device=self.device), 0, what))
        if token == ABANDONED:
            raise Abandoned
        return token

    def ends(self) -> set[int]:
        """The tokens that end a text, as the checkpoint's generation settings or its tokenizer say."""
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        return set(ends) if isinstance(ends, list) else {ends}

    def _report(self, answer: str, tokens: list[int], prompt_tokens: int, num_read: int, seconds: Seconds) -> Answer:
        facts = {"memory": peak_memory(self.device), "sent": dict(self.ring.traffic.sent)}
        everyone = share(self.world, facts, self.device, "memory and traffic of each rank")
        sent: Counter[str] = sum((Counter(rank["sent"]) for rank in everyone), Counter())
        speed = {"prefill": num_read / seconds.prefill, "decode": (len(tokens) - 1) / seconds.decode if len(tokens) > 1 else 0.0}
        return Answer(
            answer=answer, tokens=tokens, prompt_tokens=prompt_tokens, ranks=self.world.size, seconds=seconds,
            tokens_per_second=speed, bytes=dict(sent), memory=[rank["memory"] for rank in everyone],
        )  # fmt: skip
