"""Logs: the handler that the command line installs. The library itself only logs, to `logging.getLogger("ringctx…")`."""

from __future__ import annotations

import logging
import sys


class _RingFormatter(logging.Formatter):
    """`[ring 2/8] text`; the level is named from warnings on."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.prefix = f"[ring {rank}/{size}] " if size > 1 else ""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"{self.prefix}{level}{record.getMessage()}"


def install(rank: int = 0, size: int = 1, *, level: str = "warning") -> None:
    """Send ringctx's logs to stderr with the rank in front. Rank 0 speaks from `level` on, the others from warnings on.

    Below the runtime (which kernel, which transport) only warnings are shown, unless `level` is debug.
    """
    logger = logging.getLogger("ringctx")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_RingFormatter(rank, size))
    logger.handlers = [handler]
    logger.propagate = False
    asked = logging.getLevelNamesMapping()[level.upper()]
    logger.setLevel(asked if rank == 0 else max(asked, logging.WARNING))
    for part in ("core", "kernels", "methods"):
        logging.getLogger(f"ringctx.{part}").setLevel(logging.WARNING if asked > logging.DEBUG else logging.NOTSET)
