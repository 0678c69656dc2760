"""Selective Attention that marks the wrong keys, forgets what keys carried or corrects nothing."""

from __future__ import annotations

from tests.mutations.kinds import CORE, Mutation, unit

ORACLE = unit(
    "selective", "test_ranks_compute_what_the_oracle_does[2-zigzag-fp64]", "test_ranks_compute_what_the_oracle_does[3-contiguous-fp64]"
)
STEPS = unit("training", "test_gradients_of_virtual_ranks_average_to_those_of_one_and_their_steps_are_those_of_one[zigzag-37]")
PRUNED = ("tests/ranks/test_pruning.py::test_outputs_and_kept_keys_are_those_of_the_definition[budget-3-zigzag]",)

CARRIES = (
    Mutation(
        "carry_own_row",
        "ringctx/kernels/carried.py",
        ".tril_(-1)",
        ".tril_(0)",
        "a query subtracts what it gave itself: the shift by one row is missing",
        ORACLE,
    ),
    Mutation(
        "carry_first_token",
        CORE + "carried.py",
        "where = ~first if earlier is None else earlier & ~first",
        "where = earlier",
        "the first token is marked as unneeded, too",
        ORACLE,
    ),
    Mutation(
        "carry_scan_inclusive",
        CORE + "scan.py",
        "part[:, at : at + b - a] = total[:, a:b]",
        "part[:, at : at + b - a] = total[:, a:b] + given",
        "a chunk's keys carry what the chunk itself gives",
        ORACLE,
    ),
    Mutation(
        "carry_no_correction",
        CORE + "relay.py",
        "    _correct(way, dq, dk, q, k, later)\n    return",
        "    return",
        "what later chunks took has no gradient",
        ORACLE,
    ),
    Mutation(
        "carry_memory_of_all",
        CORE + "carried.py",
        "kept if earlier is None else kept.masked_fill(~earlier, 0.0)",
        "kept",
        "memory counts keys that come later",
        ORACLE,
    ),
    Mutation(
        "carry_memory_slope",
        CORE + "carried.py",
        "dtaken -= forgets",
        "dtaken += forgets",
        "the gradient of the memory has the wrong sign",
        ORACLE,
    ),
    Mutation(
        "carry_decode_forgets",
        CORE + "decode.py",
        "Meeting.of(work, q, rows, k, v, keys), tiles, carry)",
        "Meeting.of(work, q, rows, k, v, keys), tiles, carry.clone())",
        "what a decoded token gives is lost after the token",
        unit("selective", "test_chunks_and_decoding_equal_one_dense_pass"),
    ),
    Mutation(
        "carry_cache_forgets",
        "ringctx/runtime/cache.py",
        "self._layers[layer][0].carry = carry",
        "self._layers[layer][0].carry = None",
        "the next chunk does not know what earlier ones gave",
        unit("carry_model", "test_prefill_in_chunks_and_decode_say_what_the_whole_says"),
    ),
    Mutation(
        "carry_pruned_order",
        "ringctx/runtime/cache.py",
        "carry.gather(-1, order[:, 0])",
        "carry[:, : order.shape[-1]]",
        "keys that are left carry what others carried",
        PRUNED,
    ),
    Mutation(
        "pruned_least_forgotten",
        "ringctx/methods/eviction/forgotten.py",
        "return (-carry).masked_fill",
        "return carry.masked_fill",
        "the keys that matter are dropped",
        PRUNED,
    ),
    Mutation(
        "memory_loss_of_every_rank",
        "ringctx/training/loss.py",
        "* (first == ring.rank) if len(indices) else stacked",
        "if len(indices) else stacked",
        "every rank has a largest row of its own",
        STEPS,
    ),
)
