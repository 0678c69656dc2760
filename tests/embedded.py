"""Steps of training with an engine over rings, against the same steps by transformers alone in one process.

Started on several ranks with cells as arguments, ENGINE-ring-data-CASE; each rank 0 writes what it saw to FOLDER/cell.pt.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringctx import Attention
from ringctx.patterns import causal, sinks, window
from tests.tiny import tiny

ROOT = Path(__file__).resolve().parents[1]
ENGINES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")
CASES = ("plain", "packed", "odd", "windowed")
STEPS, ROWS = 20, 2
WINDOWED = Attention(causal() & (window(11) | sinks(3)))
LENGTHS = {"plain": 48, "packed": 50, "odd": 37, "windowed": 44}


@dataclass(frozen=True)
class Seen:
    """Of each step the loss and the gradient's norm, and every parameter at the end."""

    losses: list[float]
    norms: list[float]
    params: dict[str, Tensor]


def model_of(kind: str) -> Any:
    """A small Llama or Qwen3 in training."""
    return tiny(kind).train()


def batches(case: str) -> Iterator[dict[str, Tensor]]:
    """Whole batches of ROWS sequences. Rows have different numbers of labels, and some shards none."""
    length = LENGTHS[case]
    for step in range(STEPS):
        make = torch.Generator().manual_seed(step)
        ids = torch.randint(3, 97, (ROWS, length), generator=make)
        labels = ids.clone()
        labels[0, : length - 9] = -100
        batch = {"input_ids": ids, "labels": labels}
        if case == "packed":
            cuts = torch.randint(1, length, (ROWS, 3), generator=make).sort().values
            begins = torch.zeros(ROWS, length, dtype=torch.int64).scatter_(1, cuts, 1)
            begins[:, 0] = 1
            starts = (begins * torch.arange(length)).cummax(1).values
            batch["position_ids"] = torch.arange(length) - starts
            batch["labels"][begins.bool()] = -100
        yield batch


def optimizer_of(params: Any, name: str) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW."""
    return torch.optim.SGD(params, 0.05, momentum=0.9) if name == "sgd" else torch.optim.AdamW(params, 1e-3)


def alone(kind: str, case: str, optimizer: str) -> Seen:
    """transformers by itself, one process; of the windowed case a ring of one, since it knows no sinks."""
    from ringctx.embed import join

    torch.manual_seed(0)
    model = model_of(kind)
    model.set_attn_implementation("sdpa")
    job = join(model, attention=WINDOWED) if case == "windowed" else None
    steps, losses, norms = optimizer_of(model.parameters(), optimizer), [], []
    for batch in batches(case):
        loss = model(**(job.share(batch) if job else {**batch, "use_cache": False})).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)))
        losses.append(float(loss.detach()))
        steps.step()
        steps.zero_grad()
    return Seen(losses, norms, {name: p.detach().clone() for name, p in model.named_parameters()})


def embedded(engine: str, ring: int, kind: str, case: str, optimizer: str, **asked: Any) -> Seen:
    """The same over rings."""
    return (_deepspeed if engine.startswith("zero") else _torch)(engine, ring, kind, case, optimizer, asked)


def _rows(job: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sequences of this rank's data rank."""
    rows = range(job.data_rank, ROWS, job.data_size)
    return {name: x[list(rows)] for name, x in batch.items()}


def _torch(engine: str, ring: int, kind: str, case: str, optimizer: str, asked: dict[str, Any]) -> Seen:
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from ringctx.embed.accelerate import join

    model = model_of(kind)
    job = join(model, ring=ring, attention=WINDOWED if case == "windowed" else None, **asked)
    trained: Any = model
    if engine == "ddp":
        trained = DistributedDataParallel(model)
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    steps, losses, norms = optimizer_of(model.parameters(), optimizer), [], []
    for batch in job.loader([_rows(job, batch) for batch in batches(case)]):
        loss = trained(**batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        losses.append(float(loss.detach()))
        steps.step()
        steps.zero_grad()
    whole = lambda p: p.full_tensor() if hasattr(p, "full_tensor") else p
    return Seen(losses, norms, {name: whole(p).detach().clone() for name, p in model.named_parameters()})


def _deepspeed(engine: str, ring: int, kind: str, case: str, optimizer: str, asked: dict[str, Any]) -> Seen:
    import deepspeed

    from ringctx.embed.deepspeed import join

    deepspeed.init_distributed("gloo", verbose=False)
    model = model_of(kind)
    job = join(model, ring=ring, attention=WINDOWED if case == "windowed" else None, **asked)
    config = {
        "train_micro_batch_size_per_gpu": ROWS // job.data_size,
        "zero_optimization": {"stage": int(engine[-1])},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # 1.0 where nothing is said
    }
    trained, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model.parameters(), optimizer), config=config, mpu=job.mpu)
    losses, norms = [], []
    for batch in job.loader([_rows(job, batch) for batch in batches(case)]):
        loss = trained(**batch).loss
        trained.backward(loss)
        if engine == "zero0":  # of which DeepSpeed reports no norm in fp32
            norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))
        trained.step()
        losses.append(float(loss.detach()))
        if engine != "zero0":
            norms.append(float(trained.get_global_grad_norm()))
    params = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(params.values())):
        return Seen(losses, norms, {name: p.detach().clone() for name, p in params.items()})


