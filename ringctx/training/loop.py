"""Loop: steps from the newest checkpoint on, with a log, held-out losses, checkpoints and a picture.

Everything that is written is written by rank 0 into `training.out`:
    log.jsonl   a line a step and a line a held-out measurement    tensorboard/   the same, for TensorBoard
    loss.png    the curves    step-<n>/   the newest checkpoint    result.json    what `--json` prints
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ringctx.config import Config
from ringctx.config_training import TrainingConfig
from ringctx.core.header import agree, share
from ringctx.core.ring import Ring
from ringctx.device import peak_memory
from ringctx.errors import ConfigError
from ringctx.training import checkpoint
from ringctx.training.data import Data, Pairs, data_of
from ringctx.training.job import Job
from ringctx.training.measure import Measured, held_out
from ringctx.training.model import check, job_of
from ringctx.training.picture import draw
from ringctx.training.step import MakeTrainer, Taken, Trainer

logger = logging.getLogger(__name__)


@dataclass
class Progressed:
    """What a run has seen so far; it lies in every checkpoint. seconds: spent in steps."""

    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    memory_loss: list[float] = field(default_factory=list)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


def train(config: Config, ring: Ring, make: MakeTrainer = Trainer.of) -> dict[str, Any]:
    """Train as the configuration says; returns what `--json` prints. All ranks call it together. make: who takes the steps.

    Raises ConfigError where another run trains into the same folder.
    """
    check(config)
    out = Path(config.training.out)
    out.mkdir(parents=True, exist_ok=True)
    with _nobody_else(out, ring):
        return _train(config, ring, make, out)


@contextmanager
def _nobody_else(out: Path, ring: Ring) -> Iterator[None]:
    lock, problem = FileLock(out / "run.lock"), None
    if ring.rank == 0:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            problem = ConfigError(f"Another run trains into {out}; wait for it to end, or give training.out another folder.")
    try:
        agree(ring, {"what": "train"}, problem)
        yield
    finally:
        lock.release()


def _train(config: Config, ring: Ring, make: MakeTrainer, out: Path) -> dict[str, Any]:
    asked = config.training
    data, job = _made(config, ring, out)
    path, made_from = checkpoint.newest(out), _made_from(config)
    progress, state = Progressed(), None
    if path is not None:
        state, found = checkpoint.resume(path, made_from, _made_from(Config()))
        progress = Progressed(**{key.name: found[key.name] for key in dataclasses.fields(Progressed)})
        logger.info("Going on after step %d of %d, from %s.", len(progress.loss), asked.steps, path)
    trainer = make(job, asked, state)
    log = Log(out, ring.rank, len(progress.loss))
    with _bar(ring, len(progress.loss), asked.steps) as bar:
        if not progress.loss:
            _measure(0, trainer.job, data, progress, log)
        for step in range(len(progress.loss), asked.steps):
            began = time.perf_counter()
            taken = trainer.step(_batch(trainer.job, data.batch(step)), step)
            progress.seconds += time.perf_counter() - began
            _note(progress, taken)
            log.step(step + 1, taken, trainer.rate(step))
            bar(taken.loss)
            if (step + 1) % asked.evaluate_every == 0 or step + 1 == asked.steps:
                _measure(step + 1, trainer.job, data, progress, log)
            if (step + 1) % asked.save_every == 0 or step + 1 == asked.steps:
                _save(out, trainer, data, {"steps": step + 1, "made_from": made_from} | dataclasses.asdict(progress))
    return _result(trainer, out, progress, asked)


def _made(config: Config, ring: Ring, out: Path) -> tuple[Data, Job]:
    """Data and model; each needs the other's tokens where it has none of its own."""
    if config.training.scratch.layers:
        data = data_of(config.training, out, None)
        job = job_of(config, ring, len(data.tokenizer))
    else:
        from transformers import AutoTokenizer

        job = job_of(config, ring, None)
        data = data_of(config.training, out, AutoTokenizer.from_pretrained(job.model.config._name_or_path, local_files_only=True))
    count = sum(p.numel() for p in job.model.parameters())
    logger.info("%.2f M parameters, %d tokens a step on %d ranks.", count / 1e6, config.training.batch * config.training.context, ring.size)
    return data, job


def _batch(job: Job, pairs: Pairs) -> dict[str, Any]:
    ids, labels = pairs
    return job.share({"input_ids": ids, "shift_labels": labels})


