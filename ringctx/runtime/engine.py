"""Engine: a document over the ring, a question, an answer.

document -> tokens -> layout -> ring prefill, keys stay where they are -> decode: the query is everywhere, keys are not.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ringctx.config import AttentionConfig, Config, PositionsConfig
from ringctx.core.attention import Attention
from ringctx.core.layout import Layout
from ringctx.core.ring import Ring
from ringctx.errors import ConfigError
from ringctx.huggingface import Context, shards, trained_of, turn, wrap
from ringctx.methods import extend
from ringctx.methods.rotary import Rotary
from ringctx.patterns import causal, sinks, window
from ringctx.runtime.budget import Shape, choose
from ringctx.runtime.cache import KVCache
from ringctx.runtime.device import device_of, dtype_of, peak_memory
from ringctx.runtime.sampling import Sampler
from ringctx.runtime.snapshot import Snapshot, source_of
from ringctx.runtime.stream import Stream
from ringctx.runtime.talk import broadcast, share
from ringctx.runtime.weights import checkpoint

logger = logging.getLogger(__name__)

LOGIT_ROWS = 256
"""Tokens whose logits exist at once while losses are counted: 50 MB in fp32 for a vocabulary of 49,152."""


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Where the time went. first_token counts from the document's text to the first token."""

    load: float
    prefill: float
    first_token: float
    decode: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What `ringctx generate --json` prints; the keys are pinned by a test.

    tokens: the answer's token ids, those of the stop string or the end of text included. bytes: sent by all ranks, by kind.
    memory: peak bytes of each rank.
    """

    answer: str
    tokens: list[int]
    prompt_tokens: int
    ranks: int
    seconds: Seconds
    tokens_per_second: dict[str, float]
    bytes: dict[str, int]
    memory: list[int]

    def json(self) -> dict[str, Any]:
        """As plain lists and mappings."""
        return asdict(self)


def _nothing(*_: Any) -> None:
    pass


@dataclass(kw_only=True)
class Listener:
    """Who wants to know how it goes: `began(prompt tokens, chunks)`, `layer(number)` during prefill, `text(piece)` of the answer."""

    began: Callable[[int, int], None] = _nothing
    layer: Callable[[int], None] = _nothing
    prefilled: Callable[[], None] = _nothing
    text: Callable[[str], None] = _nothing


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Where what is read is kept while it is read (save), and where what was read before lies (resume); they may be the same."""

    save: Path | None = None
    resume: Path | None = None


