"""Ring: the ranks that share a sequence, and how tensors travel between them.

Knows ranks, messages, deadlines and counters. Knows nothing of attention or indices. A ring of one needs no process group.
Keys and their gradients travel apart, so that neither is taken for the other or waits in its line: over two communicators
on NCCL, under two tags on gloo.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringctx.core.timeline import Timeline, Trip
from ringctx.errors import ConfigError, RankLost

GRADS_TAG = 2**30


@dataclass
class Traffic:
    """Bytes and messages that this rank sent and received, by kind.

    Kinds: keys, grads, heads, queries, partials, scores, selection, memory, monarch, header.
    timeline: when they travelled, while `Ring.recorded` is open.
    """

    sent: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    timeline: Timeline | None = None

    def reset(self) -> None:
        """Begin counting anew."""
        for counter in (self.sent, self.received, self.messages):
            counter.clear()

    def __str__(self) -> str:
        kinds = sorted(self.sent | self.received)
        rows = (f"{k}: sent {self.sent[k]:,} B, received {self.received[k]:,} B in {self.messages[k]:,} messages" for k in kinds)
        return "; ".join(rows) or "nothing sent"


@dataclass(frozen=True)
class Message:
    """Tensors to or from one peer (a rank of this ring)."""

    peer: int
    tensors: tuple[Tensor, ...]


class Pending:
    """Messages under way. `wait` returns when all have arrived and left, or raises RankLost; it keeps the tensors alive."""

    def __init__(
        self, ring: Ring, what: str, works: Sequence[tuple[dist.Work, int, str]], messages: Sequence[Message], trip: Trip | None = None
    ) -> None:
        self._ring, self._what, self._works, self._messages, self._trip = ring, what, works, messages, trip

    def wait(self) -> None:
        """Raises RankLost, naming the peer and the hop, when a peer is gone or misses the ring's deadline."""
        began = time.monotonic()
        if self._trip is not None:
            self._trip.mark()
        for work, peer, direction in self._works:
            left = max(self._ring.timeout - (time.monotonic() - began), 0.001)
            try:
                work.wait(timedelta(seconds=left))
            except RuntimeError as error:
                self._ring.lost(peer, direction, self._what, time.monotonic() - began, error)
        if self._trip is not None:
            self._trip.mark()
        self._works, self._messages, self._trip = (), (), None


