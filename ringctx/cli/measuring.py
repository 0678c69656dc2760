"""`ringctx doctor bench eval inspect extrapolate`: what measures machines and models."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ringctx import config as configuration
from ringctx.cli.started import AS_JSON, CONFIG, OVERRIDES, RANKS, Typed, launched, read_document, ring_of
from ringctx.config import Config
from ringctx.errors import ConfigError
from ringctx.runtime import launch

if TYPE_CHECKING:
    from ringctx.tools.planner import Asked, Link, Prediction


@click.command()
@AS_JSON
def doctor(as_json: bool) -> int:
    """Say what this machine can run, and why not the rest."""
    from ringctx.tools import doctor

    findings = doctor.examine()
    click.echo(json.dumps({"findings": doctor.as_json(findings)}) if as_json else doctor.as_text(findings))
    return 0


@click.command()
@click.option("--ranks", type=click.IntRange(min=1), help="Ranks to start on this machine, of one thread each; 2 by default.")
@click.option("--length", "lengths", type=click.IntRange(min=1), multiple=True, help="Tokens in the sequence; may be repeated.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--width", type=click.IntRange(min=1), default=64, show_default=True, help="Of each of the 8 heads.")
@click.option("--transport", "transports", multiple=True, help="rotate and heads by default, with a carry rotate; may be repeated.")
@click.option("--carry", type=click.Choice(["none", "selective"]), default="none", help="Time a carry against the same ring without.")
@click.option("--kernel", "kernels", multiple=True, default=("auto",), show_default=True, help="Of the ring; may be repeated.")
@click.option("--nodes", type=click.IntRange(min=1), default=1, help="Equal runs of ranks between which a double ring passes keys once.")
@click.option("--heads", type=click.IntRange(min=1), default=1, help="Consecutive ranks that trade heads for tokens, around rings.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="The median of so many is reported.")
@click.option("--floors", is_flag=True, help="Time kernels alone and messages alone in every round too, and how much of them is hidden.")
@click.option("--trace", type=click.Path(path_type=Path), help="A folder for a timeline of each rank, for `ringctx show --trace`.")
@click.option("--peer", "peers", multiple=True, help="Another library, verified and timed in the same rounds (ringctx[peers]); repeatable.")
@AS_JSON
@click.pass_obj
def bench(
    typed: Typed,
    ranks: int | None,
    lengths: tuple[int, ...],
    dtype: str,
    width: int,
    transports: tuple[str, ...],
    carry: str,
    kernels: tuple[str, ...],
    nodes: int,
    heads: int,
    rounds: int,
    floors: bool,
    trace: Path | None,
    peers: tuple[str, ...],
    as_json: bool,
) -> int:
    """Time the ring against torch's own attention on the same tensors, as docs/results does."""
    from ringctx.core.ring import require_fold

    if not launch.is_rank():
        require_fold(ranks or 2, heads, nodes)
    if not launch.is_rank() and (ranks or 2) > 1:
        return launch.run(ranks or 2, typed.arguments)
    with ring_of(Config(), ranks, typed.level, heads=heads, nodes=nodes) as ring:
        import torch

        from ringctx.methods.selective import Selective
        from ringctx.tools import bench

        torch.set_num_threads(1)
        given = Selective() if carry == "selective" else None
        asked = itertools.product(lengths or (2048, 4096, 8192), transports or ("rotate", "heads")[: 1 if given else 2], kernels)
        cases = [bench.Case(S, getattr(torch, dtype), transport, d=width, kernel=kernel, carry=given) for S, transport, kernel in asked]
        beside = [bench.peer(name) for name in peers]
        rows = [row for case in cases if (row := bench.measure(ring, case, rounds, floors=floors, trace=trace, peers=beside)) is not None]
        if ring.rank == 0:
            click.echo(json.dumps({"rows": bench.as_json(rows)}) if as_json else bench.table(rows))
    return 0


