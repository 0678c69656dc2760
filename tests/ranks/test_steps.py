"""Backward of large visits in steps: gradients leave part by part, exact, and in as many bytes (what is held: test_memory)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cases import TOLERANCE, Case, compare, on_rank, oracle, problem, small_steps
from tests.pool import Pool
from tests.wire import tapped


def case(size: int, length: int, layout: str, pattern: str, route: str, **more: Any) -> Case:
    return Case(**{"heads": (4, 2), "widths": (8, 12), **more}, size=size, length=length, layout=layout, pattern=pattern, route=route)


CASES = [
    case(2, 97, "zigzag", "causal", "rotate", lse=True),
    case(2, 97, "zigzag", "causal", "rotate", dtype="fp32", batch=2),
    case(3, 150, "contiguous", "causal", "rotate"),
    case(4, 203, "zigzag", "full", "rotate"),
    case(4, 203, "striped", "causal&window300", "double"),
    case(4, 160, "zigzag", "causal&documents", "fetch"),
    case(4, 160, "contiguous", "causal&(window40|sinks4)", "rotate"),
    case(3, 131, "zigzag", "causal", "gather"),
    case(4, 131, "residue", "causal&ids", "gather", batch=2),
    case(4, 150, "zigzag", "causal", "usp"),
    case(3, 150, "zigzag", "blocks_of_heads", "rotate"),
    case(3, 150, "residue", "longformer", "fetch"),
    case(3, 120, "zigzag", "causal", "rotate", scores="all", lse=True),
    case(3, 120, "zigzag", "causal", "rotate", scores="self_extend"),
    case(3, 120, "zigzag", "causal", "rotate", scores="coca"),
    case(3, 120, "contiguous", "causal", "rotate", keys="moved"),
    case(3, 120, "zigzag", "causal", "fetch", keys="gaps"),
    case(4, 120, "contiguous", "full", "rotate", keys="one_rank"),
]


FOUR_TOKENS = 4 * 2 * (8 + 12) * 8
"""Bytes of their gradients in fp64, in the cases above."""


def attend(ring: Any, case: Case, step_bytes: int) -> dict[str, Any]:
    """This rank's answer with steps of so many bytes, and what travelled."""
    with small_steps(step_bytes), tapped() as wire:
        ring.traffic.reset()
        found = on_rank(ring, case)
    return {**found, "sent": wire.bytes(incoming=False), "messages": ring.traffic.messages["grads"]}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_are_exact_and_send_as_much(pool: Pool, case: Case) -> None:
    given = problem(case)
    whole, steps = (pool.run(attend, case, step_bytes, size=case.size, fold=case.fold) for step_bytes in (2**30, FOUR_TOKENS))
    found = compare(given, oracle(case, given), steps)
    assert all(x <= TOLERANCE[case.dtype] for x in found.values()), found
    assert [rank["sent"] for rank in steps] == [rank["sent"] for rank in whole]
    assert sum(rank["messages"] for rank in steps) > 1.5 * sum(rank["messages"] for rank in whole)
