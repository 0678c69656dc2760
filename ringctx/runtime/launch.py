"""Launch: N ranks on this machine through torch's elastic launcher, and one sentence and one exit code out of their ends.

Each rank leaves its end in the error file that torch names for it: a sentence, its exit code, and whether it was merely
stopped because another rank had failed.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

EXIT_BUG, EXIT_REQUEST, EXIT_LOST = 1, 2, 3
SHUTDOWN_SECONDS = 3
"""A rank that was told to stop because another had failed has this long; then it is killed."""
STOP_SECONDS = 20
"""The same when the launcher itself was told to stop: ranks that serve break off what they do and leave together."""

ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
"""Of ranks, unless said otherwise. glibc's malloc keeps small freed blocks apart for each thread, and those that lie beside tensors keep
the tensors' room from being used again: measured, 40 % more memory for layers of 8,192 tokens, and 5 % more time for its pages. It reads
this at its start, so no rank can say it for itself.
"""


@dataclass(frozen=True)
class End:
    """How a rank ended. survivor: it was told to stop because another rank had failed."""

    rank: int
    code: int
    sentence: str
    survivor: bool = False


def is_rank() -> bool:
    """True in a process that torchrun, or `run` below, started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_quiet() -> bool:
    """True when the launcher will say this rank's sentence, so the rank need not."""
    return "RINGCTX_LAUNCHER" in os.environ


def leave(end: End) -> None:
    """Write this rank's end where the launcher looks, in the form that torchrun reads too."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not (end.survivor and os.path.exists(path)):
        extra = {"timestamp": str(int(time.time())), "py_callstack": "", "exitcode": end.code, "survivor": end.survivor, "rank": end.rank}
        Path(path).write_text(json.dumps({"message": {"message": end.sentence, "errorCode": end.code, "extraInfo": extra}}))


def run(num_ranks: int, arguments: list[str]) -> int:
    """Run `python -m ringctx ARGUMENTS` on this many ranks; prints the cause's sentence, returns its exit code."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_ranks)))
    os.environ["RINGCTX_LAUNCHER"] = "1"
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="ringctx-") as folder:
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=num_ranks, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id=uuid.uuid4().hex,
            max_restarts=0, local_addr="localhost", logs_specs=DefaultLogsSpecs(log_dir=folder), shutdown_timeout=SHUTDOWN_SECONDS,
        )  # fmt: skip
        try:
            codes: list[int | None] = []
            with _short_shutdown(codes) as fallen:
                elastic_launch(config, sys.executable)("-m", "ringctx", *arguments)
        except ChildFailedError as error:
            silent = [End(rank, EXIT_LOST, _how(rank, failure.exitcode)) for rank, failure in error.failures.items() if rank in fallen]
            end = cause(_ends(Path(folder)), silent)
            click.echo(end.sentence, err=True)
            return end.code
        except SignalException as error:
            if codes and not any(codes):
                return 0  # every rank took the signal as the end of its work
            click.echo(f"Stopped by {signal.Signals(error.sigval).name}.", err=True)
            return 128 + int(error.sigval)
    return 0


@contextmanager
def _short_shutdown(codes: list[int | None]) -> Iterator[set[int]]:
    """Within it, torch gives ranks SHUTDOWN_SECONDS to stop when another has failed; it has 30 s written in, and no option.

    The set fills with the ranks that had ended before torch stopped the others: only these fell by themselves.
    codes: becomes the exit codes of all ranks.
    """
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext

    fallen: set[int] = set()
    close = SubprocessContext.close

    def close_soon(self: SubprocessContext, death_sig: signal.Signals | None = None, timeout: int = SHUTDOWN_SECONDS) -> None:
        if not fallen:
            fallen.update(rank for rank, handler in self.subprocess_handlers.items() if handler.proc.poll() is not None)
        close(self, death_sig, SHUTDOWN_SECONDS if fallen else STOP_SECONDS)
        codes[:] = [handler.proc.poll() for handler in self.subprocess_handlers.values()]

    SubprocessContext.close = close_soon  # type: ignore[method-assign, assignment]
    try:
        yield fallen
    finally:
        SubprocessContext.close = close  # type: ignore[method-assign]


def cause(left: list[End], silent: list[End]) -> End:
    """The end to report: a rank's own failure before the loss of a peer, which is its echo; a bug before everything.

    left: what ranks wrote. silent: failures the launcher saw; they count for ranks that wrote nothing (killed ones).
    """
    wrote = {end.rank for end in left}
    order = {EXIT_BUG: 0, EXIT_REQUEST: 1, EXIT_LOST: 2}
    ends = [end for end in left if not end.survivor] + [end for end in silent if end.rank not in wrote]
    ends = ends or left or silent
    killed = [end for end in ends if end.rank not in wrote]
    if killed and all(end.code == EXIT_LOST for end in ends):
        return killed[0]  # its neighbours only noticed that it was gone
    return min(ends, key=lambda end: (order.get(end.code, 0), end.rank))


def _how(rank: int, code: int) -> str:
    """What to say of a rank that left no word."""
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; the machine may be out of memory" if name == "SIGKILL" else ""
        return f"Rank {rank} was killed by {name}{hint}. Start the ranks again."
    return f"Rank {rank} ended with exit code {code} and left no word. Start the ranks again."


def _ends(folder: Path) -> list[End]:
    """Every end that ranks left under the folder."""
    ends = []
    for path in folder.glob("**/error.json"):
        try:
            message = json.loads(path.read_text())["message"]
            extra = message["extraInfo"]
            ends.append(End(int(extra["rank"]), int(extra["exitcode"]), str(message["message"]), bool(extra["survivor"])))
        except (KeyError, ValueError, TypeError):
            continue  # half written: the rank was killed meanwhile, and counts as silent
    return sorted(ends, key=lambda end: end.rank)
