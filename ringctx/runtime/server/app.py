"""App: the routes. Each reads a body, puts a job on the desk and replies with what comes back; a client that leaves frees its place."""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ringctx.config import Config
from ringctx.runtime.server import bodies
from ringctx.runtime.server.bodies import Ask
from ringctx.runtime.server.desk import Desk, Done, Event, Forget, Job, Read, Text
from ringctx.runtime.server.metrics import Metrics
from ringctx.runtime.server.refusal import Refusal
from ringctx.runtime.server.replies import Form, event

Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass
class Server:
    """What the routes share. documents: id -> what GET says of it, those being read left out. token: None lets everybody in."""

    config: Config
    desk: Desk
    token: str | None = None
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_reading: int = 0
    metrics: Metrics = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.desk, self.documents)

    @property
    def model(self) -> str:
        """What clients call the model: its name, or its folder's."""
        return Path(self.config.model.path).name

    def app(self) -> Starlette:
        """The routes."""
        routes = [
            ("/v1/chat/completions", self.chat, "POST"), ("/v1/completions", self.completion, "POST"), ("/v1/models", self.models, "GET"),
            ("/v1/models/{id:path}", self.models, "GET"), ("/v1/documents", self.read, "POST"), ("/v1/documents", self.listed, "GET"),
            ("/v1/documents/{id}", self.one, "GET"), ("/v1/documents/{id}", self.forget, "DELETE"), ("/metrics", self.counts, "GET"),
        ]  # fmt: skip
        made = [Route(path, self._guarded(path, do), methods=[method]) for path, do, method in routes]
        return Starlette(routes=[*made, Route("/health", self.health)], exception_handlers={HTTPException: _no_route})

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, bodies.chat, is_chat=True)

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, bodies.completion, is_chat=False)

    async def _answer(self, request: Request, parse: Callable[..., Ask], *, is_chat: bool) -> Response:
        fields = bodies.parse(await self._body(request))
        ask = parse(fields, self.config.generation, self.config.server.max_tokens)
        if ask.model != self.model:
            raise bodies.unknown_model(ask.model, self.model)
        if ask.document is not None and ask.document not in self.documents:
            raise bodies.unknown_document(ask.document)
        form = Form(model=self.model, is_chat=is_chat)
        async with self._job(request, ask) as job:
            if not ask.stream:
                return JSONResponse(form.whole(await self._end(job)))
            first = await job.events.get()  # a refusal is still a status of its own, not an event in a stream
            if isinstance(first, Refusal):
                raise first
        return _Stream(self._pieces(job, form, ask, first), self.desk, job)

    async def _pieces(self, job: Job, form: Form, ask: Ask, first: Event) -> AsyncIterator[bytes]:
        """The answer's pieces as they come."""
        if opening := form.opening():
            yield event(opening)
        now = first
        while isinstance(now, Text):
            yield event(form.piece(now))
            now = await job.events.get()
        if isinstance(now, Refusal):
            yield event(now.json())
            return
        self.metrics.answered(now, time.monotonic() - job.arrived)
        yield event(form.ending(now))
        if ask.with_usage:
            yield event(form.counted(now))
        yield event("[DONE]")

    async def _end(self, job: Job) -> Done:
        """How the job ended, pieces left out. Raises the Refusal if it was one."""
        while isinstance(now := await job.events.get(), Text):
            pass
        if isinstance(now, Refusal):
            raise now
        self.metrics.answered(now, time.monotonic() - job.arrived)
        return now

    @asynccontextmanager
    async def _job(self, request: Request, work: Ask | Read | Forget) -> AsyncIterator[Job]:
        """A job on the desk. If the client leaves while the body runs, the job ends with a refusal that nobody reads, and is left."""
        job = Job(work)
        self.desk.put(job)

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            job.events.put_nowait(Refusal(499, "client_left", "The client closed its connection."))

        watching = asyncio.create_task(watch())
        try:
            yield job
        except BaseException:
            self.desk.leave(job)
            raise
        finally:
            watching.cancel()

    async def read(self, request: Request) -> Response:
        """POST /v1/documents: read a text once. Replies when it is read."""
        text = bodies.document(bodies.parse(await self._body(request)))
        most = self.config.server.documents
        if len(self.documents) + self.num_reading >= most:
            raise Refusal(413, "too_many_documents", f"There are {most} documents already, as many as are kept; delete one first.")
        self.num_reading += 1
        document = f"doc-{uuid.uuid4().hex}"
        try:
            async with self._job(request, Read(document, text)) as job:
                done = await self._end(job)
        except BaseException:
            with suppress(Refusal):  # it may have been read to its end nevertheless
                self.desk.put(Job(Forget(document)))
            raise
        finally:
            self.num_reading -= 1
        said = {"id": document, "object": "document", "created": int(time.time()), "tokens": done.num_tokens, "characters": len(text)}
        self.documents[document] = said
        return JSONResponse(said, 201)

    async def listed(self, request: Request) -> Response:
        """GET /v1/documents."""
        return JSONResponse({"object": "list", "data": list(self.documents.values())})

    async def one(self, request: Request) -> Response:
        """GET /v1/documents/ID."""
        return JSONResponse(self._known(request))

    async def forget(self, request: Request) -> Response:
        """DELETE /v1/documents/ID: gone at once for new requests; those that wait already are answered first."""
        document = str(self._known(request)["id"])
        self.desk.put(Job(Forget(document)))
        del self.documents[document]
        return JSONResponse({"id": document, "object": "document", "deleted": True})

    def _known(self, request: Request) -> dict[str, Any]:
        asked = request.path_params["id"]
        if asked not in self.documents:
            raise bodies.unknown_document(asked)
        return self.documents[asked]

    async def models(self, request: Request) -> Response:
        """GET /v1/models, and /v1/models/ID."""
        said = {"id": self.model, "object": "model", "created": self.created, "owned_by": "ringctx"}
        asked = request.path_params.get("id")
        if asked not in (None, self.model):
            raise bodies.unknown_model(str(asked), self.model)
        return JSONResponse(said if asked else {"object": "list", "data": [said]})

    async def counts(self, request: Request) -> Response:
        """GET /metrics, in Prometheus' text form."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def health(self, request: Request) -> Response:
        """GET /health: open to everybody."""
        return JSONResponse({"status": "ok", "waiting": self.desk.num_waiting, "documents": len(self.documents)})

    async def _body(self, request: Request) -> bytes:
        """The body, refused as soon as it is longer than allowed."""
        most, data = self.config.server.body_bytes, bytearray()
        too_large = Refusal(413, "body_too_large", f"The body is longer than the {most} bytes that are taken (server.body_bytes).")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > most:
            raise too_large
        async for part in request.stream():
            data += part
            if len(data) > most:
                raise too_large
        return bytes(data)

    def _guarded(self, path: str, do: Endpoint) -> Endpoint:
        """The endpoint for those who may use it; what it refuses is an error object, and every reply is counted."""

        async def guarded(request: Request) -> Response:
            try:
                self._check_token(request)
                response = await do(request)
            except Refusal as refusal:
                response = JSONResponse(refusal.json(), refusal.status, refusal.headers)
            self.metrics.replied(path, response.status_code)
            return response

        return guarded

    def _check_token(self, request: Request) -> None:
        if self.token is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token.encode()):
            raise Refusal(401, "invalid_api_key", "The token is missing or wrong; send the header Authorization: Bearer TOKEN.")


class _Stream(StreamingResponse):
    """A stream whose job is left when it ends, however it ends: Starlette cancels it when the client leaves."""

    def __init__(self, pieces: AsyncIterator[bytes], desk: Desk, job: Job) -> None:
        super().__init__(pieces, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._desk, self._job = desk, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._desk.leave(self._job)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refusal = Refusal(error.status_code, "no_such_route", f"{request.method} {request.url.path}: {error.detail}.")
    return JSONResponse(refusal.json(), error.status_code, error.headers)