def error(seen: Seen, want: Seen) -> dict[str, float]:
    """The largest relative errors of losses, norms and parameters (Frobenius, of each tensor)."""
    rows = {"losses": (seen.losses, want.losses), "norms": (seen.norms, want.norms)}
    found = {name: max(abs(a - b) / abs(b) for a, b in zip(*both, strict=True)) for name, both in rows.items()}
    return found | {"params": max(float((seen.params[name] - p).norm() / p.norm()) for name, p in want.params.items())}


BARS = {"losses": 1e-5, "norms": 1e-5, "params": 1e-5}
LOOSE = BARS | {"params": 1e-3}
"""Of AdamW, which makes whole steps of round-off where a gradient vanishes."""


def wrong(cell: str, seen: Seen, want: Seen) -> list[str]:
    """What is further off than its bar, in words."""
    bars = BARS if cell.endswith("sgd") else LOOSE
    return [f"{name} {value:.1e}" for name, value in error(seen, want).items() if not value <= bars[name]]


def launch(folder: Path, ranks: int, cells: Sequence[str]) -> None:
    """Run cells on so many ranks; raises CalledProcessError with what they said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "tests.embedded"]
    quick = ROOT / "tests" / "launch" / "quick"  # makes DeepSpeed begin without compiling
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{quick}{os.pathsep}{ROOT}"}
    done = subprocess.run([*command, str(folder), *cells], cwd=ROOT, env=kept, text=True, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{ranks} ranks ended with {done.returncode}\n{done.stderr[-3000:]}")


FOLDS = ((1, 1), (2, 1), (1, 2), (4, 1), (2, 2))
"""Rings of so many ranks, and so many of them."""
AT_ONCE = 10


def grid(folder: Path) -> int:
    """Run every cell that is not in the folder yet, print what is wrong; 1 if anything is."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = itertools.product(FOLDS, ENGINES, CASES, ("llama", "qwen3"), ("sgd", "adamw"))
    cells = {f"{engine}-{ring}-{data}-{case}-{kind}-{name}": ring * data for (ring, data), engine, case, kind, name in kinds}
    for ranks in (1, 2, 4):
        missing = [cell for cell, need in cells.items() if need == ranks and not (folder / f"{cell}.pt").exists()]
        for a in range(0, len(missing), AT_ONCE):
            launch(folder, ranks, missing[a : a + AT_ONCE])
            print(f"{ranks} ranks: {min(a + AT_ONCE, len(missing))} of {len(missing)} cells", flush=True)
    reference, found, worst = cache(alone), 0, dict.fromkeys(BARS, 0.0)
    for cell in cells:
        _, _, _, case, kind, name = cell.split("-")
        seen, want = Seen(**torch.load(folder / f"{cell}.pt")), reference(kind, case, name)
        if said := wrong(cell, seen, want):
            found += 1
            print(f"{cell}: {', '.join(said)}")
        if name == "sgd":
            worst = {what: max(worst[what], value) for what, value in error(seen, want).items()}
    print(f"{len(cells)} cells, {found} wrong; largest with SGD: {', '.join(f'{what} {value:.1e}' for what, value in worst.items())}")
    return int(found > 0)


def main(folder: Path, cells: list[str]) -> None:
    """Run the cells that fit this number of ranks."""
    torch.set_num_threads(1)
    for cell in cells:
        engine, ring, _, case, kind, optimizer = cell.split("-")
        seen = embedded(engine, int(ring), kind, case, optimizer)
        if not dist.is_initialized() or dist.get_rank() == 0:
            torch.save(seen.__dict__, folder / f"{cell}.draft")
            (folder / f"{cell}.draft").rename(folder / f"{cell}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
