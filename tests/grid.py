"""The grid: every pattern x layout x route once, the other factors covering all pairs; half precision; and twelve long cases.

Deterministic: the same cases in the same order everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import combinations, product
from typing import Any

from tests.cases import KEYS, LAYOUTS, PATTERNS, ROUTES, SCORES, Case

FACTORS: dict[str, tuple[Any, ...]] = {
    "size": (1, 2, 3, 4, 5, 8),
    "length": (1, 2, 7, 63, 257, 1001, 1002),
    "heads": ((2, 2), (8, 2), (8, 1), (6, 3)),
    "widths": ((32, 32), (64, 64), (48, 80), (128, 32), (256, 256)),
    "dtype": ("fp64", "fp32"),
    "batch": (1, 3),
    "scores": SCORES,
    "keys": KEYS,
    "lse": (False, True),
}
RARE: dict[Any, float] = {1001: 0.5, 1002: 0.5, (128, 32): 0.6, (128, 128): 0.5, (256, 256): 0.3}
"""Values that cost most are tried less often."""


def possible(row: Mapping[str, Any]) -> bool:
    """Whether a ring of this size can be folded so."""
    fold = ROUTES[row["route"]][1]
    return row["size"] % (fold.heads * fold.nodes) == 0


def covering(rows: Sequence[dict[str, Any]], factors: Mapping[str, Sequence[Any]], tries: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """Complete each row with a value of every factor, so that soon every pair of values of any two columns has occurred.

    Greedy: of a few random completions, the one that adds most new pairs. Rows come back in the order given.
    """
    draw = random.Random(seed)
    seen: set[tuple[Any, ...]] = set()
    weights = {name: [RARE.get(value, 1.0) for value in values] for name, values in factors.items()}

    def pairs(row: Mapping[str, Any]) -> set[tuple[Any, ...]]:
        return set(combinations(sorted(row.items(), key=lambda item: item[0]), 2))

    done = []
    for row in rows:
        options = []
        while len(options) < tries:
            option = {**row, **{name: draw.choices(values, weights[name])[0] for name, values in factors.items()}}
            if possible(option):
                options.append(option)
        best = max(options, key=lambda option: len(pairs(option) - seen))
        seen |= pairs(best)
        done.append(best)
    return done


@lru_cache(maxsize=1)
def grid() -> tuple[Case, ...]:
    """All cases in fp64 and fp32 up to 1002 tokens, in an order that covers pairs early."""
    rows = [{"pattern": a, "layout": b, "route": c} for a, b, c in product(PATTERNS, LAYOUTS, ROUTES)]
    random.Random(1).shuffle(rows)
    return tuple(Case(**row) for row in covering(rows, FACTORS))


def half() -> tuple[Case, ...]:
    """bf16 and fp16, judged against a single call of torch's kernel in that dtype."""
    patterns = ("causal", "full", "causal&window300", "causal&documents", "causal&(window40|sinks4)", "longformer")
    rows = [{"layout": a, "route": b} for a, b in product(LAYOUTS, ROUTES)]
    factors = {
        "pattern": patterns,
        "size": (1, 2, 3, 4, 8),
        "length": (257, 1001),
        "heads": ((2, 2), (8, 2), (8, 1)),
        "widths": ((32, 32), (64, 64), (128, 128)),
        "dtype": ("bf16", "fp16"),
        "batch": (1, 2),
        "scores": ("none", "scale"),
        "keys": ("same", "moved", "chunk"),
    }
    return tuple(Case(**row) for row in covering(rows, factors))


def long() -> tuple[Case, ...]:
    """Twelve named cases at 4096 tokens."""
    gqa = {"heads": (8, 2), "widths": (64, 64), "length": 4096}
    return (
        Case(size=4, layout="zigzag", pattern="causal", route="rotate", dtype="fp32", **gqa),
        Case(size=4, layout="zigzag", pattern="causal", route="rotate", dtype="fp64", **gqa),
        Case(size=8, layout="zigzag", pattern="causal", route="double", dtype="fp32", **gqa),
        Case(size=4, layout="striped", pattern="causal&window300", route="fetch", dtype="fp32", **gqa),
        Case(size=5, layout="contiguous", pattern="causal&(window40|sinks4)", route="fetch", dtype="fp64", **gqa),
        Case(size=4, layout="documents", pattern="causal&documents", route="fetch", dtype="fp32", **gqa),
        Case(size=4, layout="zigzag", pattern="causal", route="usp", dtype="fp32", **gqa),
        Case(size=3, layout="zigzag", pattern="causal", route="heads", dtype="fp32", **gqa),
        Case(size=4, layout="residue", pattern="causal&dilated4", route="rotate", dtype="fp32", **gqa),
        Case(size=4, layout="contiguous", pattern="causal", route="pass_q", dtype="fp32", keys="moved", **gqa),
        Case(size=2, layout="zigzag", pattern="longformer", route="auto", dtype="fp32", scores="sink", **gqa),
        Case(size=4, layout="zigzag", pattern="blocks", route="gather", dtype="fp32", scores="softcap", lse=True, **gqa),
    )


def share(cases: Sequence[Case], seconds: float, seed: int = 0) -> list[Case]:
    """A seeded share that is expected to take so long; ranks that need more processes come last."""
    order = sorted(cases, key=lambda case: (random.Random(f"{seed} {case}").random(), case))
    chosen: list[Case] = []
    for case in order:
        if sum(c.cost for c in chosen) + case.cost <= seconds:
            chosen.append(case)
        if len(chosen) % 50 == 0 and sum(c.cost for c in chosen) > 0.98 * seconds:
            break
    return sorted(chosen, key=lambda case: (case.size > 4, case))
