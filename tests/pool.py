"""A pool of ranks that is started once and then runs jobs on its first R ranks.

Knows processes and pipes. Ranks meet over files, so no port is taken. `pool.run(job, *args, size=R)` calls the module-level
function `job(ring, *args)` on ranks 0..R-1 and returns their results. When a rank fails, its traceback is raised here with
its rank; when ranks hang, every rank's stack is. After either the ranks are checked or replaced, so that the pool stays usable.
"""

from __future__ import annotations

import faulthandler
import itertools
import multiprocessing as mp
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ringctx.runtime.launch import ENVIRONMENT

FIRST, MOST = 4, 8
"""Processes started at first, and when a job asks for more."""

GRACE = 8.0
"""Seconds that the other ranks may still run once one has failed."""


@dataclass(frozen=True)
class Fold:
    """Heads in a head group and nodes of a ring; (1, 1) is a plain circle."""

    heads: int = 1
    nodes: int = 1


class RankFailed(AssertionError):
    """A job raised on some rank; `errors` maps every rank that failed to its exception."""

    def __init__(self, message: str, errors: dict[int, BaseException]) -> None:
        super().__init__(message)
        self.errors = errors


class RanksHang(AssertionError):
    """A job did not end in time; the message holds every rank's stack."""


class Pool:
    """Processes that talk over gloo, or NCCL: `first` of them, eight once a job asks for more.

    ring_timeout: seconds that a rank waits for another. On NCCL ranks share the GPUs there are.
    """

    def __init__(self, ring_timeout: float = 30.0, first: int = FIRST, backend: str = "gloo") -> None:
        self._ring_timeout, self._first, self._backend = ring_timeout, first, backend
        self._folder = tempfile.TemporaryDirectory(prefix="ringctx-pool-")
        self._workers: list[_Worker] = []
        self._worlds = itertools.count()
        self._rings = itertools.count()
        self._ready: dict[tuple[int, Fold], int] = {}
        self._spoilt = False
        self._busy = 0

    @property
    def world(self) -> int:
        """How many processes there are, or will be at first."""
        return len(self._workers) or self._first

    def run(self, job: Callable[..., Any], *args: Any, size: int, fold: Fold = Fold(), timeout: float = 90.0) -> list[Any]:
        """Call job(ring, *args) on ranks 0..size-1 and return what they returned, in the order of ranks.

        job and args travel by pickle, so job is a module's function. Raises RankFailed, or RanksHang after `timeout` seconds.
        """
        self.start(job, *args, size=size, fold=fold)
        return self.results(timeout)

    def start(self, job: Callable[..., Any], *args: Any, size: int, fold: Fold = Fold()) -> None:
        """Begin a job and return at once; `results` must be called before anything else."""
        assert not self._busy, "a job is under way; call results() first"
        self._grow(size)
        if (size, fold) not in self._ready:
            number = next(self._rings)
            self._send(len(self._workers), ("ring", number, size, fold, self._ring_timeout, self._spoilt))
            self._spoilt = False
            self._collect(len(self._workers), 60.0)
            self._ready[size, fold] = number
        self._send(size, ("job", self._ready[size, fold], job, args))
        self._busy = size

    def results(self, timeout: float = 90.0) -> list[Any]:
        """Wait for the job that `start` began."""
        size, self._busy = self._busy, 0
        return self._collect(size, timeout)

    def close(self) -> None:
        """End every process."""
        for worker in self._workers:
            worker.kill()
        self._workers, self._ready, self._spoilt, self._busy = [], {}, False, 0

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._folder.cleanup()

    # -- processes --------------------------------------------------------------------------------------------------

    def _grow(self, size: int) -> None:
        assert 1 <= size <= MOST, f"a job asked for {size} ranks; the pool has 1 to {MOST}"
        if size <= len(self._workers):
            return
        target = self._first if size <= self._first else MOST
        folder = Path(self._folder.name)
        self._workers += [_Worker(rank, folder) for rank in range(len(self._workers), target)]
        self._ready, self._spoilt = {}, False
        self._send(target, ("world", str(folder / f"world{next(self._worlds)}"), target, self._backend))
        self._collect(target, 120.0)

    def _send(self, size: int, message: tuple[Any, ...]) -> None:
        data = pickle.dumps(message)  # not Connection.send: that would move tensors into shared memory
        for worker in self._workers[:size]:
            worker.pipe.send_bytes(data)

    def _collect(self, size: int, timeout: float) -> list[Any]:
        results: list[Any] = [None] * size
        failed: dict[int, tuple[str, BaseException]] = {}
        waiting = {worker.pipe: worker.rank for worker in self._workers[:size]}
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                good, value = self._receive(pipe, rank)
                if good:
                    results[rank] = value
                else:
                    deadline = min(deadline, time.monotonic() + GRACE)
                    failed[rank] = value
            if not ready:
                stacks = self._stacks(waiting.values())
                self.close()
                if not failed:
                    raise RanksHang(f"ranks {sorted(waiting.values())} of {size} did not end within {timeout:g} s\n{stacks}")
                break
        if failed:
            self._ready, self._spoilt = {}, True  # whatever their groups have under way, nobody receives it
            if any(self._workers) and not all(worker.process.is_alive() for worker in self._workers):
                self.close()
            texts = [f"rank {rank} of {size} failed:\n{text}" for rank, (text, _) in failed.items()]
            raise RankFailed("\n".join(texts), {rank: error for rank, (_, error) in failed.items()}) from next(iter(failed.values()))[1]
        return results

    def _receive(self, pipe: Connection, rank: int) -> tuple[bool, Any]:
        try:
            return pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            self._workers[rank].process.join(5)
            text = f"the process ended with exit code {self._workers[rank].process.exitcode}"
            return False, (text, RuntimeError(text))

    def _stacks(self, ranks: Any) -> str:
        texts = []
        for rank in sorted(ranks):
            worker = self._workers[rank]
            with suppress(ProcessLookupError):
                os.kill(worker.process.pid or 0, signal.SIGUSR1)
        time.sleep(0.5)
        for rank in sorted(ranks):
            worker = self._workers[rank]
            texts.append(f"stack of rank {rank}:\n{worker.stacks.read_text() if worker.stacks.exists() else '(none)'}")
        return "\n".join(texts)