class Ring:
    """The ranks that share one sequence, numbered 0..size-1.

    heads: consecutive ranks in a head group (all-to-all inside it); nodes: how many equal runs of ranks sit on a node of
    their own (double ring). Rank = (node, circle, head), the last running fastest.
    timeout: seconds that any wait for a peer may take. strict: begin each call by comparing what the ranks were asked.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        grads: dist.ProcessGroup | None = None,
        members: tuple[int, ...] | None = None,
        heads: int = 1,
        nodes: int = 1,
        timeout: float = 600.0,
        strict: bool = True,
        traffic: Traffic | None = None,
    ) -> None:
        self.group, self.grads = group, grads
        self.members = members or tuple(range(dist.get_world_size(group) if group else 1))
        self.rank = self.members.index(dist.get_rank(group)) if group else 0
        self.heads, self.nodes, self.timeout, self.strict = heads, nodes, timeout, strict
        self.traffic = traffic or Traffic()
        self.calls = 0
        self.dead: str | None = None
        self.kept: dict[Hashable, Any] = {}
        self._owns_world = False
        require_fold(self.size, heads, nodes)

    # -- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def alone(cls) -> Self:
        """A ring of one; needs no process group and sends nothing."""
        return cls()

    @classmethod
    def from_env(cls, *, timeout: float = 600.0, strict: bool = True, heads: int = 1, nodes: int = 1) -> Self:
        """All ranks that torchrun started (NCCL if each can have a GPU, else gloo), or a ring of one without torchrun."""
        if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(timeout=timeout, strict=strict)
        owns_world = not dist.is_initialized()
        if owns_world:
            init_world(timeout)
        ring = cls.from_group(dist.group.WORLD, timeout=timeout, strict=strict, heads=heads, nodes=nodes)
        ring._owns_world = owns_world
        return ring

    @classmethod
    def from_group(
        cls, group: dist.ProcessGroup | None, *, timeout: float = 600.0, strict: bool = True, heads: int = 1, nodes: int = 1
    ) -> Self:
        """The ranks of a process group, in its order. All of them must call this together.

        On NCCL this makes a second group, and torch wants all of them to have made equally many groups before.
        """
        if group is None or dist.get_world_size(group) == 1:
            return cls(timeout=timeout, strict=strict)
        grads = group  # gloo tells messages apart by tag; each of its groups costs a polling thread
        if dist.get_backend(group) != "gloo":
            grads = dist.new_group(dist.get_process_group_ranks(group), use_local_synchronization=True)
        return cls(group, grads=grads, timeout=timeout, strict=strict, heads=heads, nodes=nodes)

    @classmethod
    def from_mesh(
        cls,
        mesh: DeviceMesh,
        ring: str = "ring",
        heads: str | None = None,
        node: str | None = None,
        *,
        timeout: float = 600.0,
        strict: bool = True,
    ) -> Self:
        """The ranks along one axis of a mesh, folded with a head axis and a node axis where they are named."""
        axes = [axis for axis in (node, ring, heads) if axis]
        unknown = [axis for axis in axes if axis not in (mesh.mesh_dim_names or ())]
        if unknown:
            raise ConfigError(f"The mesh has axes {mesh.mesh_dim_names}, none called {unknown[0]!r}; name one of them.")
        part = mesh[tuple(axes)] if len(axes) > 1 else mesh[axes[0]]
        if part.size() == 1:
            return cls(timeout=timeout, strict=strict)
        group = part.get_group() if len(axes) == 1 else part._flatten("_".join(axes)).get_group()
        size = {axis: mesh[axis].size() for axis in axes}
        return cls.from_group(group, timeout=timeout, strict=strict, heads=size.get(heads or "", 1), nodes=size.get(node or "", 1))

    def view(self, members: Sequence[int]) -> Ring:
        """Some of this ring's ranks as a ring of their own, over the same communicators and counters."""
        return type(self)(
            self.group,
            grads=self.grads,
            members=tuple(self.members[m] for m in members),
            timeout=self.timeout,
            strict=False,
            traffic=self.traffic,
        )

    # -- what a ring answers ----------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """How many ranks share the sequence."""
        return len(self.members)

    # -- moving tensors ---------------------------------------------------------------------------------------------

    def exchange(
        self, kind: str, what: str, receive: Sequence[Message] = (), send: Sequence[Message] = (), *, grads: bool = False, tag: int = 0
    ) -> Pending:
        """Post all receives, then all sends, and return at once. Both lists in the order that the peer uses too.

        kind: what the traffic counters call it. what: how an error calls it, for example "keys at hop 2".
        Tensors must be contiguous; empty ones are not sent. On NCCL everything posted together is one batch.
        """
        if self.dead:
            raise RankLost(self.dead)
        group, tag = (self.grads, tag + GRADS_TAG) if grads else (self.group, tag)
        ops, meta = [], []
        for messages, call, direction in ((receive, dist.irecv, "from"), (send, dist.isend, "to")):
            for message in messages:
                for tensor in message.tensors:
                    if not tensor.numel():
                        continue
                    ops.append(dist.P2POp(call, tensor, group=group, group_peer=self.members[message.peer], tag=tag))
                    meta.append((message.peer, direction))
                self._count(kind, message, direction)
        if not ops:
            return Pending(self, what, (), ())
        timeline = self.traffic.timeline
        trip = timeline.trip(kind, what, _bytes(receive), _bytes(send)) if timeline else None
        try:
            works = dist.batch_isend_irecv(ops)
        except RuntimeError as error:
            self.lost(meta[0][0], meta[0][1], what, 0.0, error)
        if len(works) != len(ops):  # NCCL coalesces a batch into one work
            meta = meta[: len(works)]
        if trip is not None:
            trip.mark()
        return Pending(self, what, [(work, *m) for work, m in zip(works, meta, strict=True)], (*receive, *send), trip)

    def _count(self, kind: str, message: Message, direction: str) -> None:
        counter = self.traffic.received if direction == "from" else self.traffic.sent
        counter[kind] += _bytes([message])
        self.traffic.messages[kind] += sum(t.numel() > 0 for t in message.tensors)

    def lost(self, peer: int, direction: str, what: str, waited: float, error: BaseException) -> None:
        """Raise RankLost about this peer; the ring sends nothing more afterwards."""
        late = "Timed out" in str(error) or waited >= 0.95 * self.timeout
        verb = {"from": "waited for", "to": "was sending"}[direction]
        why = (
            f"no answer within {self.timeout:g} s; it may be stopped, or far behind (raise the ring's timeout)"
            if late
            else "its connection is closed"
        )
        self.dead = f"Rank {self.rank} {verb} {what} {direction} rank {peer}: {why}. The ring is broken; start the ranks again."
        raise RankLost(self.dead) from error

    @contextmanager
    def recorded(self) -> Iterator[Timeline]:
        """While open, what this rank calls, posts and waits for is written down; views of this ring write into the same timeline."""
        is_cuda = self.group is not None and "nccl" in dist.get_backend(self.group)
        before, self.traffic.timeline = self.traffic.timeline, Timeline(is_cuda=is_cuda)
        try:
            yield self.traffic.timeline
        finally:
            self.traffic.timeline = before

    @contextmanager
    def unbroken(self, what: str) -> Iterator[None]:
        """What runs inside must end on every rank: if it fails here, peers hold half of a call, and the ring is broken.

        what: how the timeline calls it.
        """
        timeline = self.traffic.timeline
        try:
            with timeline.call(what) if timeline else nullcontext():
                yield
        except RankLost as error:
            self.dead = str(error)
            raise
        except BaseException as error:
            if self.size > 1:
                self.dead = (
                    f"Rank {self.rank} broke off an earlier call midway ({type(error).__name__}: {error}), so its peers hold half of it. "
                    "The ring is broken; start the ranks again."
                )
            raise

    # -- life -------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._owns_world and dist.is_initialized():
            dist.destroy_process_group()

    def __str__(self) -> str:
        folds = f", head groups of {self.heads}" * (self.heads > 1) + f", {self.nodes} nodes" * (self.nodes > 1)
        return f"rank {self.rank} of {self.size}{folds}"


