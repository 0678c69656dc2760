"""The table of methods: `python -m tests.methods.table` runs what it names and writes docs/methods_table.md; a cell is never empty.

A cell is a test that passed, or the reason why there is nothing to test. Fails, and writes nothing, where a test failed or a cell is empty.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.methods import listed
from tests.methods.contract import METHODS, made

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "methods_table.md"
COLUMNS = ("golden", "forward", "backward", "1 2 3 4 ranks", "in parts", "refusals")
CONTRACT = "tests/ranks/test_methods.py::"
DEFINED, PARTS = (
    f"{CONTRACT}test_it_is_its_definition_forward_and_backward",
    f"{CONTRACT}test_chunks_and_single_tokens_say_what_the_whole_says",
)

PATTERNS = (
    *("causal", "sliding window, sinks", "band", "atrous", "local and atrous", "Sparse Transformer, strided", "Sparse Transformer, fixed"),
    *("Longformer, shared projections", "block-sparse", "BigBird", "documents", "Star Attention"),
)
STRETCHED = ("PI", "NTK-aware", "dynamic NTK", "YaRN", "LongRoPE")
COCA = ("CoCA, slack", "CoCA, strict")
LOG_N = ("log n", "entropy-invariant scale", "HWFA's last layer")
BRANCHES = ("ReRoPE", "Leaky ReRoPE", "Self-Extend", "LM-Infinite", "StreamingLLM, positions", "dual chunk")
TABLES = ("ALiBi", "bias by distance", "bias by pair")
SYNTHESIZERS = tuple(name for name in METHODS if name.startswith("Synthesizer"))
GAU = ("GAU, squared relu", "GAU, softmax")
INFINI = ("Infini-attention, linear", "Infini-attention, delta")
EVICTION = {"StreamingLLM, eviction": "streaming", "DuoAttention": "duo", "H2O": "h2o", "SnapKV": "snapkv", "PyramidKV": "pyramidkv"}
MONARCH, CARRY, ROWS, MEASURES = "Monarch", "Selective Attention", "measures of attention's rows", "measures of a vector"
NAMES = [*METHODS, *INFINI, CARRY, *EVICTION, "top-k eviction", MONARCH, ROWS, MEASURES]

COVERS: dict[str, tuple[tuple[str, ...], Iterable[str]]] = {
    "tests/unit/test_oracle.py::test_golden_values": (("golden",), ["causal"]),
    "tests/unit/test_oracle.py::test_refusals": (("refusals",), ["causal"]),
    "tests/unit/test_patterns.py::test_query_11_sees_what_the_papers_say": (
        ("golden",),
        set(PATTERNS) - {"causal", "band", "block-sparse", "BigBird"},
    ),
    "tests/unit/test_pattern_refusals.py::test_a_refusal_says_what_was_asked_and_what_to_do": (("refusals",), set(PATTERNS) - {"causal"}),
    "tests/unit/test_rotary.py::test_it_is_transformers_own_bit_for_bit_in_fp32": (("golden",), ["rotary by halves"]),
    "tests/unit/test_rotary.py::test_interleaved_pairs_are_products_of_complex_numbers": (("golden",), ["rotary by neighbours"]),
    "tests/unit/test_extend.py::test_interpolation_is_transformers_linear_bit_for_bit": (("golden",), ["PI"]),
    "tests/unit/test_extend.py::test_ntk_is_its_closed_form": (("golden",), ["NTK-aware"]),
    "tests/unit/test_extend.py::test_dynamic_ntk_is_transformers_dynamic_bit_for_bit": (("golden",), ["dynamic NTK"]),
    "tests/unit/test_extend.py::test_yarn_gives_the_figures_of_llama_2_extended_16_times": (("golden",), ["YaRN"]),
    "tests/unit/test_extend.py::test_longrope_is_transformers_longrope_bit_for_bit": (("golden",), ["LongRoPE"]),
    "tests/unit/test_extend.py::test_a_request_that_cannot_be_is_a_sentence": (("refusals",), STRETCHED),
    "tests/ranks/test_clex.py::test_it_begins_as_ntk_aware_scaling": (("golden",), ["CLEX"]),
    "tests/ranks/test_clex.py::test_half_the_step_changes_little_and_the_last_pair_more_than_the_first": (("refusals",), ["CLEX"]),
    "tests/unit/test_encodings.py::test_coca_is_the_papers_product_of_three": (("golden",), COCA),
    "tests/unit/test_encodings.py::test_coca_without_frequencies_or_with_those_of_fewer_dims_is_refused": (("refusals",), COCA),
    "tests/unit/test_encodings.py::test_log_n_multiplies_queries": (("golden",), LOG_N),
    "tests/unit/test_encodings.py::test_a_configuration_that_cannot_be_is_refused": (("refusals",), LOG_N),
    "tests/unit/test_branches.py::test_rerope_stops_counting_at_the_window": (("golden",), ["ReRoPE"]),
    "tests/unit/test_branches.py::test_leaky_rerope_counts_slower_beyond_the_window": (("golden",), ["Leaky ReRoPE"]),
    "tests/unit/test_branches.py::test_self_extend_counts_groups_beyond_the_window": (("golden",), ["Self-Extend"]),
    "tests/unit/test_branches.py::test_lm_infinite_sees_the_first_and_the_latest_keys_at_a_capped_distance": (("golden",), ["LM-Infinite"]),
    "tests/unit/test_branches.py::test_streaming_positions_are_places_in_the_cache": (("golden",), ["StreamingLLM, positions"]),
    "tests/unit/test_branches.py::test_dual_chunk_has_three_places_for_a_query": (("golden",), ["dual chunk"]),
    "tests/unit/test_branches.py::test_wrong_requests_are_refused": (("refusals",), BRANCHES),
    "tests/unit/test_scores.py::test_alibis_standard_slopes": (("golden",), ["ALiBi"]),
    "tests/unit/test_scores.py::test_distance_bias_reads_its_middle_at_distance_zero_and_clamps": (("golden",), ["bias by distance"]),
    "tests/unit/test_scores.py::test_a_table_of_the_wrong_shape_is_refused": (("refusals",), TABLES),
    "tests/unit/test_scores.py::test_a_softcap_bends_logits_and_knows_its_slope": (("golden",), ["softcap"]),
    "tests/unit/test_scores.py::test_a_cap_that_is_no_cap_is_refused": (("refusals",), ["softcap"]),
    "tests/ranks/test_summed.py::test_what_softmax_alone_defines_is_refused": (("refusals",), ["squared relu", "learned sinks", *GAU]),
    "tests/ranks/test_summed.py::test_the_golden_bell": (("golden",), ["hard-coded Gaussian"]),
    "tests/ranks/test_summed.py::test_a_decoder_is_narrowed_and_heads_must_fit": (("refusals",), ["hard-coded Gaussian"]),
    "tests/ranks/test_synthesizer.py::test_a_fixed_table_stays_and_a_sequence_beyond_it_is_refused": (("refusals",), SYNTHESIZERS),
    "tests/unit/test_selectors.py::test_vertical_slash_golden": (("golden",), ["vertical-slash"]),
    "tests/unit/test_selectors.py::test_flex_prefill_golden": (("golden",), ["FlexPrefill"]),
    "tests/unit/test_selectors.py::test_x_attention_golden": (("golden",), ["XAttention"]),
    "tests/unit/test_selectors.py::test_sparge_golden": (("golden",), ["SpargeAttn"]),
    "tests/unit/test_selectors.py::test_quest_golden": (("golden",), ["Quest"]),
    "tests/unit/test_selectors.py::test_moba_golden": (("golden",), ["MoBA"]),
    "tests/unit/test_selectors.py::test_sizes_that_cannot_be_are_refused": (("refusals",), listed.SELECTORS),
    "tests/ranks/test_selectors.py::test_ranks_select_what_the_definition_says_and_attend_to_it": (("in parts",), listed.SELECTORS),
    "tests/ranks/test_selectors.py::test_decoding_ranks_select_what_the_definition_says": (("in parts",), listed.SELECTORS),
    "tests/ranks/test_trained_sparse.py::test_nsa_golden": (("golden",), ["NSA"]),
    "tests/ranks/test_trained_sparse.py::test_nsa_without_every_key_is_refused": (("refusals",), ["NSA"]),
    "tests/ranks/test_trained_sparse.py::test_the_indexers_golden": (("golden",), ["DSA's lightning indexer"]),
    "tests/ranks/test_trained_sparse.py::test_tokens_and_reaches_that_are_not_there_are_refused": (
        ("refusals",),
        ["Longformer, global projections", "LongNet", "DSA's lightning indexer"],
    ),
    "tests/ranks/test_trained_sparse.py::test_star_is_blocks_beside_their_anchor_and_then_a_merge": (("golden",), ["Star Attention"]),
    "tests/ranks/test_trained_sparse.py::test_retaining_heads_say_one_number_a_key_head_and_nonsense_is_refused": (("refusals",), ["APB"]),
    "tests/ranks/test_infini.py::test_the_golden_memories": (("golden",), INFINI),
    "tests/ranks/test_infini.py::test_it_is_the_recurrence_forward_and_backward": (("forward", "backward", "1 2 3 4 ranks"), INFINI),
    "tests/ranks/test_infini.py::test_parts_and_single_tokens_say_what_the_whole_says": (("in parts",), INFINI),
    "tests/ranks/test_infini.py::test_ranks_that_hold_parts_of_segments_are_refused": (("refusals",), INFINI),
    "tests/unit/test_selective.py::test_the_oracle_gives_the_golden_numbers": (("golden",), [CARRY]),
    "tests/unit/test_selective.py::test_ranks_compute_what_the_oracle_does": (("forward", "backward", "1 2 3 4 ranks"), [CARRY]),
    "tests/unit/test_selective.py::test_chunks_and_decoding_equal_one_dense_pass": (("in parts",), [CARRY]),
    "tests/unit/test_selective.py::test_what_cannot_be_carried_says_why": (("refusals",), [CARRY]),
    "tests/unit/test_eviction.py::test_streaming_leaves_the_golden_keys_for_the_next_query": (("golden",), ["StreamingLLM, eviction"]),
    "tests/unit/test_eviction.py::test_h2o_keeps_the_golden_keys_with_the_golden_sums": (("golden",), ["H2O"]),
    "tests/unit/test_eviction.py::test_snapkv_keeps_the_golden_keys": (("golden",), ["SnapKV"]),
    "tests/unit/test_eviction.py::test_pyramidkv_has_the_golden_budgets": (("golden",), ["PyramidKV"]),
    "tests/unit/test_eviction.py::test_top_k_takes_a_function_or_a_table": (("golden", "forward"), ["top-k eviction"]),
    "tests/unit/test_eviction.py::test_ties_infinities_and_nan_are_settled_alike_on_any_ranks": (("1 2 3 4 ranks",), ["top-k eviction"]),
    "tests/unit/test_eviction.py::test_policies_that_keep_nothing_sensible_are_refused": (("refusals",), [*EVICTION, "top-k eviction"]),
    "tests/unit/test_eviction.py::test_a_table_that_is_too_short_says_so": (("refusals",), ["top-k eviction"]),
    "tests/ranks/test_monarch.py::test_entries_are_the_definition_and_the_product_is_the_dense_one": (("forward",), [MONARCH]),
    "tests/ranks/test_monarch.py::test_the_approximation_is_the_nearest_and_beats_low_rank_where_the_matrix_is_local": (
        ("golden",),
        [MONARCH],
    ),
    "tests/ranks/test_monarch.py::test_ranks_multiply_as_one_does_forward_and_backward": (("backward", "1 2 3 4 ranks"), [MONARCH]),
    "tests/ranks/test_monarch.py::test_shapes_that_are_no_monarch_matrix_are_refused": (("refusals",), [MONARCH]),
    "tests/unit/test_sparsity.py::test_goldens": (("golden", "forward"), [MEASURES]),
    "tests/ranks/test_rows.py::test_hoyer_and_counts_follow_from_the_sums": (("golden",), [ROWS]),
    "tests/ranks/test_rows.py::test_ranks_measure_what_the_matrix_says": (("forward", "1 2 3 4 ranks"), [ROWS]),
    "tests/ranks/test_rows.py::test_one_rank_and_some_rows_and_fp32": (("in parts",), [ROWS]),
    "tests/ranks/test_rows.py::test_what_has_no_such_rows_is_refused": (("refusals",), [ROWS]),
}
"""Test, which may have parameters -> the columns that it fills, and of which methods."""
for _name, _policy in EVICTION.items():
    _test = f"tests/ranks/test_eviction.py::test_outputs_and_kept_keys_are_those_of_the_definition[{_policy}-"
    COVERS[_test] = (("forward", "1 2 3 4 ranks", "in parts"), [_name])

NO_NUMBERS = "its paper prints none; the definition on whole tensors is the measure"
NO_TRAINING = "it drops keys for good, for inference"
REASONS: dict[tuple[str, str], str] = {
    **{(name, "golden"): "a mask that is given; compared with its own entries" for name in ("band", "block-sparse", "BigBird")},
    **{
        (name, "golden"): NO_NUMBERS
        for name in ("bias by pair", "learned sinks", "squared relu", "A-shape", "APB", "LongNet", *GAU, *SYNTHESIZERS)
    },
    ("InfLLM's representatives", "golden"): NO_NUMBERS,
    ("Longformer, global projections", "golden"): NO_NUMBERS,
    ("forgetting gate", "golden"): NO_NUMBERS,
    ("forgetting gate", "refusals"): "it has no numbers that could be wrong",
    ("DuoAttention", "golden"): "StreamingLLM's keys in the heads that stream",
    **{(name, "refusals"): "it has no numbers that could be wrong" for name in ("rotary by halves", "rotary by neighbours")},
    **{(name, "backward"): NO_TRAINING for name in (*EVICTION, "top-k eviction")},
    ("top-k eviction", "in parts"): "its table is of one prompt",
    (MONARCH, "in parts"): "it is not causal: every token reaches every other",
    (ROWS, "backward"): "a measure",
    **{(MEASURES, column): "of one vector, by torch alone" for column in ("backward", "1 2 3 4 ranks", "in parts", "refusals")},
}
"""Why a cell has nothing to test."""


class Outcomes:
    """A pytest plugin: which tests passed, and which did not."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.when == "call" and report.passed:
            self.passed.append(report.nodeid)


