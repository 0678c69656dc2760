"""`ringctx …`: each command parses what was typed and delegates. The only place that reads RINGCTX_ variables or writes to the terminal.

Exit codes: 0 done · 2 the request was wrong · 3 a rank or link failed · 1 a bug.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ringctx import config as configuration
from ringctx import logs
from ringctx.config import Config
from ringctx.errors import ConfigError, RankLost, RingctxError
from ringctx.runtime import launch
from ringctx.runtime.launch import EXIT_BUG, EXIT_REQUEST, End

if TYPE_CHECKING:
    from ringctx.core.ring import Ring


@dataclass(frozen=True)
class Typed:
    """What every command knows: how much to log, and the arguments as typed, for ranks that run the same command."""

    level: str
    arguments: list[str]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ringctx", prog_name="ringctx")
@click.option("--verbose", "-v", is_flag=True, help="Say what is chosen and why.")
@click.pass_context
def ringctx(context: click.Context, verbose: bool) -> None:
    """Exact attention over documents that do not fit on one device."""
    context.obj = Typed("debug" if verbose else "info", context.obj)


@ringctx.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--document", type=click.Path(path_type=Path), help="The text to read: .txt, or .gz of it.")
@click.option("--question", help="What to ask about it.")
@click.option("--ranks", type=click.IntRange(min=1), help="Ranks to start on this machine; under torchrun, its ranks are used.")
@click.option("--save", type=click.Path(file_okay=False, path_type=Path), help="Keep what is read in this folder, as a snapshot.")
@click.option("--resume", type=click.Path(file_okay=False, path_type=Path), help="Go on with the snapshot in this folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line; the text streams to stderr.")
@click.option("--set", "overrides", multiple=True, metavar="KEY.SUB=VALUE", help="Override a key of the configuration; may be repeated.")
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
        return _launch(ranks or 1, loaded, typed)
    with _ring(loaded, ranks, typed.level) as ring:
        from ringctx.runtime.answer import Folders
        from ringctx.runtime.terminal import answer

        answer(loaded, ring, text, question, as_json=as_json, began=began, folders=Folders(save=save, resume=resume))
    return 0


@ringctx.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> int:
    """Say what this machine can run, and why not the rest."""
    from ringctx.tools import doctor

    findings = doctor.examine()
    click.echo(json.dumps({"findings": doctor.as_json(findings)}) if as_json else doctor.as_text(findings))
    return 0


@ringctx.command()
@click.option("--ranks", type=click.IntRange(min=1), help="Ranks to start on this machine, of one thread each; 2 by default.")
@click.option("--length", "lengths", type=click.IntRange(min=1), multiple=True, help="Tokens in the sequence; may be repeated.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--transport", "transports", multiple=True, help="rotate and heads by default, with a carry rotate; may be repeated.")
@click.option("--carry", type=click.Choice(["none", "selective"]), default="none", help="Time a carry against the same ring without.")
@click.option("--kernel", "kernels", multiple=True, default=("auto",), show_default=True, help="Of the ring; may be repeated.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="The median of so many is reported.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def bench(
    typed: Typed,
    ranks: int | None,
    lengths: tuple[int, ...],
    dtype: str,
    transports: tuple[str, ...],
    carry: str,
    kernels: tuple[str, ...],
    rounds: int,
    as_json: bool,
) -> int:
    """Time the ring against torch's own attention on the same tensors, as docs/results does."""
    if not launch.is_rank() and (ranks or 2) > 1:
        return launch.run(ranks or 2, typed.arguments)
    with _ring(Config(), ranks, typed.level) as ring:
        import torch

        from ringctx.methods.selective import Selective
        from ringctx.tools import bench

        torch.set_num_threads(1)
        given = Selective() if carry == "selective" else None
        asked = itertools.product(lengths or (2048, 4096, 8192), transports or ("rotate", "heads")[: 1 if given else 2], kernels)
        cases = [bench.Case(S, getattr(torch, dtype), transport, kernel=kernel, carry=given) for S, transport, kernel in asked]
        rows = [row for case in cases if (row := bench.measure(ring, case, rounds)) is not None]
        if ring.rank == 0:
            click.echo(json.dumps({"rows": bench.as_json(rows)}) if as_json else bench.table(rows))
    return 0