class _Worker:
    """One process of the pool, seen from the test."""

    def __init__(self, rank: int, folder: Path) -> None:
        context = mp.get_context("spawn")
        self.rank = rank
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=_main, args=(rank, far, str(folder)), daemon=True, name=f"rank {rank}")
        usual = {"OMP_NUM_THREADS": "1", **ENVIRONMENT}
        old = {name: os.environ.get(name) for name in usual}
        os.environ.update(usual)
        try:
            self.process.start()
        finally:
            for name, value in old.items():
                os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        far.close()
        self.stacks = folder / f"stacks-{self.process.pid}"

    def kill(self) -> None:
        """End it now; it owns nothing."""
        self.process.kill()
        self.process.join(10)
        self.pipe.close()


# -- what a rank's process does ---------------------------------------------------------------------------------------


def _main(rank: int, pipe: Connection, folder: str) -> None:
    """Obey messages until the test's end of the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stacks = open(Path(folder) / f"stacks-{os.getpid()}", "w")  # faulthandler wants it open for good
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    import torch

    torch.set_num_threads(1)
    rings: dict[Any, Any] = {}
    while True:
        try:
            data = pipe.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)
        try:
            answer = (True, _obey(rank, rings, pickle.loads(data)))
            reply = pickle.dumps(answer)
        except BaseException as error:
            reply = pickle.dumps((False, (traceback.format_exc(), _plain(error))))
        with suppress(BrokenPipeError):
            pipe.send_bytes(reply)


def _obey(rank: int, rings: dict[Any, Any], message: tuple[Any, ...]) -> Any:
    import torch.distributed as dist

    match message:
        case ("world", path, size, backend):
            rings.clear()
            rings["groups"] = {}
            if dist.is_initialized():
                dist.destroy_process_group()
            if backend == "nccl":
                _share_gpus(rank)
            store = dist.FileStore(path, size)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
            return None
        case ("ring", number, size, fold, limit, spoilt):
            if spoilt:
                for old in rings["groups"].values():
                    if old is not dist.GroupMember.NON_GROUP_MEMBER:
                        dist.destroy_process_group(old)
                rings["groups"].clear()
            ring = _ring(size, fold, limit, rings["groups"])
            if rank < size:
                rings[number] = ring
            return None
        case ("job", number, job, args):
            return job(rings[number], *args)
    raise AssertionError(message)


def _ring(size: int, fold: Fold, limit: float, groups: dict[int, Any]) -> Any:
    """A ring of the first ranks. Every rank of the world makes the group, once a size: each costs gloo a polling thread a rank."""
    import torch.distributed as dist

    from ringctx.core.ring import Ring

    if size not in groups:
        world = dist.get_world_size()  # every rank is in one group more, as torch wants of ranks that make groups by themselves
        parts = [dist.new_group(part) for part in (list(range(size)), list(range(size, world))) if part]
        groups[size] = parts[0]
    inside = dist.get_rank() < size
    return Ring.from_group(groups[size], timeout=limit, heads=fold.heads, nodes=fold.nodes) if inside else None


def _share_gpus(rank: int) -> None:
    """NCCL refuses two ranks on one GPU of one host; ranks that each call themselves a host it joins over the loopback device."""
    import torch

    os.environ |= {"NCCL_HOSTID": f"rank{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    torch.cuda.set_device(rank % torch.cuda.device_count())


def _plain(error: BaseException) -> BaseException:
    """The error, or what it said if it cannot travel."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
