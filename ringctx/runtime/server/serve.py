"""Serve: HTTP in a thread of rank 0, the ring in every rank's main thread, and a clean end."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import signal
import socket
import threading
from collections.abc import Iterator

import uvicorn

from ringctx.config import Config
from ringctx.core.ring import Ring
from ringctx.errors import ConfigError
from ringctx.runtime.engine import Engine
from ringctx.runtime.server.app import Server
from ringctx.runtime.server.desk import Desk
from ringctx.runtime.server.host import Host

logger = logging.getLogger(__name__)

GRACE = 5
"""Seconds that replies under way have when the server stops."""


def check(config: Config, token: str | None) -> None:
    """Raises ConfigError when others than this machine could ask without a token."""
    host = config.server.host
    with contextlib.suppress(ValueError):
        if token or ipaddress.ip_address(host).is_loopback:
            return
    if not token and host != "localhost":
        raise ConfigError(
            f"server.host {host!r} is reached from other machines, so a token is needed; "
            "set RINGCTX_TOKEN or server.token, or serve on 127.0.0.1."
        )


def serve(config: Config, ring: Ring, token: str | None) -> None:
    """Load the model and serve it until SIGTERM or SIGINT. All ranks call it; it returns on all of them.

    On ranks other than 0 the signals are ignored: rank 0 tells them to leave. Raises ConfigError when the port is taken.
    """
    check(config, token)
    desk = Desk(config.server.queue)
    with _signals(desk):
        listener = _listen(config) if ring.rank == 0 else None
        host = Host(Engine.load(config, ring), config.server)
        if listener is None:
            host.follow()
            return
        with _http(Server(config, desk, token), listener):
            host.lead(desk)
            desk.close()
        logger.info("Stopped.")


@contextlib.contextmanager
def _signals(desk: Desk) -> Iterator[None]:
    """Within it, SIGTERM and SIGINT stop the desk."""
    before = {one: signal.signal(one, desk.stop) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _listen(config: Config) -> socket.socket:
    """The socket, taken before the model is loaded: a port that is taken is said at once."""
    host, port = config.server.host, config.server.port
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        raise ConfigError(f"Cannot serve on {host}:{port}: {error.strerror or error}. Give another --host or --port.") from error


@contextlib.contextmanager
def _http(server: Server, listener: socket.socket) -> Iterator[None]:
    """Within it, the routes are served."""
    settings = uvicorn.Config(
        server.app(), log_config=None, access_log=False, lifespan="off", server_header=False, timeout_graceful_shutdown=GRACE
    )
    http = uvicorn.Server(settings)
    thread = threading.Thread(target=http.run, args=([listener],), name="http", daemon=True)
    thread.start()
    host, port = listener.getsockname()[:2]
    logger.info("Serving %s on http://%s:%d", server.model, f"[{host}]" if ":" in host else host, port)
    yield
    http.should_exit = True
    thread.join(timeout=2 * GRACE)
