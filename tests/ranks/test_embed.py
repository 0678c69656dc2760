"""A job's ranks: whoever shares a ring gets parts of one batch, each ring another, and losses and gradients are those of one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler

pytest.importorskip("transformers")

from ringctx.core.header import share
from ringctx.core.ring import Ring
from ringctx.embed import Job, join
from ringctx.errors import ConfigError, RanksDisagree, Unsupported
from ringctx.training.recompute import enable, recompute
from tests.embedded import alone, batches
from tests.pool import Pool, RankFailed
from tests.tiny import tiny


def job_on(ring: Ring, size: int, **asked: Any) -> Job:
    return join(tiny(asked.pop("kind", "llama")).train(), ring=size, group=ring.group, timeout=20.0, **asked)


def gradients(ring: Ring, size: int, case: str, asked: dict[str, Any]) -> tuple[float, list[Tensor]]:
    """The loss of the first batch, and the average of all ranks' gradients, as engines make it."""
    again = asked.pop("recompute", False)
    job = job_on(ring, size, **asked)
    if again:
        recompute(job.model, job.context)
    batch = next(batches(case))
    rows = {name: x[job.data_rank :: job.data_size] for name, x in batch.items()}
    loss = job.model(**job.share(rows)).loss
    ring.traffic.reset()
    loss.backward()
    grads = [sum(share(ring, p.grad, "grads")) / ring.size for p in job.model.parameters()]
    return float(loss.detach()), grads


def by_transformers(kind: str, case: str) -> tuple[float, list[Tensor]]:
    model = tiny(kind).train()
    loss = model(**next(batches(case)), use_cache=False).loss
    loss.backward()
    return float(loss.detach()), [p.grad for p in model.parameters()]


@pytest.mark.parametrize(
    "asked", [{}, {"tile": 5}, {"recompute": True}, {"tile": 7, "recompute": True}], ids=["plain", "tiled", "again", "both"]
)
@pytest.mark.parametrize(
    ("ranks", "size", "case", "layout"), [(2, 2, "odd", "zigzag"), (4, 2, "packed", "documents"), (3, 3, "packed", "contiguous")]
)
def test_loss_and_gradients_are_those_of_transformers(
    pool: Pool, ranks: int, size: int, case: str, layout: str, asked: dict[str, Any]
) -> None:
    loss, grads = by_transformers("llama", case)
    for theirs, of_theirs in pool.run(gradients, size, case, {"layout": layout, **asked}, size=ranks):
        assert abs(theirs - loss) <= 1e-6 * loss
        assert all(float((a - b).norm()) <= 5e-6 * float(b.norm()) for a, b in zip(of_theirs, grads, strict=True))


def test_checkpoints_in_the_hosts_memory_change_nothing_and_are_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import modeling_utils

    loss, grads = by_transformers("llama", "odd")
    job = Job.on(Ring.alone(), tiny().train())
    with pytest.raises(Unsupported, match="this model is on a CPU; leave it out"):
        recompute(job.model, job.context, offload=True)
    saved = []

    def save(**asked: Any) -> Any:  # as on a GPU, but for pinning
        saved.append(asked)
        return torch.autograd.graph.save_on_cpu(pin_memory=False)

    monkeypatch.setattr(modeling_utils, "save_on_cpu", save)
    enable(job.model, job.context, offload=True)
    found = job.model(**job.share(next(batches("odd")))).loss
    found.backward()
    assert len(saved) == len(job.model.model.layers) and all(asked["pin_memory"] for asked in saved)
    assert abs(float(found.detach()) - loss) <= 1e-6 * loss
    assert all(float((p.grad - x).norm()) <= 5e-6 * float(x.norm()) for p, x in zip(job.model.parameters(), grads, strict=True))