@ringctx.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--ranks", type=click.IntRange(min=1), help="Ranks to start on this machine; under torchrun, its ranks are used.")
@click.option("--host", help="The address to listen on; server.host by default.")
@click.option("--port", type=click.IntRange(0, 65535), help="0 for any that is free; server.port by default.")
@click.option("--set", "overrides", multiple=True, metavar="KEY.SUB=VALUE", help="Override a key of the configuration; may be repeated.")
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
        return _launch(ranks or 1, loaded, typed)
    with _ring(loaded, ranks, typed.level) as ring:
        server.serve(loaded, ring, token)
    return 0


@ringctx.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--ranks", type=click.IntRange(min=1), help="Ranks to start on this machine; under torchrun, its ranks are used.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")
@click.option("--set", "overrides", multiple=True, metavar="KEY.SUB=VALUE", help="Override a key of the configuration; may be repeated.")
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
        return launch.run(ranks or 1, typed.arguments) if loaded.training.scratch.layers else _launch(ranks or 1, loaded, typed)
    with _ring(loaded, ranks, typed.level) as ring:
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


@ringctx.command("eval")
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--task", type=click.Choice(["needle", "needles", "variables", "perplexity", "heads", "budgets", "search"]), required=True,
    help="Find a number in a text; find several with names; follow assignments; predict the text; name the heads that find; "
    "predict held-out data of `training` from few keys; search the budgets of layers.",
)  # fmt: skip
@click.option("--length", type=click.IntRange(min=2), multiple=True, help="Tokens to read; may be repeated.")
@click.option("--depth", type=click.FloatRange(0, 1), multiple=True, help="Where a needle lies, 0 first, 1 last; may be repeated.")
@click.option("--document", type=click.Path(path_type=Path), help="The text to read: .txt, or .gz of it; the King James Bible by default.")
@click.option("--seed", type=int, multiple=True, help="Of what is drawn and where the text begins; 0 by default, may be repeated.")
@click.option(
    "--wording", multiple=True,
    help="Of needles: plain, diary, passkey, letter, ledger, notice, parcel, plate, lottery, bell, library; may be repeated.",
)  # fmt: skip
@click.option("--count", type=int, help="Needles, or variables (chains, with --hops), 4 by default; heads to choose, 8 by default.")
@click.option("--hops", type=int, help="How often a variable's value is handed on; 0 by default.")
@click.option("--stride", type=int, help="Tokens by which the windows of perplexity slide; keys that a cut of search takes.")
@click.option("--tokens", type=int, help="With --stride: tokens of the text that the windows slide over.")
@click.option("--policy", multiple=True, help="Who keeps keys: whole, forgotten, streaming, window, h2o, snapkv, random; may be repeated.")
@click.option("--budget", type=int, multiple=True, help="Keys that a query sees; may be repeated. Of search, those to begin with.")
@click.option("--rise", type=float, help="Of the loss, at which search ends; 0.02 by default.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="A folder for the rows as JSON and, of needles and heads, a heat map (needs ringctx[plot]).",
)
@click.option("--ranks", type=click.IntRange(min=1), help="Ranks to start on this machine; under torchrun, its ranks are used.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--set", "overrides", multiple=True, metavar="KEY.SUB=VALUE", help="Override a key of the configuration; may be repeated.")
@click.pass_obj
def evaluate(
    typed: Typed,
    config: Path,
    document: Path | None,
    out: Path | None,
    ranks: int | None,
    as_json: bool,
    overrides: tuple[str, ...],
    **said: Any,
) -> int:
    """Measure what the model finds, or how well it predicts, by length."""
    from ringctx.tools import eval as evaluation

    loaded = configuration.load(config, overrides)
    asked = evaluation.Asked(text=read_document(document or evaluation.SHIPPED), **said)
    evaluation.check_out(asked, out)
    if not launch.is_rank() and (ranks or 1) > 1:
        return _launch(ranks or 1, loaded, typed)
    with _ring(loaded, ranks, typed.level) as ring:
        result = evaluation.measure(loaded, ring, asked)
        if ring.rank == 0:
            _tell(evaluation, result, out, as_json)
    return 0


