"""`attention` as a list: a block for some layers, or for some heads of them.

    attention:
      - {layers: 0-26, heads: 0-5, window: 1024, sinks: 4}    # these heads of these layers
      - {layers: 0-26}                                        # what is left of these layers
      - {window: 4096}                                        # what is left of the model: its last layers

Every query head of every layer is in one block. Knows numbers of layers and heads. Knows nothing of what attention means.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from ringctx.config_attention import AttentionConfig
from ringctx.errors import ConfigError

Numbers = int | str | tuple[int, ...] | None
Parts = tuple[tuple[tuple[int, ...], AttentionConfig], ...]
"""A layer's query heads, ascending, each group with what it is asked for; blocks that ask the same are one."""

_RANGE = re.compile(r"(\d{1,4})(?:-(\d{1,4})(?::([1-9]\d{0,3}))?)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayersConfig(AttentionConfig):
    """One block of the list."""

    layers: Numbers = None
    """Layers, counted from 0: a number, a list, or text: 0-7 has both ends, 0-27:4 every fourth, commas join. null: all that are left."""
    heads: Numbers = None
    """Query heads of these layers, written likewise; key heads are shared by neighbours. null: all that are left."""

    def __post_init__(self) -> None:
        AttentionConfig.__post_init__(self)  # super() does not reach it from a class with slots
        numbers_of("attention.layers", self.layers)
        numbers_of("attention.heads", self.heads)
        if self.heads is not None and self.layers is None:
            raise ConfigError("attention.heads needs attention.layers: of which layers they are, for example layers: 0-27.")
        if self.select.dense_layers:
            raise ConfigError(
                "attention.select.dense_layers means nothing in a list of blocks; give the layers that attend to all a block of their own."
            )


def numbers_of(name: str, written: Numbers) -> tuple[int, ...] | None:
    """The numbers that layers or heads are written as, ascending; None for null. Raises ConfigError, calling it by its name."""
    if written is None:
        return None
    found = _read(name, written) if isinstance(written, str) else [written] if isinstance(written, int) else list(written)
    if not found:
        raise ConfigError(f"{name} is an empty list; name one at least, or leave the block out.")
    if min(found) < 0:
        raise ConfigError(f"{name} names {min(found)}; count from 0.")
    twice = sorted({n for n in found if found.count(n) > 1})
    if twice:
        raise ConfigError(f"{name} names {shown(twice)} twice; name each once.")
    return tuple(sorted(found))


def _read(name: str, text: str) -> list[int]:
    """The numbers of 0-7, 0-27:4 or several of these with commas between."""
    found: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if not match:
            raise ConfigError(
                f"{name} is {text!r}, which cannot be read; write 5, [0, 4], 0-7 or 0-27:4 (every fourth, both ends included)."
            )
        first, last, step = (int(x) if x else None for x in match.groups())
        assert first is not None
        if last is not None and last < first:
            raise ConfigError(f"{name} is {text!r}, which ends before it begins; write the lower number first.")
        found += range(first, first + 1 if last is None else last + 1, step or 1)
    return found


def check(blocks: Sequence[LayersConfig]) -> None:
    """Raises ConfigError for a list in which a layer or a head is in two blocks, or what all layers share differs."""
    if not blocks:
        raise ConfigError("attention is an empty list; write blocks with layers, or leave it out for the model's own attention.")
    for (a, one), (b, other) in combinations(enumerate(blocks), 2):
        both = f"attention[{a}] and attention[{b}]"
        if one.positions != other.positions:
            raise ConfigError(
                f"{both} say different positions, but all layers of a model turn by the same; write the same positions in every block."
            )
        if (one.layers is None) == (other.layers is None) and (one.heads is None) == (other.heads is None):
            _check_apart(both, one, other)


def _check_apart(both: str, one: LayersConfig, other: LayersConfig) -> None:
    """Two blocks of a kind must not have the same head."""
    if one.layers is None:
        raise ConfigError(f"{both} name no layers, and only one block can have those that are left; give one of them layers.")
    layers = _shared(numbers_of("attention.layers", one.layers), numbers_of("attention.layers", other.layers))
    heads = _shared(numbers_of("attention.heads", one.heads), numbers_of("attention.heads", other.heads))
    if layers and one.heads is None:
        raise ConfigError(f"{both} have layer {shown(layers)}; give each layer to one block, or name heads in one of them.")
    if layers and heads:
        raise ConfigError(f"{both} have head {shown(heads)} of layer {shown(layers)}; give each head to one block.")


def _shared(one: tuple[int, ...] | None, other: tuple[int, ...] | None) -> list[int]:
    return sorted(set(one or ()) & set(other or ()))


def by_layer(blocks: Sequence[LayersConfig], num_layers: int, num_heads: int) -> dict[int, Parts]:
    """What each layer of a model with so many is asked for.

    Raises ConfigError for layers and heads that the model has not, for some that no block has, for a block that is left with
    none, and for heads of a layer that differ in more than pattern, window and sinks.
    """
    owners: dict[tuple[int, int], int] = {}
    for n in sorted(range(len(blocks)), key=lambda n: (blocks[n].heads is None, blocks[n].layers is None)):
        layers = _known(n, "layers", blocks[n].layers, num_layers)
        heads = _known(n, "heads", blocks[n].heads, num_heads)
        new = {cell: n for layer in layers for head in heads if (cell := (layer, head)) not in owners}
        if not new:
            raise ConfigError(f"attention[{n}] is left with no head of any layer, since other blocks name them all; leave it out.")
        owners |= new
    missing = sorted({layer for layer in range(num_layers) for head in range(num_heads) if (layer, head) not in owners})
    if missing:
        raise ConfigError(
            f"No block of attention has layer {shown(missing)}, or some heads of it; add a block without layers for what is left: - {{}}"
        )
    plain = [_plain(block) for block in blocks]
    return {layer: _parts(layer, [plain[owners[layer, head]] for head in range(num_heads)]) for layer in range(num_layers)}


def _known(n: int, name: str, written: Numbers, count: int) -> Iterable[int]:
    """The numbers of a block; all `count` where it names none."""
    found = numbers_of(f"attention[{n}].{name}", written) or range(count)
    if found[-1] >= count:
        beyond = [number for number in found if number >= count]
        raise ConfigError(f"attention[{n}] names {name} {shown(beyond)}, but the model has {name} 0 to {count - 1}; name some that it has.")
    return found


def _plain(block: LayersConfig) -> AttentionConfig:
    """What a block asks for, whoever it is asked of."""
    return AttentionConfig(**{key.name: getattr(block, key.name) for key in dataclasses.fields(AttentionConfig)})


def _parts(layer: int, of_heads: Sequence[AttentionConfig]) -> Parts:
    """Heads that ask the same together; they may differ in pattern, window and sinks alone, and where keys carry something not in these."""
    for key in ("encoding", "scores", "branches", "select", "carry"):
        if len({getattr(block, key) for block in of_heads}) > 1:
            raise ConfigError(
                f"Heads of layer {layer} differ in attention.{key}, which holds for a whole layer; heads may differ in pattern, window and "
                f"sinks. Write the same {key} in the blocks of this layer, or give each the whole of a layer."
            )
    groups: dict[AttentionConfig, list[int]] = {}
    for head, block in enumerate(of_heads):
        groups.setdefault(block, []).append(head)
    if len(groups) > 1 and of_heads[0].carry.kind != "none":
        raise ConfigError(
            f"Heads of layer {layer} differ in pattern, window or sinks, but attention.carry gives what head 0 sees to all of them; "
            "give all heads of the layer the same."
        )
    return tuple((tuple(heads), block) for block, heads in groups.items())


def shown(numbers: Sequence[int]) -> str:
    """3, or 3, 5, 8, … 20 where there are many."""
    few = ", ".join(map(str, numbers[:3]))
    return few if len(numbers) <= 3 else f"{few}, … {numbers[-1]}"