@click.command()
@click.argument("config", type=click.Path(path_type=Path), required=False)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The page to write, FILE.html.")
@click.option("--tokens", type=click.IntRange(min=1), default=8192, show_default=True, help="Of the sequence that is planned.")
@click.option("--ranks", type=click.IntRange(min=1), default=4, show_default=True, help="That share it; none is started.")
@click.option("--trace", type=click.Path(path_type=Path), help="A folder of timelines, as `ringctx bench --trace` writes.")
@OVERRIDES
def show(config: Path | None, out: Path, tokens: int, ranks: int, trace: Path | None, overrides: tuple[str, ...]) -> int:
    """Draw one page of who computes and sends what: masks and plans of CONFIG, timelines of --trace."""
    from ringctx.tools import show
    from ringctx.tools.show.timelines import merged

    if config is None and trace is None:
        raise ConfigError("Nothing to show; give a CONFIG for its plans, --trace for timelines, or both.")
    show.check(out)
    drawn = show.shown(configuration.load(config, overrides), tokens, ranks) if config is not None else []
    for path in show.write(out, drawn, merged(trace) if trace is not None else None):
        click.echo(f"Wrote {path}.", err=True)
    return 0


@click.command()
@CONFIG
@click.option("--seq-len", "tokens", type=click.IntRange(min=1), default=131_072, show_default=True, help="Tokens to read.")
@click.option("--ranks", type=click.IntRange(min=1), help="That share them, 8 by default; started, 2 by default, for --device here alone.")
@click.option("--device", default="h100", show_default=True, help="What each rank is; here: this machine, measured for some seconds.")
@click.option("--link", help="Between ranks: a name such as ndr, or GB/s one way; by default what joins such devices in a node.")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="That the ranks sit on, in equal runs.")
@AS_JSON
@OVERRIDES
@click.pass_obj
def plan(
    typed: Typed,
    config: Path,
    tokens: int,
    ranks: int | None,
    device: str,
    link: str | None,
    nodes: int,
    as_json: bool,
    overrides: tuple[str, ...],
) -> int:
    """Predict what reading a sequence costs: bytes, memory, balance and time, by layout and transport."""
    from ringctx.tools import planner, shapes

    asked = configuration.load(config, overrides)
    model, between = shapes.shapes_of(asked), planner.link_of(link) if link else None
    layers = list(shapes.by_layer(asked, model).values())
    if device != "here":
        run = _machine(asked, tokens, device, ranks or 8, between, nodes)
        return _planned(planner.predict(model, layers, run), run, as_json)
    if nodes > 1 or asked.model.tensor_parallel > 1:
        raise ConfigError("--device here measures ranks of one machine, with whole layers; leave out --nodes and model.tensor_parallel.")
    if not launch.is_rank() and (ranks or 2) > 1:
        return launched(ranks or 2, asked, typed)
    with ring_of(asked, ranks, typed.level) as ring:
        run = planner.asked_here(asked, ring, tokens, between)
        return 0 if ring.rank else _planned(planner.predict(model, layers, run), run, as_json)


def _machine(config: Config, tokens: int, device: str, ranks: int, link: Link | None, nodes: int) -> Asked:
    """Devices and links by name."""
    from ringctx.tools import planner

    if ranks % nodes:
        raise ConfigError(f"{ranks} ranks do not sit on {nodes} nodes in equal runs; give a number of nodes that divides them.")
    if link is None and nodes > 1:
        raise ConfigError(f"{nodes} nodes were given; say by --link what joins them: {', '.join(planner.LINKS)}, or GB/s one way.")
    kind, node_link = planner.device_named(device), planner.link_of(planner.NODE_LINK[device])
    return planner.Asked(
        tokens=tokens, ranks=ranks, device=kind, link=link or node_link, node_link=node_link, nodes=nodes,
        tensor=config.model.tensor_parallel, page=config.cache.page,
    )  # fmt: skip


