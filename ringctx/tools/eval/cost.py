"""Cost: what a piece of work on all ranks took, by a Row's keys."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from ringctx.device import peak_memory
from ringctx.runtime.engine import Engine
from ringctx.runtime.talk import share
from ringctx.tools.eval import watch
from ringctx.tools.eval.density import density

T = TypeVar("T")


def counted(engine: Engine, work: Callable[[], T]) -> tuple[T, dict[str, Any]]:
    """What the work returns, which only reads, and the values of a Row's keys from seconds on. All ranks call it together."""
    began = time.perf_counter()
    engine.ring.traffic.reset()
    with watch.anonymous() as peak:
        done = work()
    seconds = time.perf_counter() - began
    facts = {"sent": engine.ring.traffic.sent.total(), "memory": peak_memory(engine.device), "anonymous": peak.bytes}
    everyone = share(engine.world, facts, engine.device, "cost on each rank")
    cost = {
        "seconds": seconds,
        "prefill_seconds": seconds,
        "answer_seconds": None,
        "density": density(engine),
        "bytes": sum(rank["sent"] for rank in everyone),
        "memory": [rank["memory"] for rank in everyone],
        "anonymous": [rank["anonymous"] for rank in everyone],
    }
    return done, cost
