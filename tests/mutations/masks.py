"""Patterns, tiles and layouts that are off by one, or speak of places on a rank instead of indices."""

from __future__ import annotations

from tests.mutations.kinds import CORE, Mutation, exact, promise, unit

WHO_SEES_WHOM = (
    Mutation(
        "window_of_w_minus_1",
        CORE + "rules.py",
        "i[:, None] - j < self.width",
        "i[:, None] - j < self.width - 1",
        "a window of W keys shows W - 1",
        unit("patterns", "test_judge_of_a_stock_pattern_is_exact_on_unit_steps"),
    ),
    Mutation(
        "window_judge",
        CORE + "rules.py",
        "q[-1] - k[0] < self.width:",
        "q[-1] - k[0] <= self.width:",
        "a tile whose last query misses one key counts as seen whole",
        unit("patterns", "test_judge_of_a_stock_pattern_is_exact_on_unit_steps"),
    ),
    Mutation(
        "causal_judge",
        CORE + "pattern.py",
        "if k[0] > q[-1]:",
        "if k[0] >= q[-1]:",
        "a tile whose last query is its first key counts as empty; no parity run notices",
        unit("patterns", "test_judge_of_a_stock_pattern_is_exact_on_unit_steps"),
    ),
    Mutation(
        "causal_alignment",
        CORE + "pattern.py",
        "0 <= q[0] - k[0] < q.step",
        "0 <= q[0] - k[0] <= q.step",
        "a square tile one off the diagonal is computed as causal",
        unit("patterns", "test_judge_of_a_stock_pattern_is_exact_on_unit_steps"),
    ),
    Mutation(
        "both_or_either",
        CORE + "pattern.py",
        "return max(left, right)  # FULL gives way",
        "return min(left, right)  # FULL gives way",
        "the verdict on two patterns together is the milder one",
        unit("patterns", "test_judge_of_a_composition_is_sound"),
    ),
    Mutation(
        "documents_that_return",
        CORE + "listed.py",
        "apart = self._never_return or",
        "apart = True or",
        "a document that is taken up again later does not see its first part",
        unit("patterns", "test_judge_of_a_stock_pattern_is_exact_on_unit_steps"),
    ),
    Mutation(
        "hull_as_run",
        CORE + "tiles.py",
        "max(r[-1] for r in parts) + 1), False",
        "max(r[-1] for r in parts) + 1), True",
        "two chunks and the gap between them are taken for one run of tokens",
        exact("one_rank"),
    ),
    Mutation(
        "joined_over_a_gap",
        CORE + "tiles.py",
        "last[1:3] == tile[1:3] and last[4] == tile[3]",
        "last[1:3] == tile[1:3] and last[4] <= tile[3]",
        "whole tiles are made one although hidden keys lie between them",
        exact("islands"),
    ),
    Mutation(
        "mask_by_block",
        CORE + "masks.py",
        "pattern.allows(indices_of(queries, device), indices_of(keys, device))",
        "pattern.allows(indices_of(queries, device) // 8 * 8, indices_of(keys, device) // 8 * 8)",
        "masks are as coarse as blocks",
        exact("window"),
    ),
    Mutation(
        "local_indices",
        CORE + "compute.py",
        "indices_of(keys, q.device)[c:d]",
        "torch.arange(c, d, device=q.device)",
        "visiting keys are numbered by their place on this rank: biases and dropout go wrong",
        exact("scores"),
    ),
    Mutation(
        "chunk_order",
        CORE + "layout.py",
        "owned[min(c, chunks - 1 - c)]",
        "owned[c % size]",
        "zigzag without its mirror: exact, but the ranks' work is unequal",
        promise("test_layouts_are_those_of_their_documentation"),
    ),
)