def _planned(found: Prediction, run: Asked, as_json: bool) -> int:
    from ringctx.tools import planner

    click.echo(json.dumps(found.json()) if as_json else planner.text(found, run))
    return 0


@click.command("eval")
@CONFIG
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
@RANKS
@AS_JSON
@OVERRIDES
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
        return launched(ranks or 1, loaded, typed)
    with ring_of(loaded, ranks, typed.level) as ring:
        result = evaluation.measure(loaded, ring, asked)
        if ring.rank == 0:
            _tell(evaluation, result, out, as_json)
    return 0


@click.command()
@CONFIG
@click.option("--document", type=click.Path(path_type=Path), required=True, help="The text to read: .txt, or .gz of it.")
@click.option("--tokens", type=int, help="Tokens of the text that are read; all by default.")
@click.option("--rows", type=int, default=512, show_default=True, help="Tokens whose attention is measured, spread evenly.")
@click.option("--selector", "selectors", multiple=True, help="A kind, or '{kind: a_shape, local: 1024}'; none for none. All by default.")
@click.option("--out", type=click.Path(path_type=Path), help="A folder for the measures as JSON, and pictures (needs ringctx[plot]).")
@RANKS
@AS_JSON
@OVERRIDES
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
        return launched(ranks or 1, loaded, typed)
    with ring_of(loaded, ranks, typed.level) as ring:
        with inspection.bar(ring.rank == 0) as after_layer:
            result = inspection.measure(loaded, ring, asked, after_layer)
        if ring.rank == 0:
            _tell(inspection, result, out, as_json)
    return 0


@click.command()
@CONFIG
@click.option("--method", multiple=True, help="As 'rope', 'yarn' or 'coca, dynamic_ntk'; may be repeated. All by default; window always.")
@click.option("--length", type=click.IntRange(min=2), multiple=True, help="Tokens to read; may be repeated. Up to 16 times training's.")
@click.option("--seed", type=int, multiple=True, help="Of models; 0 by default, may be repeated.")
@click.option("--windows", type=click.IntRange(min=1), help="Held-out windows of each length; 32 by default.")
@click.option("--out", type=click.Path(path_type=Path), help="A folder for the rows as JSON, and a picture (needs ringctx[plot]).")
@RANKS
@AS_JSON
@OVERRIDES
@click.pass_obj
def extrapolate(
    typed: Typed, config: Path, out: Path | None, ranks: int | None, as_json: bool, overrides: tuple[str, ...], **said: Any
) -> int:
    """Train small models on short texts and test them on long ones, by many methods of positions."""
    from ringctx.tools.output import make_folder

    loaded = configuration.load(config, overrides)
    try:
        from ringctx.tools import extrapolate as extrapolation
    except ModuleNotFoundError as error:
        raise ConfigError(f"`ringctx extrapolate` needs {error.name}, which is not installed; pip install 'ringctx[train]'.") from error
    asked = extrapolation.check(loaded, extrapolation.Asked(**{name: value for name, value in said.items() if value}))
    make_folder(out, draws=True)
    if not launch.is_rank() and (ranks or 1) > 1:
        return launch.run(ranks or 1, typed.arguments)
    with ring_of(loaded, ranks, typed.level) as ring:
        with extrapolation.bar(asked, ring.rank == 0) as after_row:
            result = extrapolation.measure(loaded, ring, asked, after_row)
        if ring.rank == 0:
            _tell(extrapolation, result, out, as_json)
    return 0


def _tell(tool: Any, result: Any, out: Path | None, as_json: bool) -> None:
    """Print what a tool measured, after it is written where that was asked for."""
    for path in tool.write(result, out) if out else ():
        click.echo(f"Wrote {path}.", err=True)
    click.echo(json.dumps(result.json(), ensure_ascii=False) if as_json else tool.text(result), nl=as_json)
