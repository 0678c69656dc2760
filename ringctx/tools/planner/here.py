"""Here: what the ranks of this machine can do, measured for some seconds while all of them work, as a device and a link to plan for.

Knows rings, kernels and layers of the model with random weights. Ranks wait for each other in every layer, so of a round the slowest
counts, and of rounds the median. Work is small beside what is planned; only what is not attention, and its memory, are measured with as
many tokens as a rank will have, up to MOST and LARGEST.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringctx import kernels
from ringctx.config import Config
from ringctx.config_training import ScratchConfig
from ringctx.core.attention import Attention
from ringctx.core.entry import ring_attention
from ringctx.core.header import agree
from ringctx.core.layout import Layout
from ringctx.core.plan import make_plan
from ringctx.core.ring import Message, Ring
from ringctx.device import device_of, dtype_of, held_memory, keep_freed_memory, peak_memory
from ringctx.huggingface import wrap
from ringctx.kernels.base import Call
from ringctx.patterns import causal, window
from ringctx.runtime.cache import KVCache
from ringctx.tools.bench.case import finish, meet, slowest
from ringctx.tools.planner.machine import Device, Effort
from ringctx.tools.planner.predict import Asked, parts_of
from ringctx.tools.planner.simulate import Link
from ringctx.tools.shapes import Shapes, by_layer, file_of, folder_of, shapes_of
from ringctx.training.model import llama

ROUNDS = 5
LONG, MOST = 2048, 4096
"""Tokens of a sample: of the longest at least, and at most."""
FEW, DEEP = 1024, 8192
"""Queries, and the keys before them, of a sample whose keys no longer fit a core's cache."""
LARGEST = 32_768
"""Tokens of a sample for memory, at most: large blocks are not kept where small ones are."""
LAYERS = 6
"""Of the model with random weights, at most."""
MASKED = Attention(causal() & window(31))
"""What masked tiles are measured with where nothing asked for has any: a window too narrow to be a band for a kernel."""
SMALL, LARGE = 1 << 10, 8 << 20
"""Bytes of the messages that are timed."""


def asked_here(config: Config, ring: Ring, tokens: int, link: Link | None = None) -> Asked:
    """What is planned where the ranks of `ring` read so many tokens; all call it together. link: instead of the measured one."""
    model, device, folder = shapes_of(config), device_of(config.model), folder_of(config)
    dtype = dtype_of(config.model, device)
    found, measured = Here(ring, model, device, dtype, folder).measure(by_layer(config, model).values(), tokens)
    return Asked(
        tokens=tokens, ranks=ring.size, device=found, link=link or measured, page=config.cache.page, file=file_of(folder, dtype)
    )  # fmt: skip


