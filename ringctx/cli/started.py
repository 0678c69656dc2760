"""What commands share: what was typed, the ranks of a command, its document, and how a process ends."""

from __future__ import annotations

import gzip
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ringctx import logs
from ringctx.config import Config
from ringctx.errors import ConfigError, RankLost
from ringctx.runtime import launch
from ringctx.runtime.launch import End

if TYPE_CHECKING:
    from ringctx.core.ring import Ring


CONFIG = click.argument("config", type=click.Path(path_type=Path))
RANKS = click.option("--ranks", type=click.IntRange(min=1), help="Ranks to start on this machine; under torchrun, its ranks are used.")
OVERRIDES = click.option(
    "--set", "overrides", multiple=True, metavar="KEY.SUB=VALUE", help="Override a key of the configuration; may be repeated."
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@dataclass(frozen=True)
class Typed:
    """What every command knows: how much to log, and the arguments as typed, for ranks that run the same command."""

    level: str
    arguments: list[str]


def read_document(path: Path) -> str:
    """The text of a .txt or .gz file. Raises ConfigError when it cannot be read or is empty."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8")
    except (OSError, EOFError) as error:
        raise ConfigError(f"Cannot read the document {str(path)!r}: {getattr(error, 'strerror', None) or error}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"The document {str(path)!r} is not text in UTF-8 (byte {error.start}); convert it first.") from error
    if not text.strip():
        raise ConfigError(f"The document {str(path)!r} is empty; give one with text.")
    return text


def launched(num_ranks: int, config: Config, typed: Typed) -> int:
    """Run this very command on several ranks. Weights are fetched first, so that the ranks find them."""
    from ringctx.huggingface import weights

    logs.install(level=typed.level)
    if not weights.is_ready(config.model.path):
        weights.checkpoint(config.model.path)
    return launch.run(num_ranks, typed.arguments)


@contextmanager
def ring_of(config: Config, ranks: int | None, level: str, *, heads: int = 1, nodes: int = 1) -> Iterator[Ring]:
    """The ring of this process, alone or with the ranks that a launcher started, folded so."""
    from ringctx.core.ring import Ring, job_store
    from ringctx.runtime import pulse

    size = int(os.environ.get("WORLD_SIZE", "1"))
    if launch.is_rank() and ranks is not None and ranks != size:
        raise ConfigError(f"--ranks {ranks} was given, but torchrun started {size} ranks; leave --ranks out under torchrun.")
    logs.install(int(os.environ.get("RANK", "0")), size, level=level)
    with Ring.from_env(timeout=config.ring.timeout, strict=config.ring.strict, heads=heads, nodes=nodes) as ring:
        beating = pulse.watch(job_store("pulse"), ring.rank, ring.size, _lose) if ring.size > 1 else nullcontext()
        with beating:
            yield ring


def _lose(sentence: str) -> None:
    """End this rank from the thread that listens: the main one waits for a rank that will not answer."""
    rank = int(os.environ["RANK"])
    code = left(End(rank, RankLost.exit_code, sentence))
    sys.stderr.flush()
    os._exit(code)


def left(end: End) -> int:
    """Say the sentence, unless the launcher will, and end with its code."""
    launch.leave(end)
    if not launch.is_quiet():
        prefix = f"[ring {end.rank}/{os.environ['WORLD_SIZE']}] " if launch.is_rank() else ""
        click.echo(f"{prefix}{end.sentence}", err=True)
    return end.code
