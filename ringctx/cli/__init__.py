"""`ringctx …`: each command parses what was typed and delegates. The only place that reads RINGCTX_ variables or writes to the terminal.

Exit codes: 0 done · 2 the request was wrong · 3 a rank or link failed · 1 a bug.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import click

from ringctx import config as configuration
from ringctx.cli import measuring
from ringctx.cli.started import CONFIG, OVERRIDES, RANKS, Typed, launched, left, read_document, ring_of
from ringctx.errors import ConfigError, RankLost, RingctxError
from ringctx.runtime import launch
from ringctx.runtime.launch import EXIT_BUG, EXIT_REQUEST, End

__all__ = ["main", "read_document", "ringctx"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ringctx", prog_name="ringctx")
@click.option("--verbose", "-v", is_flag=True, help="Say what is chosen and why.")
@click.pass_context
def ringctx(context: click.Context, verbose: bool) -> None:
    """Exact attention over documents that do not fit on one device."""
    context.obj = Typed("debug" if verbose else "info", context.obj)


@ringctx.command()
@CONFIG
@click.option("--document", type=click.Path(path_type=Path), help="The text to read: .txt, or .gz of it.")
@click.option("--question", help="What to ask about it.")
@RANKS
@click.option("--save", type=click.Path(file_okay=False, path_type=Path), help="Keep what is read in this folder, as a snapshot.")
@click.option("--resume", type=click.Path(file_okay=False, path_type=Path), help="Go on with the snapshot in this folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line; the text streams to stderr.")
@OVERRIDES
@click.option("--print-config", is_flag=True, help="Print the configuration with its overrides, and stop.")
@click.pass_obj
def generate(
    typed: Typed,
    config: Path,
    document: Path | None,
    question: str | None,
    ranks: int | None,
    save: Path | None,
    resume: Path | None,
    as_json: bool,
    overrides: tuple[str, ...],
    print_config: bool,
) -> int:
    """Read a document over the ring and answer a question about it."""
    began = time.perf_counter()
    loaded = configuration.load(config, overrides)
    if print_config:
        click.echo(configuration.dump(loaded), nl=False)
        return 0
    if document is None or question is None:
        missing = "--document FILE" if document is None else "--question TEXT"
        raise ConfigError(f"`ringctx generate` needs {missing}: the text to read and what to ask about it.")
    text = read_document(document)
    if not launch.is_rank() and (ranks or 1) > 1:
        return launched(ranks or 1, loaded, typed)
    with ring_of(loaded, ranks, typed.level) as ring:
        from ringctx.runtime.answer import Folders
        from ringctx.runtime.terminal import answer

        answer(loaded, ring, text, question, as_json=as_json, began=began, folders=Folders(save=save, resume=resume))
    return 0


@ringctx.command()
@CONFIG
@RANKS
@click.option("--host", help="The address to listen on; server.host by default.")
@click.option("--port", type=click.IntRange(0, 65535), help="0 for any that is free; server.port by default.")
@OVERRIDES
@click.pass_obj
def serve(typed: Typed, config: Path, ranks: int | None, host: str | None, port: int | None, overrides: tuple[str, ...]) -> int:
    """Answer over HTTP as OpenAI's interface does; a document is read once and asked many times."""
    loaded = configuration.load(config, overrides)
    where = loaded.server
    where = dataclasses.replace(where, host=where.host if host is None else host, port=where.port if port is None else port)
    loaded = dataclasses.replace(loaded, server=where)
    try:
        from ringctx.runtime.server import serve as server
    except ModuleNotFoundError as error:
        raise ConfigError(f"`ringctx serve` needs {error.name}, which is not installed; pip install 'ringctx[serve]'.") from error
    token = os.environ.get("RINGCTX_TOKEN") or loaded.server.token
    server.check(loaded, token)
    if not launch.is_rank() and (ranks or 1) > 1:
        return launched(ranks or 1, loaded, typed)
    with ring_of(loaded, ranks, typed.level) as ring:
        server.serve(loaded, ring, token)
    return 0


@ringctx.command()
@CONFIG
@RANKS
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")
@OVERRIDES
@click.option("--deepspeed", type=click.Path(path_type=Path), metavar="FILE", help="DeepSpeed's JSON: its engine takes the steps.")
@click.pass_obj
def train(typed: Typed, config: Path, ranks: int | None, as_json: bool, overrides: tuple[str, ...], deepspeed: Path | None) -> int:
    """Train over the ring; a run that broke off goes on from its newest checkpoint."""
    loaded = configuration.load(config, overrides)
    try:
        from ringctx.training import loop
    except ModuleNotFoundError as error:
        raise ConfigError(f"`ringctx train` needs {error.name}, which is not installed; pip install 'ringctx[train]'.") from error
    loop.check(loaded)
    make = loop.Trainer.of if deepspeed is None else _deepspeed(deepspeed)
    if not launch.is_rank() and (ranks or 1) > 1:
        return launch.run(ranks or 1, typed.arguments) if loaded.training.scratch.layers else launched(ranks or 1, loaded, typed)
    with ring_of(loaded, ranks, typed.level) as ring:
        result = loop.train(loaded, ring, make)
        if ring.rank == 0:
            click.echo(json.dumps(result) if as_json else loop.summary(result))
    return 0


def _deepspeed(file: Path) -> Any:
    """How an engine of DeepSpeed is made."""
    try:
        from ringctx.embed.deepspeed import DeepSpeedTrainer
    except ModuleNotFoundError as error:
        raise ConfigError(f"--deepspeed needs {error.name}, which is not installed; pip install 'ringctx[deepspeed]'.") from error
    return partial(DeepSpeedTrainer.made, file)


class _Stopped(RankLost):
    """The launcher told this rank to stop because another one had failed."""


def _stop(*_: object) -> None:
    raise _Stopped(f"Rank {os.environ.get('RANK', '0')} was stopped (SIGTERM): another rank had failed, or the job was cancelled.")


for measurement in (
    measuring.doctor,
    measuring.bench,
    measuring.plan,
    measuring.show,
    measuring.evaluate,
    measuring.inspect,
    measuring.extrapolate,
):
    ringctx.add_command(measurement)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code. An error made on purpose is one sentence, a bug is a traceback."""
    rank = int(os.environ.get("RANK", "0"))
    if launch.is_rank():
        signal.signal(signal.SIGTERM, _stop)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return int(ringctx.main(arguments, obj=arguments, prog_name="ringctx", standalone_mode=False) or 0)
    except click.exceptions.Abort:
        return 128 + int(signal.SIGINT)
    except click.ClickException as error:
        return left(End(rank, EXIT_REQUEST, error.format_message()))
    except RingctxError as error:
        return left(End(rank, error.exit_code, str(error), survivor=isinstance(error, _Stopped)))
    except Exception as error:
        traceback.print_exc()
        sentence = f"This is a bug in ringctx ({type(error).__name__}: {error}). Please report it with the lines above."
        return left(End(rank, EXIT_BUG, sentence))
    finally:
        if launch.is_rank():  # the end is decided; torch's launcher may still say stop while Python winds down
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
