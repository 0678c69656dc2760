"""Methods of several attentions that choose, gather, remember or weigh wrongly."""

from __future__ import annotations

from tests.mutations.kinds import CORE, Mutation

METHODS = "ringctx/methods/"
CONTRACT = "tests/ranks/test_methods.py::test_it_is_its_definition_forward_and_backward"
PARTS = "tests/ranks/test_methods.py::test_chunks_and_single_tokens_say_what_the_whole_says"
NSA = (f"{CONTRACT}[NSA-1]", f"{CONTRACT}[NSA-2]", f"{PARTS}[NSA-2]")
INFINI = (
    "tests/ranks/test_infini.py::test_it_is_the_recurrence_forward_and_backward[False-2]",
    "tests/ranks/test_infini.py::test_it_is_the_recurrence_forward_and_backward[True-2]",
)

FUNCTIONS = (
    Mutation(
        "gathered_own_slope_alone",
        CORE + "gathered.py",
        "return sum(said[1:], said[0]), None, None, None",
        "return parts[ring.rank].contiguous(), None, None, None",
        "what other ranks say of a gathered row is dropped in backward",
        (f"{CONTRACT}[NSA-2]",),
    ),
    Mutation(
        "nsa_own_block_not_forced",
        METHODS + "nsa.py",
        ".masked_fill(n == own, float(group))",
        "",
        "a query's own block must win its place by its mean",
        NSA,
    ),
    Mutation(
        "nsa_block_seen_early",
        METHODS + "nsa.py",
        "ends = range(self.block - 1,",
        "ends = range(0,",
        "a block's mean is seen from its first token on, and tells of later ones",
        NSA,
    ),
    Mutation(
        "nsa_heads_choose_alone",
        METHODS + "nsa.py",
        ".softmax(-1).nan_to_num(0.0).sum(2)",
        ".softmax(-1).nan_to_num(0.0)[:, :, 0]",
        "the first head of a group chooses for all of it",
        NSA,
    ),
    Mutation(
        "indexer_looks_ahead",
        METHODS + "indexer.py",
        "largest(scores.masked_fill(~seen, -torch.inf), top))",
        "largest(scores, top))",
        "keys after the query take places among the largest",
        (f"{CONTRACT}[DSA's lightning indexer-1]",),
    ),
    Mutation(
        "infini_reads_its_own_segment",
        METHODS + "infini.py",
        "            found.append(state.read(q_))\n            state = state.added(k_, v_, True)",
        "            state = state.added(k_, v_, True)\n            found.append(state.read(q_))",
        "a segment reads what it has just put in",
        INFINI[1:],
    ),
    Mutation(
        "infini_first_ranks_memory",
        METHODS + "infini.py",
        "sums[: ring.rank].sum(0)",
        "sums[: ring.rank + 1].sum(0)",
        "a rank's own segments are in the memory that its first one reads",
        INFINI[:1],
    ),
    Mutation(
        "infini_sent_without_slope",
        METHODS + "infini.py",
        "            far = far + _send(ring, state.packed())",
        "            far = far + _send(ring, state.packed().detach())",
        "the gradient of a state that was handed on is not waited for",
        INFINI[1:],
    ),
    Mutation(
        "dilated_means_of_reaches",
        METHODS + "longformer.py",
        "torch.stack([lse for _, lse in parts]).softmax(0).unsqueeze(-1)",
        "(torch.stack([lse for _, lse in parts]).softmax(0) * 0 + 1 / len(parts)).unsqueeze(-1)",
        "reaches count alike, whatever their denominators",
        (f"{CONTRACT}[LongNet-1]",),
    ),
    Mutation(
        "apb_blocks_of_all_heads",
        METHODS + "apb.py",
        "largest(inside[at].T, self.passing)",
        "largest(inside[at].mean(1, keepdim=True).expand_as(inside[at]).T, self.passing)",
        "all heads pass the same keys",
        (f"{CONTRACT}[APB-1]",),
    ),
    Mutation(
        "residue_in_equal_parts",
        CORE + "layout.py",
        "        if dilation % size == 0:  # whole classes to each rank",
        "        if False:",
        "a token of a class lies on another rank, and its keys travel",
        (
            "tests/ranks/test_traffic.py::test_atrous_attention_sends_nothing_on_the_residue_layout_where_the_ranks_divide_the_rate[2-fetch]",
        ),
    ),
    Mutation(
        "star_without_anchor",
        "ringctx/patterns.py",
        "(Sinks(block) | Chunks(block, 1) | From(context))",
        "(Chunks(block, 1) | From(context))",
        "blocks of the context see no anchor",
        ("tests/ranks/test_trained_sparse.py::test_star_is_blocks_beside_their_anchor_and_then_a_merge",),
    ),
)
