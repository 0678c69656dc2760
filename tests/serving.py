"""A server in this process over a double of the engine, for tests of its HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from starlette.testclient import TestClient

from ringctx.config import parse
from ringctx.runtime.server.app import Server
from ringctx.runtime.server.desk import Desk
from ringctx.runtime.server.host import Host
from tests.fake_engine import FakeEngine

SETTINGS = """
model: {path: some/folder/fake}
generation: {max_new_tokens: 50}
server: {queue: 2, max_tokens: 100, question_tokens: 60, documents: 2, document_tokens: 100, body_bytes: 2000}
"""


@dataclass
class Served:
    """A server in this process, its ring in a thread."""

    client: TestClient
    engine: FakeEngine
    server: Server
    desk: Desk
    host: Host

    def chat(self, text: str, **fields: Any) -> Any:
        body = {"model": "fake", "messages": [{"role": "user", "content": text}]} | fields
        return self.client.post("/v1/chat/completions", json=body)

    def background(self, text: str, **fields: Any) -> tuple[threading.Thread, list[Any]]:
        """A request in a thread, and where its response goes; returns when the ring works on it or it waits."""
        replies: list[Any] = []
        before = self.desk.num_waiting + self.desk.is_working
        thread = threading.Thread(target=lambda: replies.append(self.chat(text, **fields)))
        thread.start()
        until(lambda: self.desk.num_waiting + self.desk.is_working > before)
        return thread, replies


def until(true: Any, seconds: float = 10.0) -> None:
    """Wait until it is true; an AssertionError if it never is."""
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.002)


def serving(token: str | None = None) -> Iterator[Served]:
    """One, as a fixture yields it."""
    config, engine = parse(SETTINGS), FakeEngine()
    desk = Desk(config.server.queue)
    server = Server(config, desk, token)
    host = Host(engine, config.server)
    ring = threading.Thread(target=host.lead, args=(desk,))
    ring.start()
    with TestClient(server.app()) as client:
        yield Served(client, engine, server, desk, host)
        desk.stop()
        ring.join(timeout=10)
    assert not ring.is_alive()
