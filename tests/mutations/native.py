"""The native kernel adds to the wrong sums, sees keys that are not there, or is not the one that was compiled. Where this CPU has one."""

from __future__ import annotations

import torch

from ringctx.kernels.base import Call
from ringctx.kernels.native import Native
from tests.mutations.kinds import Mutation, unit

SOURCE = "ringctx/kernels/native.cpp"
CAN = [Native().why_not(Call("cpu", dtype, 2, 2, 64, 64)) is None for dtype in (torch.float32, torch.bfloat16)]
FULL = unit("native", "test_it_is_attention_within_the_rounding_of_its_factors[avx512-odd-False]")
CAUSAL = unit("native", "test_it_is_attention_within_the_rounding_of_its_factors[avx512-odd-True]")
HALF = unit("native", "test_it_is_attention_within_the_rounding_of_its_factors[avx512-bf16-odd-True]")

IN_FLOAT32 = (
    Mutation("native_sum_anew", SOURCE, "add && r < 16", "false && r < 16", "what was added up before is forgotten", CAUSAL),
    Mutation("native_behind_the_end", SOURCE, "rest < EDGE ? (1u << rest) - 1 : ~0u", "~0u", "keys that are not there are seen", FULL),
    Mutation(
        "native_diagonal",
        SOURCE,
        "seen == ALL ? ~0u : lanes_of(256 - seen, r);",
        "~0u;",
        "in backward queries see the keys after them in a block",
        CAUSAL,
    ),
    Mutation(
        "native_far_border",
        SOURCE,
        "seen - FROM + r,",
        "seen - FROM + r + 1,",
        "a window loses its farthest key",
        unit("native", "test_tiles_of_a_rectangle_in_one_call[avx512-window-plain]"),
    ),
    Mutation(
        "native_keys_begin_once",
        SOURCE,
        "if (x.begun.at[key / SQUARE]) return;",
        "",
        "gradients of keys begin anew with each square of queries",
        CAUSAL,
    ),
    Mutation(
        "native_unit_for_ever",
        SOURCE,
        "TOO_MUCH = 1e12f",
        "TOO_MUCH = INFINITY",
        "weights add up beyond what fp32 holds before their unit grows",
        unit("native", "test_logits_that_rise_along_the_keys_change_the_unit_of_their_row[avx512-200.0]"),
    ),
    Mutation(
        "native_bias_untransposed",
        SOURCE,
        "at.bias[r * EDGE + c] = row[r]",
        "at.bias[c * EDGE + r] = row[r]",
        "backward adds the bias of a key for a query to that of the query for the key",
        unit("native", "test_masks_and_biases_are_added_and_rows_that_see_nothing_are_0[avx512-333-333-mask of heads]"),
    ),
    Mutation(
        "native_one_file",
        "ringctx/kernels/native.py",
        " + ' '.join(flags).encode()",
        "",
        "what was compiled for another dtype or CPU is loaded",
        unit("native", "test_dtypes_and_kinds_of_cpus_share_a_home"),
    ),
)
IN_BFLOAT16 = (Mutation("native_pairs", SOURCE, "0x300010", "0x200000", "both halves of a paired block are the first", HALF),)
NATIVE = (IN_FLOAT32 if CAN[0] else ()) + (IN_BFLOAT16 if CAN[1] else ())
