"""Strict: YAML text into frozen dataclasses; a key nobody knows, a key written twice or a value of the wrong type is a sentence.

Knows type hints. Knows nothing of what the blocks mean.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import yaml

from ringctx.errors import ConfigError

Block = TypeVar("Block")


class StrictLoader(yaml.SafeLoader):
    """safe_load that refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConfigError(f"Line {key_node.start_mark.line + 1}: the key {key!r} is {kind_of(key)}; keys are words.")
            if key in seen:
                raise ConfigError(f"Line {key_node.start_mark.line + 1}: the key {key!r} is written twice; keep one.")
            seen.add(key)
        return super().construct_mapping(node, deep)


def override(data: dict[str, Any], text: str) -> None:
    """Apply one `key.sub=value`; the value is read as YAML."""
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {text!r} cannot be read; write --set key.sub=value, for example --set attention.window=4096.")
    try:
        parsed = yaml.load(value, Loader=StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text!r}: the value is not valid YAML; put quotes around text with special signs.") from error
    for depth, key in enumerate(keys[:-1]):
        data = data.setdefault(key, {})
        path = ".".join(keys[: depth + 1])
        if isinstance(data, list):
            raise ConfigError(f"--set {text!r}: {path} is a list; set the whole of it (--set '{path}=[...]'), or change it in the file.")
        if not isinstance(data, dict):
            raise ConfigError(f"--set {text!r}: {path} is a value, not a block.")
    data[keys[-1]] = parsed


def build(block: type[Block], data: Any, name: str) -> Block:
    """An instance of the dataclass from a mapping, checking keys and types."""
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{name} must be a block of keys, not {kind_of(data)}.")
    hints = typing.get_type_hints(block)
    for key in data:
        if key not in hints:
            raise ConfigError(_unknown(f"{name}.{key}".lstrip("."), key, list(hints)))
    values = {key: _value(hints[key], value, f"{name}.{key}".lstrip(".")) for key, value in data.items()}
    return block(**values)


def _unknown(path: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    advice = f"did you mean {near[0]!r}?" if near else f"the keys here are {', '.join(known)}."
    return f"There is no key {path!r}; {advice}"


def _value(hint: Any, value: Any, name: str) -> Any:
    """The value if it fits the type hint (an int fits a float); raises ConfigError otherwise."""
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value in choices:
            return value
        near = difflib.get_close_matches(str(value), choices, n=1)
        advice = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name} is {value!r}; possible are {', '.join(choices)}.{advice}")
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    lists = [kind for kind in kinds if typing.get_origin(kind) is tuple]
    if lists and isinstance(value, list):
        return tuple(_item(typing.get_args(lists[0])[0], one, f"{name}[{n}]") for n, one in enumerate(value))
    blocks = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
    if lists and blocks and not isinstance(value, dict | None):
        raise ConfigError(f"{name} must be a block of keys or a list of such blocks, not {kind_of(value)}.")
    if blocks:
        return build(typing.cast(type, blocks[0]), value, name)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) in kinds:
        return value
    wanted = " or ".join(_NAMES[kind] for kind in kinds)
    raise ConfigError(f"{name} is {value!r}, {kind_of(value)}; it must be {wanted}.")


def _item(hint: Any, value: Any, name: str) -> Any:
    """`_value` of a list's item. A block that refuses itself does not know where it stands, so that is said before it."""
    try:
        return _value(hint, value, name)
    except ConfigError as error:
        if name in str(error):
            raise
        raise ConfigError(f"In {name}: {error}") from error


_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    tuple[float, ...]: "a list of numbers",
    tuple[str, ...]: "a list of texts, written [..., ...]",
    tuple[int, ...]: "a list of whole numbers",
    tuple[tuple[int, ...], ...]: "a list of lists of whole numbers",
}


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    return {list: "a list", dict: "a block", **_NAMES}.get(type(value), type(value).__name__)


def check_keys(name: str, block: Any, taken: Mapping[str, tuple[str, ...]], of_all: tuple[str, ...] = ()) -> None:
    """Raise ConfigError for a key that was set and that a block's kind does not take.

    name: of the block, for messages. taken: the keys of each kind; of_all: those that this one takes whatever it is.
    """
    for key in dataclasses.fields(block):
        if key.name not in ("kind", *of_all, *taken[block.kind]) and getattr(block, key.name) != key.default:
            others = ", ".join(kind for kind, keys in taken.items() if key.name in keys) or "another"
            raise ConfigError(f"{name}.{key.name} means nothing with kind {block.kind}; leave it out, or set kind to {others}.")