def test_who_checkpoints_a_model_by_its_own_methods_gets_the_same_gradients_and_by_others_a_sentence() -> None:
    loss, grads = by_transformers("llama", "packed")
    job = Job.on(Ring.alone(), tiny().train())
    job.model.activation_checkpointing_enable({"use_reentrant": True})
    found = job.model(**job.share(next(batches("packed")))).loss
    found.backward()
    assert abs(float(found.detach()) - loss) <= 1e-6 * loss
    assert all(float((p.grad - x).norm()) <= 5e-6 * float(x.norm()) for p, x in zip(job.model.parameters(), grads, strict=True))
    with pytest.raises(Unsupported, match="leave context_fn out"):
        job.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"context_fn": list})
    job = Job.on(Ring.alone(), tiny().train())
    for layer in job.model.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    found = job.model(**job.share(next(batches("packed")))).loss
    with pytest.raises(ConfigError, match="outside the model's forward.*gradient_checkpointing_enable"):
        found.backward()
    assert job.model(input_ids=torch.arange(5)[None], use_cache=False).logits.shape[1] == 5  # one rank, and no labels: nothing to be said


def breaks(ring: Ring, case: str) -> tuple[int, set[str]]:
    """Graphs of a compiled forward, and where it breaks: files and functions."""
    job = Job.on(ring, tiny("llama").train())
    batch = job.share(next(batches(case)))
    job.model(**batch)
    torch._dynamo.reset()
    found = torch._dynamo.explain(job.model)(**batch)
    return found.graph_count, {f"{Path(one.user_stack[-1].filename).name}:{one.user_stack[-1].name}" for one in found.break_reasons}


@pytest.mark.filterwarnings("ignore")  # Dynamo looks at gradients of tensors that have none
def test_a_compiled_model_is_one_graph_up_to_where_ranks_gather_losses(pool: Pool) -> None:
    end = "job.py:_with_loss"
    assert breaks(Ring.alone(), "plain") == (1, {end})
    assert pool.run(breaks, "plain", size=2) == [(1, {end})] * 2
    assert breaks(Ring.alone(), "packed")[1] == {"context.py:attend", end}  # documents are planned anew for every batch


def compiled(ring: Ring, case: str) -> tuple[float, list[Tensor]]:
    """As `gradients`, by layers that are one graph each."""
    job = job_on(ring, ring.size)
    batch = job.share(next(batches(case)))
    job.model(**batch)
    torch._dynamo.reset()
    for layer in job.model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    loss = job.model(**batch).loss
    loss.backward()
    return float(loss.detach()), [sum(share(ring, p.grad, "grads")) / ring.size for p in job.model.parameters()]


def test_compiled_layers_are_one_graph_each_and_compute_the_same(pool: Pool) -> None:
    loss, grads = by_transformers("llama", "odd")
    for theirs, of_theirs in pool.run(compiled, "odd", size=2):
        assert abs(theirs - loss) <= 1e-6 * loss
        assert all(float((a - b).norm()) <= 5e-6 * float(b.norm()) for a, b in zip(of_theirs, grads, strict=True))


@pytest.mark.parametrize("kind", ["gemma2", "granite", "gpt_oss"])
def test_what_a_family_does_behind_its_body_is_done_to_tiles(pool: Pool, kind: str) -> None:
    loss, grads = by_transformers(kind, "odd")
    asked = {"kind": kind} | ({} if kind == "gpt_oss" else {"tile": 6})
    for theirs, of_theirs in pool.run(gradients, 2, "odd", asked, size=2):
        assert abs(theirs - loss) <= 2e-6 * loss
        assert all(float((a - b).norm()) <= 2e-5 * float(b.norm()) for a, b in zip(of_theirs, grads, strict=True))