def _made_from(config: Config) -> dict[str, Any]:
    """What a run must share with the checkpoint that it goes on from; how long and how often may change."""
    asked: dict[str, Any] = dataclasses.asdict(config.training)
    for name in ("out", "save_every", "evaluate_every", "held_out"):
        del asked[name]
    whole = {"attention": dataclasses.asdict(config)["attention"], "model": dataclasses.asdict(config.model), **asked}
    found: dict[str, Any] = json.loads(json.dumps(whole))
    return found


def _measure(steps: int, job: Job, data: Data, progress: Progressed, log: Log) -> None:
    found = [held_out(job, pairs) for pairs in data.held_out().values()]
    progress.held_out.append({"steps": steps, "rows": [dataclasses.asdict(one) for one in found]})
    log.measured(steps, found)


def _note(progress: Progressed, taken: Taken) -> None:
    progress.loss.append(taken.loss)
    progress.memory_loss.append(taken.memory)
    progress.grad_norm.append(taken.grad_norm)


def _save(out: Path, trainer: Trainer, data: Data, progress: dict[str, Any]) -> None:
    ring, state = trainer.job.ring, trainer.state()
    if ring.rank == 0:
        checkpoint.save(out, trainer.model, state, data.tokenizer, progress)
    share(ring, torch.zeros(1), "checkpoint")  # nobody goes on before it is on the disk


def _result(trainer: Trainer, out: Path, progress: Progressed, asked: TrainingConfig) -> dict[str, Any]:
    peaks = share(trainer.job.ring, torch.tensor([peak_memory(trainer.job.device)]), "memory")
    tokens = len(progress.loss) * asked.batch * asked.context
    result = {
        "steps": len(progress.loss),
        "loss": progress.loss,
        "grad_norm": progress.grad_norm,
        "memory_loss": progress.memory_loss,
        "held_out": progress.held_out,
        "tokens_per_second": tokens / max(progress.seconds, 1e-9),
        "memory": [int(x) for x in torch.cat(peaks)],
        "checkpoint": str(out / f"step-{len(progress.loss)}"),
    }
    if trainer.job.ring.rank == 0:
        (out / "result.json").write_text(json.dumps(result))
        draw(progress.loss, progress.held_out, out / "loss.png")
    return result


def summary(result: dict[str, Any]) -> str:
    """What a person is told at the end."""
    last = result["held_out"][-1]["rows"] if result["held_out"] else []
    exact = lambda one: "" if one["exact"] is None else f", exact {one['exact']:.1%}"
    said = [f"held out, {one['length']} tokens: loss {one['loss']:.4f}{exact(one)}" for one in last]
    speed = f"{result['steps']} steps, {result['tokens_per_second']:,.0f} tokens/s, loss {result['loss'][-1]:.4f}"
    return "\n".join([speed, *said, f"The model is in {result['checkpoint']}; `model.path` takes it."])


class Log:
    """log.jsonl and TensorBoard; silent on ranks other than 0. What a broken run wrote after its checkpoint is cut off."""

    board: Any

    def __init__(self, out: Path, rank: int, steps: int) -> None:
        self.path, self.board = out / "log.jsonl", None
        if rank:
            return
        from torch.utils.tensorboard import SummaryWriter

        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.path.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= steps))
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=steps + 1)

    def step(self, number: int, taken: Taken, rate: float) -> None:
        """After optimizer step `number`, counted from 1."""
        self._write(number, {"loss": taken.loss, "memory_loss": taken.memory, "grad_norm": taken.grad_norm, "learning_rate": rate})

    def measured(self, number: int, found: list[Measured]) -> None:
        """What held-out data say after so many steps."""
        for one in found:
            said = {"loss": one.loss} | ({} if one.exact is None else {"exact": one.exact})
            self._write(number, {f"held_out/{one.length}/{name}": value for name, value in said.items()})

    def _write(self, number: int, values: dict[str, float]) -> None:
        if self.board is None:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": number, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, number)
        self.board.flush()


@contextmanager
def _bar(ring: Ring, done: int, steps: int) -> Iterator[Callable[[float], None]]:
    """A bar of steps with the loss and an estimate of the time left; nothing on ranks other than 0."""
    if ring.rank:
        yield lambda loss: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("Training", total=steps, completed=done)
        yield lambda loss: progress.update(task, advance=1, description=f"Training, loss {loss:.3f}")
