"""Virtual ranks: threads of this process that take turns, with messages in memory. Deterministic, started in no time.

One rank runs until it waits for a message that was not sent yet, then another takes its turn. When every rank waits, nobody ever
will go on: that is said at once, where gloo would wait for its deadline. A message of another size than its receiver expects is
said too, where gloo aborts the process. What happens on real wires is the business of the pool.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ringctx.core.ring import Message, Ring
from tests.pool import Fold

Address = tuple[int, int, bool, int]
"""Sender, receiver, whether it is the communicator of gradients, tag."""


class Stuck(AssertionError):
    """Every rank waits for another."""


def run(job: Callable[..., Any], *args: Any, size: int, fold: Fold = Fold()) -> list[Any]:
    """Call job(ring, *args) on ranks 0..size-1 and return what they returned; raises what the first rank to fail raised."""
    world = _World(size)
    rings = [VirtualRing(world, rank, members=tuple(range(size)), heads=fold.heads, nodes=fold.nodes) for rank in range(size)]
    return world.run([lambda ring=ring: job(ring, *args) for ring in rings])


class VirtualRing(Ring):
    """A ring whose messages go through memory. Notes what crosses from outside of the ring's own counters."""

    def __init__(self, world: _World, me: int, **options: Any) -> None:
        super().__init__(None, **options)
        self.world, self.me = world, me
        self.rank = self.members.index(me)

    def view(self, members: Sequence[int]) -> Ring:
        """Some of these ranks as a ring of their own."""
        return VirtualRing(self.world, self.me, members=tuple(self.members[m] for m in members), strict=False, traffic=self.traffic)

    def exchange(  # type: ignore[override]
        self, kind: str, what: str, receive: Sequence[Message] = (), send: Sequence[Message] = (), *, grads: bool = False, tag: int = 0
    ) -> _Pending:
        """As the ring's own: all receives, then all sends, and return at once."""
        wanted = []
        for message in receive:
            self._count(kind, message, "from")
            for tensor in filter(Tensor.numel, message.tensors):
                self.world.hold(self.me, kind, tensor)
                wanted.append((tensor, self.world.place((self.members[message.peer], self.me, grads, tag), "read")))
        for message in send:
            self._count(kind, message, "to")
            for tensor in filter(Tensor.numel, message.tensors):
                assert tensor.is_contiguous(), f"rank {self.rank} sends {what} that is not contiguous"
                address = (self.me, self.members[message.peer], grads, tag)
                self.world.letters[self.world.place(address, "written")] = tensor.detach().clone()
        return _Pending(self, what, wanted)


class _Pending:
    def __init__(self, ring: VirtualRing, what: str, wanted: list[tuple[Tensor, tuple[Address, int]]]) -> None:
        self.ring, self.what, self.wanted = ring, what, wanted

    def wait(self) -> None:
        """Take in what was sent, letting others run until it was."""
        for tensor, place in self.wanted:
            letter = self.ring.world.fetch(self.ring.me, place, self.what)
            if (letter.shape, letter.dtype) != (tensor.shape, tensor.dtype):
                sent, expected = (f"{tuple(x.shape)} {x.dtype}" for x in (letter, tensor))
                raise AssertionError(f"rank {self.ring.rank} expected {expected} as {self.what} from rank {place[0][0]}, which sent {sent}")
            tensor.copy_(letter)
        self.wanted = []


class _World:
    """Who runs, what was sent, and what each rank received and still holds."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.letters: dict[tuple[Address, int], Tensor] = {}
        self.numbers: Counter[tuple[Address, str]] = Counter()
        self.received: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self.most: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self.dtypes: defaultdict[str, set[torch.dtype]] = defaultdict(set)
        self._alive: defaultdict[tuple[int, str], list[tuple[StorageWeakRef, int]]] = defaultdict(list)
        self._waits: dict[int, tuple[tuple[Address, int], str]] = {}
        self._turn = [threading.Semaphore(0) for _ in range(size)]
        self._back = threading.Semaphore(0)
        self._stuck = ""

    def hold(self, rank: int, kind: str, tensor: Tensor) -> None:
        """Note that this rank is about to receive the tensor: its bytes, and the most bytes of its kind alive at once."""
        self.received[rank][kind] += tensor.nbytes
        self.dtypes[kind].add(tensor.dtype)
        storage = tensor.untyped_storage()
        alive = [x for x in self._alive[rank, kind] if not x[0].expired()] + [(StorageWeakRef(storage), storage.nbytes())]
        self._alive[rank, kind] = alive
        self.most[rank][kind] = max(self.most[rank][kind], sum(x[1] for x in alive))

    def place(self, address: Address, way: str) -> tuple[Address, int]:
        """The next place in the row of messages from one rank to another: the n-th written is the n-th read."""
        self.numbers[address, way] += 1
        return address, self.numbers[address, way]

    def fetch(self, rank: int, place: tuple[Address, int], what: str) -> Tensor:
        while place not in self.letters:
            self._waits[rank] = place, what
            self._back.release()
            self._turn[rank].acquire()
            del self._waits[rank]
            if self._stuck:
                raise Stuck(self._stuck)
        return self.letters.pop(place)

    def run(self, jobs: list[Callable[[], Any]]) -> list[Any]:
        results: list[Any] = [None] * self.size
        errors: list[tuple[int, BaseException]] = []

        def live(rank: int) -> None:
            self._turn[rank].acquire()
            try:
                results[rank] = jobs[rank]()
            except BaseException as error:
                errors.append((rank, error))
            running.remove(rank)
            self._back.release()

        running = list(range(self.size))
        threads = [threading.Thread(target=live, args=(rank,), daemon=True) for rank in running]
        for thread in threads:
            thread.start()
        while running:
            able = [rank for rank in running if rank not in self._waits or self._waits[rank][0] in self.letters]
            if not able:
                told = (f"rank {r} waits for {what} from rank {place[0][0]}" for r, (place, what) in sorted(self._waits.items()))
                self._stuck = self._stuck or "; ".join(told)
                able = running
            self._turn[able[0]].release()
            self._back.acquire()
        for thread in threads:
            thread.join()
        if errors:
            rank, error = next((x for x in errors if not isinstance(x[1], Stuck)), errors[0])
            error.add_note(f"(on virtual rank {rank} of {self.size})")
            raise error
        return results