class Here:
    """The ranks of `ring`, for a model of these shapes in this dtype on this device. folder: its checkpoint, for the tokenizer's memory."""

    def __init__(self, ring: Ring, shapes: Shapes, device: torch.device, dtype: torch.dtype, folder: Path | None = None) -> None:
        self.ring, self.shapes, self.device, self.dtype, self.folder = ring, shapes, device, dtype, folder

    @torch.no_grad()
    def measure(self, attentions: Iterable[Attention], tokens: int) -> tuple[Device, Link]:
        """attentions: of the layers; their encodings and scores are left out. tokens: in all. All ranks call it together."""
        keep_freed_memory()
        share = max(1, tokens // self.ring.size)
        own = min(MOST, share)
        tokenizer = None if self.folder is None else _tokenizer(self.folder)
        base = held_memory(self.device)
        activations = self._activations(min(share, LARGEST), base)
        del tokenizer
        rest = self._rest(own)
        edge = self._edge()
        known = Device(name="", memory=0, attention=Effort(0, 0, 0, 0, 0), linear=0, edge=edge)
        attention = self._attention(known, [Attention(), *attentions], own, tokens)
        link, hidden = self._link()
        device = Device(
            name=f"a rank here, of {self.ring.size}", memory=self._memory(), attention=attention,
            linear=2 * self.shapes.layer_params * own / rest, edge=edge, call=self._call(), post=0.0, hidden=hidden,
            slow=self._slow(own), item=self.dtype.itemsize, base=self._mean(base), activations=self._mean(activations),
            source=f"{ROUNDS} rounds of measuring this machine, all {self.ring.size} ranks at once",
        )  # fmt: skip
        return device, link

    # -- what is measured -------------------------------------------------------------------------------------------

    def _activations(self, tokens: int, base: int) -> float:
        """Bytes a token that layers take besides weights and keys. base: bytes of the process before.

        As many caches are kept as a model of many layers keeps: malloc puts what comes and goes around them. Attention is narrow: what
        attention takes does not depend on what it sees.
        """
        many = min(LAYERS, self.shapes.layers)
        read, caches = self._reader(many, tokens, MASKED, many - 1), list[KVCache]()
        for _ in range(-(-self.shapes.layers // many)):
            caches.append(read())
        numbers = many * (len(caches) * tokens * self.shapes.values_a_token + self.shapes.layer_params)
        return max(peak_memory(self.device) - base - numbers * self.dtype.itemsize, 0) / tokens

    def _rest(self, tokens: int) -> float:
        """Seconds of what is not attention in a layer over so many tokens."""
        many = min(LAYERS, self.shapes.layers)
        read, attends = self._reader(many, tokens, Attention()), self._attends(Attention(), Layout.contiguous(tokens, 1))
        rests = [whole - many * attending for whole, attending in self._turns(read, attends)]
        return max(statistics.median(rests) / many, 1e-9)

    def _reader(self, layers: int, tokens: int, attention: Attention, last: int | None = None) -> Callable[[], KVCache]:
        """Reads so many tokens with a model of random weights, on each rank alone, into a cache of their own.

        last: the layer whose keys are the last that are wanted, if not all is to be computed.
        """
        model, layout = _random(self.shapes, layers, self.device, self.dtype), Layout.contiguous(tokens, 1)
        context = wrap(model, Ring.alone(), attention)
        ids = torch.zeros(1, tokens, dtype=torch.int64, device=self.device)
        inputs = {"input_ids": ids, "position_ids": layout.indices(0, self.device)[None], "use_cache": False}

        def read() -> KVCache:
            cache = KVCache(layers, 0, 1, room=tokens)
            cache.extend(layout)
            with context.running(layout, cache) if last is None else context.caching(layout, cache, last):
                model.base_model(**inputs)
            return cache

        return read

    def _attention(self, known: Device, attentions: Sequence[Attention], own: int, tokens: int) -> Effort:
        """Seconds of each part of an effort, such that they tell those of these attentions at some lengths best."""
        efforts, seconds = [], []
        if not any(self._effort(known, attention, Layout.contiguous(LONG, 1)).masked for attention in attentions):
            attentions = [*attentions, MASKED]
        longest = max(own, LONG)  # among short ones products do not show beside what is touched
        samples = [(Attention(), Layout.contiguous(FEW, 1).shifted(DEEP))] * (tokens >= DEEP)
        for n in sorted({min(longest, n) for n in (128, 512, LONG, MOST)}):
            samples += [(attention, Layout.contiguous(n, 1)) for attention in dict.fromkeys(attentions)]
            samples += [(Attention(), Layout.contiguous(n, 1).shifted(n))] * (n < longest)
        for attention, layout in samples:
            efforts.append(self._effort(known, attention, layout))
            seconds.append(self._seconds(self._attends(attention, layout)))
        return Effort(*fitted(efforts, seconds))

    def _effort(self, known: Device, attention: Attention, layout: Layout) -> Effort:
        patterns, heads = parts_of(attention, self.shapes.heads)
        plan = make_plan(patterns, layout, self._keys_of(layout), 0, "rotate")
        return known.effort(plan.home, patterns, heads, self.shapes.width, layout.spans[0])

    def _attends(self, attention: Attention, layout: Layout) -> Callable[[], object]:
        keys, s, lone = self._keys_of(layout), self.shapes, Ring.alone()
        sizes = ((layout.count(0), s.heads), (keys.count(0), s.key_heads), (keys.count(0), s.key_heads))
        q, k, v = (torch.randn(1, n, h, s.width, device=self.device).to(self.dtype) for n, h in sizes)
        seen = Attention(attention.pattern, branches=attention.branches)
        return lambda: ring_attention(q, k, v, ring=lone, layout=layout, key_layout=keys, attention=seen)

    def _keys_of(self, layout: Layout) -> Layout:
        """The keys before these queries where they begin later, else their own."""
        n = layout.count(0)
        return Layout.contiguous(layout.length - n, 1) if layout.length > n else layout

    def _slow(self, own: int) -> tuple[float, ...]:
        """Of a call while 1, 2, … ranks compute, its time over that while all do."""
        size, attends = self.ring.size, self._attends(Attention(), Layout.contiguous(min(own, LONG), 1))
        counts = sorted({1, size, *(2**n for n in range(size.bit_length()) if 2**n < size)})
        found = {many: self._seconds(attends, many) for many in counts}
        told = {many: min(found[many] / found[size], 1.0) for many in counts}
        slow = [told[1]]
        for a, b in pairwise(counts):
            slow += [told[a] + (told[b] - told[a]) * (n - a) / (b - a) for n in range(a + 1, b + 1)]
        return tuple(slow)

    def _call(self) -> float:
        return self._seconds(lambda: agree(self.ring, {"call": "plan"}))

    def _link(self) -> tuple[Link, float]:
        """Between neighbours, all of them sending at once; and the share of a message's time that a rank can compute in."""
        if self.ring.size == 1:
            return Link(0.0, 1e12), 1.0
        small, large = (self._seconds(partial(self._sent, size)) for size in (SMALL, LARGE))
        link = Link(small, LARGE / max(large - small, 1e-9))
        x = torch.randn(256, 256, device=self.device)
        once = self._seconds(lambda: _multiply(x, 8)) / 8
        times = max(int(large / once), 1)
        alone = self._seconds(lambda: _multiply(x, times))

        def both() -> None:
            wait = self._send(LARGE)
            _multiply(x, times)
            wait()

        hidden = (large + alone - self._seconds(both)) / min(large, alone)
        return link, min(max(hidden, 0.0), 1.0)

    def _send(self, size: int) -> Callable[[], None]:
        """Post a message to the next rank and one from the rank before; what is returned waits for both."""
        ring = self.ring
        out, into = (torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        receive, send = Message((ring.rank - 1) % ring.size, (into,)), Message((ring.rank + 1) % ring.size, (out,))
        return ring.exchange("probe", "a measured message", [receive], [send]).wait

    def _sent(self, size: int) -> None:
        self._send(size)()

    def _edge(self) -> int | None:
        s = self.shapes
        kernel = kernels.choose(Call(self.device.type, self.dtype, s.heads, s.key_heads, s.width, s.width))
        found: int | None = getattr(kernel, "edge", None)
        return found

    def _memory(self) -> float:
        """Bytes that a rank may take."""
        if self.device.type == "cuda":
            return float(torch.cuda.get_device_properties(self.device).total_memory)
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / self.ring.size

    # -- how --------------------------------------------------------------------------------------------------------

    def _seconds(self, work: Callable[[], object], many: int | None = None) -> float:
        """Of work that the first `many` ranks do at once, all by default."""
        return float(statistics.median(seconds for (seconds,) in self._turns(work, many=many)))

    def _turns(self, *works: Callable[[], object], many: int | None = None) -> list[Any]:
        """Of each round the seconds of each of these, on the slowest rank."""
        is_busy, rounds = many is None or self.ring.rank < many, []
        for _ in range(ROUNDS + 1):
            taken = []
            for work in works:
                meet(self.ring, self.device)
                began = time.perf_counter()
                if is_busy:
                    work()
                    finish(self.device)
                taken.append(time.perf_counter() - began if is_busy else 0.0)
            rounds.append(tuple(taken))
        return slowest(self.ring, rounds[1:], self.device)

    def _mean(self, number: float) -> float:
        found = torch.tensor([number], dtype=torch.float64, device=self.device)
        if self.ring.group is not None:
            dist.all_reduce(found, group=self.ring.group)
        return float(found) / self.ring.size


def _random(shapes: Shapes, layers: int, device: torch.device, dtype: torch.dtype) -> Any:
    """So many layers of a decoder of these shapes, and hardly a vocabulary."""
    few = ScratchConfig(
        layers=layers, hidden=shapes.hidden, heads=shapes.heads, key_heads=shapes.key_heads,
        intermediate=shapes.intermediate, vocabulary=8,
    )  # fmt: skip
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # made in another and converted, it would leave holes that activations then fill
    try:
        return llama(few, 8, MOST, 0, shapes.width).to(device).eval()
    finally:
        torch.set_default_dtype(usual)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _multiply(x: Tensor, times: int) -> None:
    for _ in range(times):
        x @ x


def fitted(efforts: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """The numbers x >= 0 for which efforts @ x tells seconds best, by relative squares: what would come out negative is left out."""
    told = torch.tensor(seconds, dtype=torch.float64)
    given = torch.tensor(efforts, dtype=torch.float64) / told[:, None]
    kept = [n for n in range(given.shape[1]) if bool(given[:, n].any())]
    while kept:
        size = given[:, kept].norm(dim=0)
        found = torch.linalg.lstsq(given[:, kept] / size, torch.ones(len(told), 1, dtype=torch.float64)).solution[:, 0] / size
        least = int((found * size).argmin())
        if found[least] >= 0:
            return [float(found[kept.index(n)]) if n in kept else 0.0 for n in range(given.shape[1])]
        kept.pop(least)
    return [0.0] * given.shape[1]