@ringctx.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--document", type=click.Path(path_type=Path), required=True, help="The text to read: .txt, or .gz of it.")
@click.option("--tokens", type=int, help="Tokens of the text that are read; all by default.")
@click.option("--rows", type=int, default=512, show_default=True, help="Tokens whose attention is measured, spread evenly.")
@click.option("--selector", "selectors", multiple=True, help="A kind, or '{kind: a_shape, local: 1024}'; none for none. All by default.")
@click.option("--out", type=click.Path(path_type=Path), help="A folder for the measures as JSON, and pictures (needs ringctx[plot]).")
@click.option("--ranks", type=click.IntRange(min=1), help="Ranks to start on this machine; under torchrun, its ranks are used.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--set", "overrides", multiple=True, metavar="KEY.SUB=VALUE", help="Override a key of the configuration; may be repeated.")
@click.pass_obj
def inspect(
    typed: Typed,
    config: Path,
    document: Path,
    out: Path | None,
    ranks: int | None,
    as_json: bool,
    overrides: tuple[str, ...],
    selectors: tuple[str, ...],
    **said: Any,
) -> int:
    """Measure a model's attention on a document, head by head: how many keys matter, how far they are, what selectors keep."""
    from ringctx.tools import inspect as inspection
    from ringctx.tools.output import make_folder

    loaded = configuration.load(config, overrides)
    asked = inspection.Asked(text=read_document(document), selectors=inspection.selectors_of(selectors), **said)
    inspection.check(loaded, asked)
    make_folder(out, draws=True)
    if not launch.is_rank() and (ranks or 1) > 1:
        return _launch(ranks or 1, loaded, typed)
    with _ring(loaded, ranks, typed.level) as ring:
        with inspection.bar(ring.rank == 0) as after_layer:
            result = inspection.measure(loaded, ring, asked, after_layer)
        if ring.rank == 0:
            _tell(inspection, result, out, as_json)
    return 0


def _tell(tool: Any, result: Any, out: Path | None, as_json: bool) -> None:
    """Print what a tool measured, after it is written where that was asked for."""
    for path in tool.write(result, out) if out else ():
        click.echo(f"Wrote {path}.", err=True)
    click.echo(json.dumps(result.json(), ensure_ascii=False) if as_json else tool.text(result), nl=as_json)


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


def _launch(num_ranks: int, config: Config, typed: Typed) -> int:
    """Run this very command on several ranks. Weights are fetched first, so that the ranks find them."""
    from ringctx.huggingface import weights

    logs.install(level=typed.level)
    if not weights.is_ready(config.model.path):
        weights.checkpoint(config.model.path)
    return launch.run(num_ranks, typed.arguments)


@contextmanager
def _ring(config: Config, ranks: int | None, level: str) -> Iterator[Ring]:
    """The ring of this process, alone or with the ranks that a launcher started."""
    from ringctx.core.ring import Ring, job_store
    from ringctx.runtime import pulse

    size = int(os.environ.get("WORLD_SIZE", "1"))
    if launch.is_rank() and ranks is not None and ranks != size:
        raise ConfigError(f"--ranks {ranks} was given, but torchrun started {size} ranks; leave --ranks out under torchrun.")
    logs.install(int(os.environ.get("RANK", "0")), size, level=level)
    with Ring.from_env(timeout=config.ring.timeout, strict=config.ring.strict) as ring:
        beating = pulse.watch(job_store("pulse"), ring.rank, ring.size, _lose) if ring.size > 1 else nullcontext()
        with beating:
            yield ring


def _lose(sentence: str) -> None:
    """End this rank from the thread that listens: the main one waits for a rank that will not answer."""
    rank = int(os.environ["RANK"])
    code = _leave(End(rank, RankLost.exit_code, sentence))
    sys.stderr.flush()
    os._exit(code)


class _Stopped(RankLost):
    """The launcher told this rank to stop because another one had failed."""


def _stop(*_: object) -> None:
    raise _Stopped(f"Rank {os.environ.get('RANK', '0')} was stopped (SIGTERM): another rank had failed, or the job was cancelled.")


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
        return _leave(End(rank, EXIT_REQUEST, error.format_message()))
    except RingctxError as error:
        return _leave(End(rank, error.exit_code, str(error), survivor=isinstance(error, _Stopped)))
    except Exception as error:
        traceback.print_exc()
        sentence = f"This is a bug in ringctx ({type(error).__name__}: {error}). Please report it with the lines above."
        return _leave(End(rank, EXIT_BUG, sentence))
    finally:
        if launch.is_rank():  # the end is decided; torch's launcher may still say stop while Python winds down
            signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _leave(end: End) -> int:
    """Say the sentence, unless the launcher will, and end with its code."""
    launch.leave(end)
    if not launch.is_quiet():
        prefix = f"[ring {end.rank}/{os.environ['WORLD_SIZE']}] " if launch.is_rank() else ""
        click.echo(f"{prefix}{end.sentence}", err=True)
    return end.code
