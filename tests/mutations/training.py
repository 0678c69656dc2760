"""Training's silent errors: those that users of other libraries lost weeks to, and those of tiles, checkpoints and loaders."""

from __future__ import annotations

from tests.mutations.kinds import Mutation

TRAINING = "ringctx/training/"
RANKS = "tests/ranks/test_embed.py::"
SAME = "test_loss_and_gradients_are_those_of_transformers"
ODD = (f"{RANKS}{SAME}[2-2-odd-zigzag-plain]",)
PACKED = (f"{RANKS}{SAME}[4-2-packed-documents-plain]",)
TILED = (f"{RANKS}{SAME}[2-2-odd-zigzag-tiled]", f"{RANKS}test_every_rank_computes_as_many_tiles")
ONE_BATCH = tuple(f"{RANKS}test_a_ring_has_one_batch_and_every_sequence_is_trained_on[{kind}]" for kind in ("split", "by ring"))

TRAINED = (
    Mutation(
        "labels_after_shards",
        TRAINING + "share.py",
        '{"labels": labels[:, own]}',
        '{"labels": torch.nn.functional.pad(batch["labels"][:, own][:, 1:], (0, 1), value=IGNORED)}',
        "labels are shifted within a shard",
        ODD,
    ),
    Mutation(
        "labels_not_shifted",
        TRAINING + "share.py",
        "torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)",
        "labels",
        "labels are not shifted",
        ODD,
    ),
    Mutation(
        "loss_by_rank",
        TRAINING + "loss.py",
        "return (total_of_all / labels.clamp(min=1))",
        "return (total.double() / count.clamp(min=1))",
        "each rank says the mean of its own labels",
        ODD,
    ),
    Mutation(
        "gradient_by_rank",
        TRAINING + "loss.py",
        "ctx.weight = len(everyone) / labels.clamp(min=1)",
        "ctx.weight = 1 / count.clamp(min=1)",
        "gradients are those of the mean of each rank's own means",
        ODD,
    ),
    Mutation(
        "gradient_of_ring_size",
        TRAINING + "loss.py",
        "ctx.weight = len(everyone) / labels.clamp(min=1)",
        "ctx.weight = 1 / labels.clamp(min=1)",
        "gradients are divided by the number of ranks once too often",
        ODD,
    ),
    Mutation(
        "gradients_summed",
        TRAINING + "step.py",
        "part.copy_(total / self.job.size)",
        "part.copy_(total)",
        "gradients are summed where the loss expects their average",
        ("tests/ranks/test_training.py::test_steps_are_the_same_on_every_rank_and_as_on_one[plain]",),
    ),
    Mutation(
        "labels_of_one_ring",
        TRAINING + "job.py",
        "if self.data_size == 1:",
        "if True:",
        "the mean is over one ring's labels, not over those of all rings",
        PACKED,
    ),
    Mutation(
        "positions_local",
        TRAINING + "share.py",
        '"position_ids": own[None]}',
        '"position_ids": torch.arange(len(own))[None]}',
        "positions count from the shard's first token",
        ODD,
    ),
    Mutation(
        "documents_ignored",
        TRAINING + "job.py",
        "job.context.running(share.layout, documents=share.documents)",
        "job.context.running(share.layout)",
        "packed documents see each other",
        PACKED,
    ),
    Mutation(
        "documents_of_first_row",
        TRAINING + "share.py",
        "if not bool((numbers == first).all()):",
        "if False:",
        "all sequences are cut where the first is",
        (f"{RANKS}{SAME}[3-3-packed-contiguous-plain]",),
    ),
    Mutation(
        "documents_by_zero",
        TRAINING + "share.py",
        "positions[:, 1:] != positions[:, :-1] + 1",
        "positions[:, 1:] < 0",
        "positions that begin anew are not seen",
        PACKED,
    ),
    Mutation(
        "padding_seen",
        TRAINING + "share.py",
        "numbers.masked_fill(mask == 0, -1)",
        "numbers",
        "padding is read",
        ("tests/unit/test_share.py::test_padding_is_a_document_of_its_own",),
    ),
    Mutation(
        "ring_reads_different_batches",
        TRAINING + "loader.py",
        "if any(read != mine[0] for read in mine):",
        "if False:",
        "the ranks of a ring train on parts of different batches",
        (f"{RANKS}test_different_batches_in_a_ring_are_refused_by_every_rank",),
    ),
    Mutation(
        "ring_takes_no_turns",
        TRAINING + "loader.py",
        "return sampler.num_replicas == job.size",
        "return False",
        "a loader that is split over all ranks is taken for one that is not",
        ONE_BATCH,
    ),
    Mutation(
        "turns_of_one",
        TRAINING + "loader.py",
        "owner = having[turn] if turn < len(having) else having[-1]",
        "owner = having[0]",
        "one rank's batches are trained on again and again, the others' never",
        ONE_BATCH,
    ),
    Mutation(
        "data_ranks_interleaved",
        TRAINING + "job.py",
        '"data_rank": rank // size}',
        '"data_rank": rank % (world // size)}',
        "ranks of a ring believe to be of different data ranks",
        ONE_BATCH,
    ),
    Mutation(
        "tiles_of_own",
        TRAINING + "tiled.py",
        "max(int(count) for count in gather(",
        "max(int(count) for count in (lambda x: [x])(",
        "ranks compute different numbers of tiles, which hangs where weights are gathered",
        TILED,
    ),
    Mutation(
        "tiles_of_first",
        TRAINING + "tiled.py",
        "torch.stack(tiles.each(of_tile, hidden, labels)).sum()",
        "tiles.each(of_tile, hidden, labels)[0]",
        "the loss of one tile only",
        TILED,
    ),
    Mutation(
        "recompute_sends_again",
        TRAINING + "recompute.py",
        "create_selective_checkpoint_contexts([torch.ops.ringctx.attention.default])",
        "create_selective_checkpoint_contexts([torch.ops.aten.mm.default])",
        "keys travel again in backward",
        (f"{RANKS}test_computing_again_sends_nothing_again",),
    ),
    Mutation(
        "recompute_elsewhere",
        TRAINING + "recompute.py",
        "context.running(layout, documents=documents)",
        "context.running(context.layout, documents=context.documents)",
        "layers are computed again for the batch that came last",
        (f"{RANKS}test_layers_are_computed_again_where_their_own_batch_lives",),
    ),
)