def cells(passed: list[str]) -> dict[tuple[str, str], str]:
    """Method and column -> a mark, or a reason."""
    found = dict(REASONS)
    for test, (columns, names) in COVERS.items():
        if any(one == test or one.startswith(test if test.endswith("-") else f"{test}[") for one in passed):
            found |= {(name, column): "✓" for name in names for column in columns}
    for name in METHODS:
        method = made(name)
        if all(f"{DEFINED}[{name}-{size}]" in passed for size in (1, 2, 3, 4)):
            found |= {(name, column): "✓" for column in ("forward", "1 2 3 4 ranks")}
            found[name, "backward"] = method.untrained or "✓"
        if method.unread:
            found.setdefault((name, "in parts"), method.unread)
        elif all(f"{PARTS}[{name}-{size}]" in passed for size in (1, 2, 3, 4)):
            found[name, "in parts"] = "✓"
    return found


def empty(found: dict[tuple[str, str], str]) -> list[tuple[str, str]]:
    """Cells of which nothing is known."""
    return [(name, column) for name in NAMES for column in COLUMNS if (name, column) not in found]


def written(found: dict[tuple[str, str], str]) -> str:
    """The table, and its reasons as notes."""
    notes: dict[str, int] = {}
    mark = lambda text: text if text == "✓" else f"[{notes.setdefault(text, len(notes) + 1)}]"
    rows = [f"| {name} | " + " | ".join(mark(found[name, column]) for column in COLUMNS) + " |" for name in NAMES]
    return "\n".join(
        [
            "# Methods and their tests\n",
            "Written by `make methods`, which runs what tests/methods/table.py names. ✓: passed. A number: not defined, because.\n",
            "golden: figures of the paper or of published code. forward: the definition on whole tensors, float64, within 1e-12.",
            "backward: its gradients, those of parameters too, within 1e-10. in parts: chunks, and tokens decoded one by one, say what the",
            "whole says.\n",
            f"| method | {' | '.join(COLUMNS)} |",
            "| --- |" + " --- |" * len(COLUMNS),
            *rows,
            "",
            *(f"{n}. {text[0].upper()}{text[1:]}." for text, n in notes.items()),
            "",
        ]
    )


def main() -> int:
    """Run the tests and write the table."""
    outcomes = Outcomes()
    named = [test.partition("[")[0] for test in COVERS]
    pytest.main(["-q", "-p", "no:cacheprovider", *dict.fromkeys([*named, "tests/ranks/test_methods.py"])], plugins=[outcomes])
    found = cells(outcomes.passed)
    missing = empty(found)
    if outcomes.failed or missing:
        print(*(f"failed: {test}" for test in outcomes.failed), *(f"empty: {name}, {column}" for name, column in missing), sep="\n")
        return 1
    OUT.write_text(written(found))
    print(f"{len(NAMES)} methods in {OUT.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
