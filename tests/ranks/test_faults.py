"""Ranks that die or stop in the middle of a call: every survivor says so within 15 seconds, in a RankLost with rank and hop.

Each test has processes of its own, because they do not survive it.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ringctx import Attention, Layout, RankLost, ring_attention
from ringctx.patterns import full
from tests.pool import Pool, RankFailed, RanksHang

LIMIT = 15.0
CULPRIT = 1


def _until_lost(ring: Any, folder: str, how: int, when: str, backward: bool, transport: str) -> None:
    """Call until a rank is lost, tell what was heard, and end as a program would. The culprit signals itself at `when`."""
    count, exchange = 0, ring.exchange

    def watched(kind: str, what: str, *args: Any, **kwargs: Any) -> Any:
        if what == when and count >= 2:
            (Path(folder) / "began").write_text(str(time.time()))
            os.kill(os.getpid(), how)
        return exchange(kind, what, *args, **kwargs)

    if ring.rank == CULPRIT:
        ring.exchange = watched
    layout = Layout.zigzag(96, ring.size)
    try:
        for count in range(10_000):  # noqa: B007
            q, k, v = (torch.randn(1, 96 // ring.size, 2, 16, requires_grad=backward) for _ in range(3))
            out = ring_attention(q, k, v, ring=ring, layout=layout, attention=Attention(pattern=full()), transport=transport)
            if backward:
                out.sum().backward()
        heard = {"said": "never lost"}
    except RankLost as error:
        heard = {"said": str(error), "code": error.exit_code, "at": time.time()}
    except BaseException as error:
        heard = {"said": f"not a RankLost but {type(error).__name__}: {error}"}
    (Path(folder) / f"heard{ring.rank}").write_text(json.dumps(heard))
    os._exit(3)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("how", "when", "backward", "transport"),
    [
        pytest.param(signal.SIGKILL, "the header", False, "rotate", id="killed-header", marks=SLOW),
        pytest.param(signal.SIGKILL, "keys at hop 2", False, "rotate", id="killed-hop2"),
        pytest.param(signal.SIGKILL, "gradients at hop 2", True, "fetch", id="killed-gradients", marks=SLOW),
        pytest.param(signal.SIGSTOP, "the header", False, "rotate", id="stopped-header", marks=SLOW),
        pytest.param(signal.SIGSTOP, "keys at hop 1", True, "fetch", id="stopped-hop1", marks=SLOW),
        pytest.param(signal.SIGSTOP, "keys at hop 2", False, "rotate", id="stopped-hop2"),
        pytest.param(signal.SIGSTOP, "queries, keys and values for heads", False, "heads", id="stopped-heads", marks=SLOW),
    ],
)
def test_survivors_name_the_lost_rank(tmp_path: Path, how: int, when: str, backward: bool, transport: str) -> None:
    with Pool(ring_timeout=3.0, first=3) as pool:
        with pytest.raises((RankFailed, RanksHang)):
            pool.run(_until_lost, str(tmp_path), how, when, backward, transport, size=3, timeout=LIMIT + 5)
    began = float((tmp_path / "began").read_text())
    named = 0
    for rank in {0, 2}:
        heard = json.loads((tmp_path / f"heard{rank}").read_text())
        assert heard.get("code") == 3, heard["said"]
        assert heard["at"] - began < LIMIT, heard
        assert f"Rank {rank} " in heard["said"] and "\n" not in heard["said"], heard["said"]
        assert any(word in heard["said"] for word in ("hop", "header", "heads")), heard["said"]
        named += f"rank {CULPRIT}" in heard["said"]
    assert named >= 1, "nobody named the rank that was lost"
