"""Headers, deadlines, shared plans and caches that no longer keep their word."""

from __future__ import annotations

from tests.mutations.kinds import CORE, Mutation, promise, unit

STORAGE = "ringctx/runtime/storage.py"

CALLS_AND_CACHES = (
    Mutation(
        "header_without_dtype",
        CORE + "call.py",
        '"dtype": str(q.dtype).removeprefix("torch."),',
        '"dtype": "any",',
        "ranks that differ in dtype are not found out",
        promise("test_a_rank_that_differs_is_a_sentence_on_every_rank[dtype]"),
    ),
    Mutation(
        "header_by_length",
        CORE + "call.py",
        'f"{self.layout} ({_digest(self.layout)})"',
        'f"{self.layout}"',
        "a zigzag rank among striped ones is not found out",
        promise("test_a_rank_that_differs_is_a_sentence_on_every_rank[layout]"),
    ),
    Mutation(
        "header_ignored",
        CORE + "header.py",
        "raise RanksDisagree(sentence(notes))",
        "return",
        "a mismatch is noticed and nothing comes of it",
        promise("test_a_rank_that_differs_is_a_sentence_on_every_rank[seed]"),
    ),
    Mutation(
        "deadline_without_peer",
        CORE + "ring.py",
        "{what} {direction} rank {peer}: {why}",
        "{what}: {why}",
        "a missed deadline does not say who is missing",
        promise("test_a_missed_deadline_names_the_peer_and_the_hop"),
    ),
    Mutation(
        "plan_shared_by_scales",
        CORE + "attention.py",
        "self.dropout, self.scale)",
        "self.dropout)",
        "two layers that differ in scale share one cached call",
        promise("test_calls_that_differ_in_one_number_do_not_share_a_plan"),
    ),
    Mutation(
        "cache_token_by_token",
        "ringctx/runtime/cache.py",
        "self._grown // self.page % self.size",
        "self._grown % self.size",
        "new tokens change ranks at every token instead of every page",
        unit("cache", "test_new_tokens_go_to_the_ranks_in_turn_a_page_at_a_time"),
    ),
    Mutation(
        "cache_on_every_rank",
        "ringctx/runtime/cache.py",
        "if owner == self.rank:",
        "if owner >= 0:",
        "every rank keeps every new token, so each weighs as often as there are ranks",
        unit("cache", "test_every_token_is_kept_once_where_the_layout_says"),
    ),
    Mutation(
        "cache_stale_rotation",
        "ringctx/runtime/cache.py",
        "self._layout.indices(self.rank, keys.device)[done:]",
        "self._layout.indices(self.rank, keys.device)[: keys.shape[1] - done]",
        "new keys are rotated by the indices of old ones",
        unit("cache", "test_the_rotated_copy_is_the_keys_rotated"),
    ),
    Mutation(
        "cache_lost_page",
        STORAGE,
        "grown[: self.count] = self.data",
        "grown[: self.count - 1] = self.data[1:]",
        "when memory grows, tokens move one place",
        unit("cache", "test_every_token_is_kept_once_where_the_layout_says"),
    ),
    Mutation(
        "storage_halves",
        STORAGE,
        "codes[..., 0::2] | codes[..., 1::2] << 4",
        "codes[..., 1::2] | codes[..., 0::2] << 4",
        "the two numbers of a byte change places",
        unit("storage", "test_four_bits_are_packed_two_to_a_byte_the_even_channel_low"),
    ),
    Mutation(
        "storage_page_unkept",
        STORAGE,
        "originals[:, closed + (full - 1) * self.group :].clone()",
        "originals[:, closed + full * self.group :].clone()",
        "the originals of the last full page are thrown away, so no token of it can be dropped",
        unit("storage", "test_the_open_page_and_the_one_before_can_be_dropped_token_by_token"),
    ),
    Mutation(
        "storage_page_cut",
        STORAGE,
        "if count % self.group and count < start:",
        "if count % self.group and count < 0:",
        "a quantised page loses some of its tokens, and more than was asked are gone",
        unit("storage", "test_a_quantised_page_is_not_cut"),
    ),
    Mutation(
        "storage_one_step_for_all_channels",
        STORAGE,
        "x.aminmax(dim=shared, keepdim=True)",
        "(t.expand_as(x.amin(dim=shared, keepdim=True)) for t in x.aminmax())",
        "an outlier takes the precision of all other channels",
        unit("storage", "test_no_number_is_further_off_than_half_a_step_of_its_group"),
    ),
    Mutation(
        "models_window",
        "ringctx/huggingface/wrap.py",
        "asked.pattern & window(width)",
        "asked.pattern & window(width - 1)",
        "a model's window of W keys is read as W - 1",
        unit("huggingface", "test_a_wrapped_model_says_what_it_said_and_unwraps"),
    ),
)
