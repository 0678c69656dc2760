"""A peer beside the ring: held against fp64 first, then timed in the same rounds."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from ringctx.core.ring import Ring
from ringctx.errors import ConfigError
from ringctx.tools.bench.accuracy import far, whole, whole_of
from ringctx.tools.bench.case import Case, Times, meet, sdpa, tensors_of, timed
from ringctx.tools.bench.peers import Peer


@dataclass(frozen=True)
class Beside:
    """A peer on the same tensors: milliseconds (medians, the slowest rank's), the anchor's time over its, relative errors against fp64; or
    why it was not timed.
    """

    name: str
    forward_ms: float | None = None
    backward_ms: float | None = None
    efficiency_forward: float | None = None
    efficiency: float | None = None
    error: dict[str, float] | None = None
    refused: str | None = None


class Other:
    """A peer among the rounds of a case. First it is held against fp64, over LEAST tokens at most; all ranks take part."""

    LEAST, WRONG = 2048, 0.05

    def __init__(self, peer: Peer, ring: Ring, case: Case, device: torch.device) -> None:
        self.peer, self.ring, self.device, self.times = peer, ring, device, list[Times]()
        if ring.group is None:
            raise ConfigError("Peers are measured on two ranks or more; add --ranks 2.")
        self.error: dict[str, float] | None = None
        self.refused: str | None = None
        layout = peer.layout(case.S, ring.size)
        self.mine = [layout.shard(x.to(device), ring.rank) for x in tensors_of(case)]
        try:
            self.attend = peer.make(ring.group)
            self._verify(replace(case, S=min(case.S, self.LEAST)))
            timed(self.attend, self.mine)
        except Exception as error:  # theirs to raise whatever they like; a rank that alone breaks off ends the run by the deadline
            self.refused = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}" if str(error) else type(error).__name__

    def _verify(self, case: Case) -> None:
        layout, tensors = self.peer.layout(case.S, self.ring.size), [x.to(self.device) for x in tensors_of(case)]
        found = whole_of(self.ring, layout, self.attend, tensors)
        if found is not None:
            self.error = far(found, whole(sdpa, [x.double() for x in tensors]))
        verdict = torch.tensor(float(found is not None and not max((self.error or {}).values()) <= self.WRONG), device=self.device)
        dist.all_reduce(verdict, group=self.ring.group)
        if verdict:
            raise ArithmeticError(f"its answer is wrong: {self.error}")

    def round(self) -> None:
        """Time it once."""
        meet(self.ring, self.device)
        self.times.append((math.nan, math.nan) if self.refused else timed(self.attend, self.mine))

    def beside(self, times: list[Times], anchors: list[Times]) -> Beside:
        """What the rounds gave, each as long as its slowest rank took."""
        if self.refused:
            return Beside(self.peer.name, error=self.error, refused=self.refused)
        forward, backward = (1000 * statistics.median(t[n] for t in times) for n in (0, 1))
        ratio = statistics.median(sum(a) / sum(t) for a, t in zip(anchors, times, strict=True))
        ratio_forward = statistics.median(a[0] / t[0] for a, t in zip(anchors, times, strict=True))
        return Beside(self.peer.name, round(forward, 1), round(backward, 1), round(ratio_forward, 3), round(ratio, 3), self.error)
