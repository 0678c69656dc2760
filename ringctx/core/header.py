"""The header: before anything else moves, all ranks compare what they were asked.

Every call sends 48 bytes to each peer: the call's number, whether this rank already knows that it cannot go on, and a hash
of a text that must be the same everywhere. Only on a mismatch does the text itself travel, and becomes one sentence.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from ringctx.core.ring import Message, Ring
from ringctx.errors import RanksDisagree, RingctxError

TEXT_BYTES = 4096
Facts = dict[str, object]


def agree(ring: Ring, facts: Facts, problem: RingctxError | None = None) -> None:
    """Return if every rank of the ring is here with the same facts and no problem.

    facts: what must be equal on all ranks. problem: why this rank cannot take part, if so.
    Raises the problem itself where every rank has one (and on a ring of one, or if the ring is not strict); RanksDisagree,
    with the same sentence on every rank, where facts differ or only some ranks have a problem; RankLost if a peer is gone.
    """
    ring.calls += 1
    if ring.size == 1 or not ring.strict:
        if problem:
            raise problem
        return
    text = "\n".join(f"{name}={value}" for name, value in facts.items())
    mine = struct.pack("<qq", ring.calls, problem is not None) + hashlib.sha256(text.encode()).digest()
    headers = share(ring, torch.frombuffer(bytearray(mine), dtype=torch.uint8), "header")
    if all(bytes(h.tolist()) == mine for h in headers) and problem is None:
        return
    said = f"problem={problem}" if problem else f"call={ring.calls}\n{text}"
    note = said.encode()[:TEXT_BYTES].ljust(TEXT_BYTES, b"\0")
    notes = [
        bytes(t.tolist()).rstrip(b"\0").decode(errors="replace")
        for t in share(ring, torch.frombuffer(bytearray(note), dtype=torch.uint8), "header")
    ]
    if problem and all(n.startswith("problem=") for n in notes):
        raise problem
    raise RanksDisagree(sentence(notes))


def share(ring: Ring, mine: Tensor, kind: str, rows: Sequence[int] | None = None) -> list[Tensor]:
    """Every rank's tensor, in rank order; straight from each to each. kind: as the traffic counters call it.

    rows: the length of each rank's tensor where these differ; else all have the shape of `mine`.
    """
    device = torch.device("cuda") if ring.group is not None and not _is_gloo(ring) else mine.device
    mine = mine.to(device).contiguous()
    lengths = [len(mine)] * ring.size if rows is None else rows
    tensors = [mine if r == ring.rank else mine.new_empty(n, *mine.shape[1:]) for r, n in enumerate(lengths)]
    others = [(ring.rank + n) % ring.size for n in range(1, ring.size)]
    receive = [Message(r, (tensors[r],)) for r in others]
    ring.exchange(kind, f"the {kind}", receive, [Message(r, (mine,)) for r in others]).wait()
    return tensors


def _is_gloo(ring: Ring) -> bool:
    return torch.distributed.get_backend(ring.group) == "gloo"


def sentence(notes: list[str]) -> str:
    """What the ranks said, one note each, as one sentence that is the same on every rank."""
    problems = {r: n.removeprefix("problem=") for r, n in enumerate(notes) if n.startswith("problem=")}
    if problems:
        said = " ".join(f"Rank {r} cannot go on: {p}" for r, p in problems.items())
        return f"{said} All ranks must make the same call with tensors that fit their layout."
    facts = [dict(line.partition("=")[::2] for line in note.split("\n")) for note in notes]
    told: list[str] = []
    for name in dict.fromkeys(name for f in facts for name in f):
        ranks: dict[str, list[str]] = {}
        for rank, f in enumerate(facts):
            ranks.setdefault(f.get(name, "nothing"), []).append(str(rank))
        if len(ranks) > 1:
            told.append(f"{name} is " + ", ".join(f"{value} on rank {' '.join(rs)}" for value, rs in ranks.items()))
    return f"Ranks disagree: {'; '.join(told)}. All ranks must make the same call, with the same layout and attention, in the same order."
