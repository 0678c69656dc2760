"""Machines: what devices and links can do, from their makers' sheets and from kernels' published figures, or as measured by `here`.

Units: FLOP/s, bytes, bytes a second one way, seconds. Nothing here was measured on a GPU by this project.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ringctx.core.layout import Ranges
from ringctx.core.pattern import PARTIAL, Pattern
from ringctx.core.plan import Visit
from ringctx.core.tiles import area
from ringctx.core.together import joined
from ringctx.errors import ConfigError
from ringctx.tools.planner.simulate import Link


class Effort(NamedTuple):
    """What computing a visit takes: visits and calls of the kernel; FLOP in whole and causal tiles, and in masked ones; numbers of queries
    and keys that are touched. Or seconds that one of each takes.
    """

    visits: float
    calls: float
    plain: float
    masked: float
    numbers: float


@dataclass(frozen=True, kw_only=True)
class Device:
    """One rank of several, all at work. attention: seconds that one of each takes. linear: FLOP/s of what is not attention.

    edge: as in Kernel, of one that computes several tiles in one call. call: seconds before a layer's attention, in which ranks agree.
    post, hidden: as in Costs. slow: of a call while so many ranks compute (1 first), its time over that while all do; empty where ranks
    have devices of their own. item: bytes of a number. base: bytes of a process that has read nothing; activations: of a token, in one
    layer at a time, None where they were not measured.
    """

    name: str
    memory: float
    attention: Effort
    linear: float
    edge: int | None = None
    call: float = 0.0
    post: float = 20e-6
    hidden: float = 1.0
    slow: tuple[float, ...] = ()
    item: int = 2
    base: float = 0.0
    activations: float | None = None
    source: str = ""

    def effort(self, visit: Visit, patterns: Sequence[Pattern], heads: Sequence[int], width: int, queries: Ranges) -> Effort:
        """patterns, heads: of each head group of the visit's tiles; width: of a head."""
        calls, plain, masked, numbers = 0, 0, 0, 0
        for rows, pattern, count in zip(visit.tiles, patterns, heads, strict=True):
            if not rows:
                continue
            several, rest = (None, rows) if self.edge is None else joined(pattern, queries, visit.ranges, rows, self.edge)
            if several is not None:
                calls, plain = calls + 1, plain + count * several.pairs
            hidden = area(tuple(tile for tile in rest if tile[0] == PARTIAL))
            calls, plain, masked = calls + len(rest), plain + count * (area(rest) - hidden), masked + count * hidden
            numbers += count * (max(t[2] for t in rows) - min(t[1] for t in rows) + max(t[4] for t in rows) - min(t[3] for t in rows))
        return Effort(float(calls > 0), calls, 4.0 * width * plain, 4.0 * width * masked, float(width * numbers))

    def seconds(self, effort: Effort) -> float:
        """Of computing a visit."""
        return sum(many * one for many, one in zip(effort, self.attention, strict=True))

    def shared(self, works: Sequence[float]) -> float:
        """Seconds until the last of these is done, which begin together on ranks that may share cores. works: each while all compute."""
        if not self.slow:
            return max(works)
        total, done = 0.0, 0.0
        for number, work in enumerate(sorted(works)):
            total += (work - done) * self.slow[len(works) - number - 1]
            done = work
        return total


def _gpu(name: str, peak: float, memory_gb: float, shares: tuple[float, float], source: str) -> Device:
    """From a peak in TFLOP/s, dense in bf16, and the shares of it that attention and matrix products reach."""
    attention, linear = (share * peak * 1e12 for share in shares)
    effort = Effort(visits=0, calls=TILE, plain=1 / attention, masked=1 / attention, numbers=0)
    return Device(name=name, memory=memory_gb * 1e9, attention=effort, linear=linear, source=source)


TILE = 10e-6
"""Seconds that a kernel's call takes besides, on a GPU."""


DEVICES = {
    "a100": _gpu("A100 SXM 80 GB", 312, 80, (0.6, 0.75), "NVIDIA A100 data sheet; FlashAttention-2 (arXiv 2307.08691, figures 4 to 6)"),
    "h100": _gpu("H100 SXM", 989, 80, (0.6, 0.65), "NVIDIA H100 data sheet; FlashAttention-3 (arXiv 2407.08608, figures 5 and 6)"),
    "h200": _gpu("H200 SXM", 989, 141, (0.6, 0.65), "NVIDIA H200 data sheet; kernels as of H100"),
    "b200": _gpu("B200", 2250, 180, (0.6, 0.65), "NVIDIA DGX B200 data sheet; shares assumed as of H100"),
}
"""Causal attention at width 128 and long sequences; peaks are those of the sheets without sparsity."""

LINKS = {
    "nvlink3": Link(5e-6, 300e9), "nvlink4": Link(5e-6, 450e9), "nvlink5": Link(5e-6, 900e9),
    "hdr": Link(10e-6, 25e9), "ndr": Link(10e-6, 50e9), "xdr": Link(10e-6, 100e9),
}  # fmt: skip
"""One way and a GPU: NVLink of A100, H100 and B200, half of the 600, 900 and 1,800 GB/s of the sheets; InfiniBand of 200, 400, 800 Gb/s."""
NODE_LINK = {"a100": "nvlink3", "h100": "nvlink4", "h200": "nvlink4", "b200": "nvlink5"}
SHARE = 0.8
"""Of a link's bandwidth that large messages reach."""


def device_named(name: str) -> Device:
    """Raises ConfigError for a name that is not there."""
    if name not in DEVICES:
        raise ConfigError(f"There is no device {name!r} to plan for; there are {', '.join(DEVICES)}.")
    return DEVICES[name]


def link_of(asked: str) -> Link:
    """A name of LINKS, or gigabytes a second one way. Raises ConfigError for anything else."""
    if asked in LINKS:
        return replace(LINKS[asked], bandwidth=SHARE * LINKS[asked].bandwidth)
    try:
        bandwidth = float(asked) * 1e9
    except ValueError:
        bandwidth = 0.0
    if not bandwidth > 0:
        raise ConfigError(f"A link is one of {', '.join(LINKS)}, or gigabytes a second one way, such as 12.5; got {asked!r}.")
    return Link(10e-6, bandwidth)