@dataclass
class Engine:
    """A wrapped model with its tokenizer, on this rank.

    trained: what the rotary encoding was trained with where `attention.positions` extends it, else None.
    all_ranks: what the ring is a column of where `model.tensor_parallel` spreads the weights; None where it is all ranks.
    num_resumed: tokens of the latest prompt that a snapshot held, so that they were not read.
    """

    model: Any
    tokenizer: Any
    context: Context
    config: Config
    device: torch.device
    load_seconds: float = 0.0
    trained: extend.Trained | None = None
    attention_seconds: dict[str, float] = field(default_factory=dict)
    num_resumed: int = 0
    all_ranks: Ring | None = None

    @classmethod
    def load(cls, config: Config, ring: Ring, *, began: float | None = None) -> Self:
        """Fetch the weights if need be, load them on this rank, or its part of them, and make the model attend over the ring.

        ring: all ranks. began: the `time.perf_counter()` from which loading counts; now by default.
        """
        began = time.perf_counter() if began is None else began
        folder = checkpoint(config.model.path)
        from transformers import AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        device = device_of(config.model)
        dtype = dtype_of(config.model, device)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, column = shards.load(folder, ring, config.model.tensor_parallel, dtype=dtype, device=device)
        known = trained_of(model) if config.attention.positions.kind != "none" else None
        context = wrap(model, column, attention_of(config.attention), transport=config.ring.transport, kernel=config.ring.kernel)
        engine = cls(model, tokenizer, context, config, device, time.perf_counter() - began, known, all_ranks=ring)
        engine._extend(1)  # what this model cannot take is refused now, not after the prompt
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

    def prompt(self, document: str, question: str) -> list[int]:
        """The tokens of the user's message, with the model's chat template around it where it has one."""
        parts = {"{document}": document, "{question}": question}
        text = re.sub("|".join(parts), lambda found: parts[found[0]], self.config.generation.prompt)
        if self.tokenizer.chat_template is None:
            return list(self.tokenizer(text).input_ids)
        messages = [{"role": "user", "content": text}]
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])

    def generate(self, document: str, question: str, listener: Listener | None = None, folders: Folders = Folders()) -> Answer:
        """Prefill over the ring, then decode until the model ends its text, a stop string ends it or `max_new_tokens` are reached.

        All ranks call it together, with the same text, and all return the same answer. folders: of snapshots; any number of
        ranks goes on with what another number saved.
        """
        began = time.perf_counter()
        return self.complete(self.prompt(document, question), listener, folders, began=began)

    @torch.no_grad()
    def complete(
        self, prompt: list[int], listener: Listener | None = None, folders: Folders = Folders(), *, began: float | None = None
    ) -> Answer:
        """`generate` after a prompt of tokens; all ranks give the same ones. began: from which the first token's time counts."""
        listener = listener or Listener()
        began = time.perf_counter() if began is None else began
        self.ring.traffic.reset()
        self._warn_if_long(len(prompt))
        chosen_by = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
        sampler = Sampler(**{name: getattr(self.config.generation, name) for name in chosen_by}, seen=set(prompt))
        stream = Stream(self.tokenizer, listener.text, self.config.generation.stop)
        prefill_began = time.perf_counter()
        cache, logits = self._prefill(prompt, listener, folders)
        prefill_seconds = time.perf_counter() - prefill_began
        listener.prefilled()
        first_token_seconds, decode_began = 0.0, time.perf_counter()
        tokens: list[int] = []
        while True:
            tokens.append(self._agree(sampler.choose(logits[0, -1]), f"token {len(tokens)} of the answer"))
            first_token_seconds = first_token_seconds or time.perf_counter() - began
            sampler.seen.add(tokens[-1])
            stream.push(tokens[-1])
            if stream.is_stopped or tokens[-1] in self._ends() or len(tokens) == self.config.generation.max_new_tokens:
                break
            logits = self._step(tokens[-1], cache)
        seconds = Seconds(
            load=self.load_seconds, prefill=prefill_seconds, first_token=first_token_seconds, decode=time.perf_counter() - decode_began
        )
        return self._report(stream.close(), tokens, len(prompt), seconds)

    def _prefill(self, prompt: list[int], listener: Listener, folders: Folders = Folders()) -> tuple[KVCache, Tensor]:
        """The cache with this rank's share of the prompt, and the last token's logits (1 1 vocabulary) on every rank."""
        layouts = self._chunks(len(prompt))
        cache = self._begin(layouts, self.config.generation.max_new_tokens)
        saved, done = self._resume(prompt, layouts, cache, folders)
        self.num_resumed = cache.layout.length
        listener.began(len(prompt) - self.num_resumed, len(layouts) - done)
        self.context.after_layer, self.context.seconds = listener.layer, 0.0
        for layout in layouts[done:]:
            logits = self._read(torch.tensor(prompt), layout, cache)
            if saved and (layout is layouts[-1] or layout.length - saved.read >= self.config.cache.save_every):
                saved.save(cache)
        self.context.after_layer = None
        self.attention_seconds["prefill"], self.context.seconds = self.context.seconds, 0.0
        return cache, broadcast(self.ring, logits.contiguous(), layouts[-1].owner(len(prompt) - 1), "the prompt's last logits")

    @torch.no_grad()
    def losses(self, tokens: list[int], listener: Listener | None = None) -> tuple[Tensor, Tensor]:
        """How well each of this rank's tokens i predicts token i + 1, which may live on another rank.

        Returns their indices (s,) int64 and -log p of what follows them (s,) float32, both on the engine's device; the
        sequence's last token is left out. All ranks call it together, with the same tokens, of which there are at least 2.
        """
        layouts = self._chunks(len(tokens))
        cache, listener = self._begin(layouts, 0), listener or Listener()
        listener.began(len(tokens), len(layouts))
        self.context.after_layer, self.context.seconds = listener.layer, 0.0
        whole = torch.tensor(tokens)
        parts = [self._losses(whole, layout, cache) for layout in layouts]
        self.context.after_layer = None
        indices, losses = zip(*parts, strict=True)
        return torch.cat(indices), torch.cat(losses)

    def _losses(self, tokens: Tensor, layout: Layout, cache: KVCache) -> tuple[Tensor, Tensor]:
        """One chunk of `losses`. Labels are shifted on the whole sequence, and logits exist for LOGIT_ROWS tokens at a time."""
        cache.extend(layout)
        indices, inputs = self._inputs(tokens, layout)
        with self.context.running(layout, cache):
            hidden = self.model.base_model(**inputs, use_cache=False)
            indices = indices[indices + 1 < len(tokens)]  # only the sequence's last token drops out, and it lies last
            labels = tokens[indices + 1].to(self.device)
            losses = [labels.new_empty(0, dtype=torch.float32)]
            for a in range(0, len(labels), LOGIT_ROWS):
                logits = self._logits(hidden, slice(a, min(a + LOGIT_ROWS, len(labels))))
                losses.append(cross_entropy(logits.float(), labels[a : a + LOGIT_ROWS], reduction="none"))
        return indices.to(self.device), torch.cat(losses)

    def _logits(self, hidden: Any, rows: slice) -> Tensor:
        """The logits (n vocabulary) of some rows of the body's output, by the model's own code: some cap or scale them."""
        body, part = self.model.base_model, type(hidden)(last_hidden_state=hidden.last_hidden_state[:, rows])
        body.forward = lambda *_, **__: part
        try:
            logits: Tensor = self.model(inputs_embeds=part.last_hidden_state, use_cache=False).logits
        finally:
            del body.forward
        return logits[0]

    def _begin(self, layouts: list[Layout], num_new: int) -> KVCache:
        """An empty cache with room for these tokens and num_new after them; positions are set for as many."""
        ring, config, num_tokens = self.ring, self.config, layouts[-1].length
        more = -(-num_new // ring.size) + config.cache.page
        rooms = [sum(x.count(rank) for x in layouts) + more for rank in range(ring.size)]
        storage, spill = choose(config.cache, max(rooms), self._shape())
        self._extend(num_tokens + num_new)
        page, keep_rotated = config.cache.page, config.cache.keep_rotated
        return KVCache(self.num_layers, ring.rank, ring.size, page, keep_rotated, rooms[ring.rank], storage, spill)

    def _resume(self, prompt: list[int], layouts: list[Layout], cache: KVCache, folders: Folders) -> tuple[Snapshot | None, int]:
        """The snapshot to save in, and how many chunks were read before; their keys are put in the cache.

        The last chunk is read again even when it was saved, because the prompt's last logits come out of it.
        """
        save, resume = folders.save, folders.resume
        if save is None and resume is None:
            return None, 0
        if self.context.parts > 1:
            raise ConfigError("A snapshot holds all heads of a token; leave --save and --resume out, or set model.tensor_parallel to 1.")
        if len(layouts) == 1:
            logger.warning("The prompt is one chunk, so a resumed run reads all of it again; set layout.chunk to read it in several.")
        source = source_of(self.config, self.model, prompt, cache.storage)
        old = Snapshot.open(resume, source, self.ring, self.device) if resume is not None else None
        saved, done = None, 0
        if save is not None:
            goes_on = old is not None and save.resolve() == old.folder.resolve()
            saved = old if goes_on else Snapshot.new(save, source, self.ring, self.device)
        if old is not None:
            done = sum(layout.length <= old.read for layout in layouts[:-1])
            old.load(cache, layouts[:done])
            logger.info("%d of %d tokens were read before.", cache.layout.length, len(prompt))
        return saved, done

    def _chunks(self, num_tokens: int) -> list[Layout]:
        """Where the tokens of each chunk live."""
        chunk, make = self.config.layout.chunk or num_tokens, getattr(Layout, self.config.layout.kind)
        return [make(min(chunk, num_tokens - a), self.ring.size).shifted(a) for a in range(0, num_tokens, chunk)]

    def _read(self, prompt: Tensor, layout: Layout, cache: KVCache) -> Tensor:
        """One chunk through the model; its keys go to the cache. The logits of the chunk's last token, on the rank that owns it."""
        cache.extend(layout)
        indices, inputs = self._inputs(prompt, layout)
        last = (indices == layout.length - 1).nonzero()[:, 0]
        with self.context.running(layout, cache):
            keep = last.to(self.device) if len(last) else 1  # transformers takes 0 for all of them
            logits: Tensor = self.model(**inputs, use_cache=False, logits_to_keep=keep).logits
        return logits

    def _inputs(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
        """The indices (s,) of this rank's tokens and what the model takes of them."""
        own = layout.indices(self.ring.rank)
        fed = own if len(own) else torch.zeros(1, dtype=torch.int64)  # transformers takes no empty input; attention leaves it out again
        return own, {"input_ids": tokens[fed].to(self.device)[None], "position_ids": fed.to(self.device)[None]}

    def _shape(self) -> Shape:
        model = self.model.config
        width = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
        return Shape(self.num_layers, shards.key_heads_of(self.model), width, self.model.dtype)

    def _extend(self, length: int) -> None:
        """Turn positions as `attention.positions` says for a sequence of this many tokens, the answer's included.

        It is the whole sequence's length, so ranks agree on it, and it holds for prefill and decode alike.
        """
        if self.trained is not None:
            turn(self.model, encoding_of(self.config.attention.positions, self.trained, length))

    def _step(self, token: int, cache: KVCache) -> Tensor:
        """One token more: every rank computes it against its own keys, one of them keeps its key. Logits (1 1 vocabulary)."""
        index = cache.layout.length
        cache.grow()
        with self.context.running(cache=cache, decoding=True):
            ids, position = torch.tensor([[[token]], [[index]]], device=self.device)
            logits: Tensor = self.model(input_ids=ids, position_ids=position, use_cache=False).logits
        self.attention_seconds["decode"] = self.context.seconds
        return logits

    def _agree(self, token: int, what: str) -> int:
        """Rank 0's token, on all ranks: machines that round differently must not part ways."""
        return token if self.world.size == 1 else int(broadcast(self.world, torch.tensor([token], device=self.device), 0, what))

    def _ends(self) -> set[int]:
        """The tokens that end a text, as the checkpoint's generation settings or its tokenizer say."""
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        return set(ends) if isinstance(ends, list) else {ends}

    def _warn_if_long(self, num_tokens: int) -> None:
        length = getattr(self.model.config, "max_position_embeddings", None)
        asked, positions = num_tokens + self.config.generation.max_new_tokens, self.config.attention.positions
        if not length or positions.kind == "dynamic_ntk":  # it stretches as far as it is asked
            return
        if asked > length * (positions.factor or 1.0):
            stretched = f" and stretched {positions.factor:g} times" if positions.factor else ""
            logger.warning(
                "Prompt and answer may take %d tokens, but the model was trained on %d%s; expect worse answers.", asked, length, stretched
            )

    def _report(self, answer: str, tokens: list[int], prompt_tokens: int, seconds: Seconds) -> Answer:
        facts = {"memory": peak_memory(self.device), "sent": dict(self.ring.traffic.sent)}
        everyone = share(self.world, facts, self.device, "memory and traffic of each rank")
        sent: dict[str, int] = {}
        for rank in everyone:
            for kind, count in rank["sent"].items():
                sent[kind] = sent.get(kind, 0) + count
        num_read = prompt_tokens - self.num_resumed
        speed = {"prefill": num_read / seconds.prefill, "decode": (len(tokens) - 1) / seconds.decode if len(tokens) > 1 else 0.0}
        return Answer(
            answer=answer, tokens=tokens, prompt_tokens=prompt_tokens, ranks=self.world.size, seconds=seconds,
            tokens_per_second=speed, bytes=sent, memory=[rank["memory"] for rank in everyone],
        )  # fmt: skip


def attention_of(config: AttentionConfig) -> Attention | None:
    """What the configuration puts in the place of the model's causal attention, or None for nothing."""
    if config.window is None:
        return None
    seen = window(config.window) | sinks(config.sinks) if config.sinks else window(config.window)
    return Attention(pattern=causal() & seen)


def encoding_of(config: PositionsConfig, known: extend.Trained, length: int) -> Rotary:
    """How positions turn in a sequence of `length` tokens, the same on all ranks, for a model trained as `known` says."""
    factor = config.factor or 1.0
    match config.kind:
        case "pi":
            return extend.interpolated(known, factor)
        case "ntk":
            return extend.ntk(known, factor)
        case "dynamic_ntk":
            return extend.dynamic_ntk(known, factor, length)
        case "yarn":
            return extend.yarn(known, factor, config.beta_fast, config.beta_slow)
        case "longrope":
            return extend.longrope(known, factor, length, short=config.short, long=config.long)
    return known.rotary