def read(ring: Ring, size: int, kind: str) -> tuple[int, list[list[int]]]:
    """Which ring this rank is of, and the first ids of each batch that its ring trained on."""
    job = job_on(ring, size)
    rows = [{"input_ids": torch.full((8,), n), "labels": torch.full((8,), n)} for n in range(12)]
    if kind == "split":
        sampler: Any = DistributedSampler(rows, num_replicas=job.size, rank=ring.rank, shuffle=False)  # type: ignore[arg-type]
    elif kind == "by ring":
        sampler = DistributedSampler(rows, num_replicas=job.data_size, rank=job.data_rank, shuffle=False)  # type: ignore[arg-type]
    else:
        sampler = None
    loader = job.loader(DataLoader(rows, batch_size=2, sampler=sampler))  # type: ignore[arg-type]
    found = [batch["input_ids"][:, 0].tolist() for batch in loader]
    assert len(found) == len(loader)
    return job.data_rank, found


@pytest.mark.parametrize("kind", ["split", "by ring", "alike"])
def test_a_ring_has_one_batch_and_every_sequence_is_trained_on(pool: Pool, kind: str) -> None:
    found = pool.run(read, 2, kind, size=4)
    of_ring = {ring: [seen for number, seen in found if number == ring] for ring in (0, 1)}
    assert all(seen[0] == seen[1] for seen in of_ring.values())
    everything = sorted(row for seen in of_ring.values() for batch in seen[0] for row in batch)
    assert everything == (sorted([*range(12)] * 2) if kind == "alike" else list(range(12)))


def different(ring: Ring) -> None:
    job = job_on(ring, 2)
    rows = [{"input_ids": torch.full((1, 8), ring.rank)}]
    next(iter(job.loader(rows)))


def test_different_batches_in_a_ring_are_refused_by_every_rank(pool: Pool) -> None:
    with pytest.raises(RankFailed) as failed:
        pool.run(different, size=2)
    assert sorted(failed.value.errors) == [0, 1]
    assert all(isinstance(error, RanksDisagree) and "DistributedSampler" in str(error) for error in failed.value.errors.values())


def sent_by_recomputing(ring: Ring, again: bool) -> dict[str, int]:
    """What the backward sent, by kind."""
    job = job_on(ring, ring.size)
    if again:
        recompute(job.model, job.context)
    loss = job.model(**job.share(next(batches("odd")))).loss
    job.ring.traffic.reset()
    loss.backward()
    return dict(job.ring.traffic.sent)


def test_computing_again_sends_nothing_again(pool: Pool) -> None:
    assert pool.run(sent_by_recomputing, True, size=2) == pool.run(sent_by_recomputing, False, size=2)


def backward_after_another_batch(ring: Ring) -> list[Tensor]:
    job = job_on(ring, ring.size)
    recompute(job.model, job.context)
    first, second = (job.share(batch) for batch in [*batches("packed")][:2])
    loss = job.model(**first).loss
    job.model(**{**second, "labels": None})
    loss.backward()
    return [sum(share(ring, p.grad, "grads")) / ring.size for p in job.model.parameters()]


def test_layers_are_computed_again_where_their_own_batch_lives(pool: Pool) -> None:
    _, grads = by_transformers("llama", "packed")
    for found in pool.run(backward_after_another_batch, size=2):
        assert all(float((a - b).norm()) <= 5e-6 * float(b.norm()) for a, b in zip(found, grads, strict=True))


def tiles(ring: Ring) -> int:
    """How many tiles this rank computes of a batch that gives its ranks different numbers of tokens."""
    job = job_on(ring, ring.size, tile=4, layout="contiguous")
    job.model(**job.share({"input_ids": torch.ones(1, 9, dtype=torch.int64), "labels": torch.ones(1, 9, dtype=torch.int64)}))
    assert job.tiles is not None
    return job.tiles.count


def test_every_rank_computes_as_many_tiles(pool: Pool) -> None:
    assert pool.run(tiles, size=2) == [2, 2]  # of 5 and 4 tokens


def test_the_reference_learns() -> None:
    seen = alone("llama", "plain", "adamw")
    assert seen.losses[-1] != seen.losses[0]
    assert not dist.is_initialized() or dist.get_world_size() == 1
