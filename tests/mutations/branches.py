"""Branches that overlap, turn by the wrong tokens, or bring gradients back the wrong way."""

from __future__ import annotations

from tests.mutations.kinds import CORE, Mutation, unit

RANKS = "tests/ranks/test_branches.py::"
METHODS = "ringctx/methods/branches.py"
DEFINITION = (RANKS + "test_every_method_is_its_definition_forward_and_backward[self_extend-zigzag-fetch-2ranks]",)
EVERYTHING = (RANKS + "test_with_everything_else_too[zigzag-causal-3ranks-rotate-fp64-S42-b1h4g2d12e8-branches_all-dlse]",)

BRANCHES = (
    Mutation(
        "branch_gradient_unturned",
        CORE + "compute.py",
        "self.encoding.keys_grad(dk, self.j[keys])",
        "dk",
        "the gradient of a key stays turned as its branch turned the key",
        DEFINITION,
    ),
    Mutation(
        "branch_gradient_turned_on",
        "ringctx/methods/rotary.py",
        "sin = -sin if back else sin",
        "sin = sin",
        "a gradient is turned once more instead of back",
        unit("branches", "test_gradients_of_an_encoding_are_its_transpose[rerope]"),
    ),
    Mutation(
        "branch_index_on_rank",
        CORE + "compute.py",
        "indices_of(keys, k.device)[c:d]",
        "torch.arange(c, d)",
        "a visiting key is turned by its place on the rank",
        DEFINITION,
    ),
    Mutation(
        "branch_hull",
        CORE + "compute.py",
        "slice(c - self.first[1], d - self.first[1])",
        "slice(c - min(self.first[1], 0), d - min(self.first[1], 0))",
        "a tile takes keys by their place in the block, not among those that were encoded",
        (RANKS + "test_every_method_is_its_definition_forward_and_backward[lm_infinite-zigzag-fetch-2ranks]",),
    ),
    Mutation(
        "sink_once_a_branch",
        CORE + "compute.py",
        "[h for g in self.wholes for h in g.heads]",
        "[h for g in self.groups for h in g.heads]",
        "the gradient of a sink's head is told for each branch, and its rows for each head",
        EVERYTHING,
    ),
    Mutation(
        "branches_unsaid",
        CORE + "attention.py",
        "branches ({branches}), carry",
        "carry",
        "ranks with other branches are not told",
        (RANKS + "test_ranks_with_other_branches_are_told[frequency]",),
    ),
    Mutation(
        "disjoint_either",
        CORE + "branch.py",
        "disjoint(left.left, right) and disjoint(left.right, right)",
        "disjoint(left.left, right) or disjoint(left.right, right)",
        "a union counts as disjoint when one half of it is",
        unit("branches", "test_disjoint_is_what_is_written_so"),
    ),
    Mutation(
        "window_of_the_cache",
        METHODS,
        "Place(cap=num_sinks + W - 1)",
        "Place(cap=num_sinks + W)",
        "StreamingLLM's sinks are one position too far away",
        unit("branches", "test_streaming_positions_are_places_in_the_cache"),
    ),
)
