"""Output: what every tool does with what it measured: tables for a terminal, and a folder that can be written."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ringctx.errors import ConfigError

LEAST_WIDTH = 120
"""Columns of a terminal that the widest table takes; a narrower one folds its lines rather than lose figures."""


def printed(*tables: Table) -> str:
    """The tables as text for a terminal."""
    console = Console(width=max(Console().width, LEAST_WIDTH))
    with console.capture() as captured:
        for table in tables:
            console.print(table)
    return captured.get()


def make_folder(out: Path | None, *, draws: bool) -> None:
    """Make the folder of --out, if one is given. Raises ConfigError now, not after hours, where it could not be written or drawn into."""
    if out is None:
        return
    if draws and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "--out draws with matplotlib, which is not installed; "
            "pip install 'ringctx[plot]', or leave --out out and keep what --json prints."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {str(out)!r} cannot be made ({error.strerror}); give a folder that can be written.") from error
