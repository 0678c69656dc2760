"""Clients that wait, that leave, and that are told that the server is stopping."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from tests.serving import Served, serving, until


@pytest.fixture
def served() -> Iterator[Served]:
    yield from serving()


def test_a_full_queue_is_429_and_says_when_to_come_again(served):
    waiting = [served.background(f"wait {n}") for n in range(3)]  # one at work, two in the queue
    reply = served.chat("one too many")
    assert (reply.status_code, reply.json()["error"]["type"]) == (429, "rate_limit_error")
    assert int(reply.headers["retry-after"]) >= 1
    served.engine.go.set()
    for thread, replies in waiting:
        thread.join(timeout=10)
        assert replies[0].status_code == 200
    assert served.engine.asked == [f"uwait {n}\na" for n in range(3)]


async def leave(served: Served, text: str, *, stream: bool, after: Any, heard: list[str]) -> None:
    """A client that asks and closes its connection when `after` is true."""
    body = {"model": "fake", "messages": [{"role": "user", "content": text}], "stream": stream}
    await close(served, "/v1/chat/completions", body, after, heard)


async def close(served: Served, path: str, fields: dict[str, Any], after: Any, heard: list[str]) -> None:
    """A client that posts and closes its connection when `after` is true. heard: becomes what it was sent."""
    body = json.dumps(fields).encode()
    sent = False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body}
        while not after():
            await asyncio.sleep(0.005)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        heard.append(message["type"])

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [],
        "asgi": {"spec_version": "2.3"},
    }
    await served.server.app()(scope, receive, send)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_ends_its_answer(served, stream):
    asyncio.run(leave(served, "wait", stream=stream, after=lambda: served.desk.is_working, heard=[]))
    until(lambda: served.engine.abandoned == ["uwait\na"])
    assert served.chat("next").status_code == 200


def test_a_client_that_leaves_in_mid_stream_ends_its_answer(served):
    heard: list[str] = []
    asyncio.run(leave(served, "wait second", stream=True, after=lambda: "http.response.body" in heard, heard=heard))
    until(lambda: served.engine.abandoned == ["uwait second\na"])
    assert served.chat("next").status_code == 200


def test_a_client_that_leaves_the_queue_frees_its_place_and_is_never_asked(served):
    thread, replies = served.background("wait first")
    asyncio.run(leave(served, "wait, another", stream=False, after=lambda: served.desk.num_waiting == 1, heard=[]))
    assert served.desk.num_waiting == 0
    served.engine.go.set()
    thread.join(timeout=10)
    assert replies[0].status_code == 200 and served.engine.asked == ["uwait first\na"]


def test_a_document_that_was_read_for_nobody_is_not_kept(served):
    asyncio.run(close(served, "/v1/documents", {"text": "wait"}, lambda: served.desk.is_working, []))
    served.engine.go.set()
    until(lambda: served.engine.documents and not served.desk.num_waiting and not served.desk.is_working)
    assert not served.server.documents and not served.host.readings and not served.host.openings


def test_a_server_that_stops_tells_those_who_wait(served):
    at_work, waiting = served.background("wait 1"), served.background("wait 2")
    served.desk.stop()
    until(lambda: served.engine.abandoned)
    served.desk.close()
    for thread, replies in (at_work, waiting):
        thread.join(timeout=10)
        assert replies[0].status_code == 503
    assert served.chat("x").status_code == 503