def require_fold(size: int, heads: int, nodes: int) -> None:
    """Raises ConfigError where so many ranks cannot be folded so."""
    if size % (heads * nodes):
        raise ConfigError(f"{size} ranks cannot be folded in head groups of {heads} on {nodes} nodes: the product must divide them.")


def _bytes(messages: Sequence[Message]) -> int:
    return sum(t.numel() * t.element_size() for message in messages for t in message.tensors)


def init_world(timeout: float) -> None:
    """Begin torch.distributed among the ranks that a launcher started: torchrun, or one that sets its variables and hosts no store."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    use_cuda = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if use_cuda:
        torch.cuda.set_device(local)
    dist.init_process_group(
        "nccl" if use_cuda else "gloo",
        store=job_store("ringctx") if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else None,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=max(timeout, 30.0)),
    )


@contextmanager
def collective(what: str) -> Iterator[None]:
    """For torch's own collectives inside: raises RankLost, naming what was under way, where one breaks off because a rank is gone."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistBackendError) and "gloo/transport" not in str(error):
            raise
        why = "no answer within the timeout" if "Timed out" in str(error) else "its connection is closed"
        raise RankLost(f"A rank is lost that took part in {what}: {why}. Start the ranks again.") from error


def job_store(name: str) -> dist.Store:
    """A client of torchrun's store. Its prefix holds the attempt's number, so a restarted worker reads nothing old."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"{name}-attempt-{attempt}", store)
