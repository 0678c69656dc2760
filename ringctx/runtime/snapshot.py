"""Snapshot: a folder that holds what was read so far, whole after a crash at any time, for any number of ranks.

    snapshot.json                            what it was made from, tokens read, parts and their SHA-256; written last
    part-<begin>-<end>-rank<r>.safetensors   what rank r owned of tokens begin..end-1: their indices (n), and of every layer
                                             keys.<layer> before rotation and values.<layer> (n g d)
    carries-<end>-rank<r>.safetensors        what keys of tokens 0..end-1 on rank r carry: their indices (n) and carry.<layer> (n)

Parts are added, never changed; carries, which later tokens change, are written anew each time. Each file is on disk before it
gets its name. A part that snapshot.json does not list is of
a run that broke off, and is written anew. Knows files, indices and ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ringctx.config import AttentionConfig, Config, LayersConfig
from ringctx.config_layers import by_layer
from ringctx.core.layout import Layout
from ringctx.core.ring import Ring
from ringctx.errors import ConfigError
from ringctx.huggingface.weights import checkpoint
from ringctx.runtime.cache import KVCache
from ringctx.runtime.talk import share

FORMAT = 1
"""Of the files; one that is not this is refused."""
NAME = "snapshot.json"
EXACT = ("model", "bf16")
"""Kinds of storage that give back the same keys when they are written once more; quantised ones would be rounded twice."""
_DIGESTS = {
    "model": "another model",
    "prompt": "another document or generation.prompt",
    "attention by layer": "other blocks of attention for its layers",
}
"""How a sentence calls what is compared by its digest."""


@dataclass(frozen=True)
class Part:
    """One file: what one rank owned of tokens begin..end-1."""

    file: str
    sha256: str
    begin: int
    end: int


@dataclass
class Snapshot:
    """A folder for one prompt. All ranks see the same folder and call each method together.

    source: what the keys were made from, from `source_of`. read: the tokens 0..read-1 are in the folder.
    """

    folder: Path
    source: dict[str, Any]
    ring: Ring
    device: torch.device
    read: int = 0
    parts: list[Part] = field(default_factory=list)
    carries: list[Part] = field(default_factory=list)

    @classmethod
    def new(cls, folder: Path, source: dict[str, Any], ring: Ring, device: torch.device) -> Self:
        """Nothing is read yet. Raises ConfigError when the folder holds a snapshot, or when its keys could not be given back."""
        if source["cache.storage"] not in EXACT:
            raise ConfigError(
                f"--save keeps keys and values as they are held, but cache.storage is {source['cache.storage']}, which would be rounded "
                f"again when it is resumed; set cache.storage to {' or '.join(EXACT)}, or leave --save out."
            )
        if (folder / NAME).exists():
            sentence = f"{str(folder)!r} holds a snapshot already; go on with --resume {folder}, or name another folder in --save."
            raise ConfigError(sentence)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"No snapshot can be saved in {str(folder)!r}: {error.strerror or error}; name another folder.") from error
        return cls(folder, source, ring, device)

    @classmethod
    def open(cls, folder: Path, source: dict[str, Any], ring: Ring, device: torch.device) -> Self:
        """The snapshot in the folder. Raises ConfigError when there is none, it is damaged, or was made from something else."""
        found = _listed(folder)
        differences = list(_differences(found["source"], json.loads(json.dumps(source))))
        if differences:
            raise ConfigError(
                f"The snapshot in {str(folder)!r} was made from {', '.join(differences)}; give what it was made from, "
                "or leave --resume out and read anew."
            )
        parts, carries = ([Part(**part) for part in found.get(name, ())] for name in ("parts", "carries"))
        snapshot = cls(folder, source, ring, device, found["read"], parts, carries)
        snapshot._together(snapshot._verify, "read")
        return snapshot

    def load(self, cache: KVCache, layouts: Sequence[Layout]) -> None:
        """The tokens of these chunks, which were all read, into an empty cache: each rank takes those that it owns now."""
        for (begin, end), parts in groupby(self.parts, key=lambda part: (part.begin, part.end)):
            chunks = [layout for layout in layouts if begin < layout.length <= end]
            if chunks:
                cache.extend(Layout(tuple(tuple(chain(*spans)) for spans in zip(*(x.spans for x in chunks), strict=True))))
                mine = torch.cat([layout.indices(self.ring.rank) for layout in chunks])
                self._load(cache, mine, list(parts))
        if self.carries:
            self._load_carries(cache)

    def save(self, cache: KVCache) -> None:
        """Add what was cached since the last time. Raises ConfigError, on all ranks, when one of them cannot write."""
        end = cache.layout.length
        if end <= self.read:
            return
        parts = [Part(**part) for part in self._together(lambda: asdict(self._write(cache, end)), "written")]
        carries = [Part(**part) for part in self._together(lambda: self._write_carries(cache, end), "written") if part]
        outdated, self.read, self.parts, self.carries = self.carries, end, [*self.parts, *parts], carries
        self._together(lambda: self._list(outdated) if self.ring.rank == 0 else None, "written")

    def _load(self, cache: KVCache, mine: Tensor, parts: list[Part]) -> None:
        """Append the tokens of these indices (n) from the parts that hold them."""
        from safetensors import safe_open

        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(self.folder / part.file, "pt")) for part in parts]
            places = [_places(file.get_tensor("indices"), mine) for file in files]
            order = torch.cat([into for into, _ in places]).argsort()
            if len(order) != len(mine):
                raise ConfigError(f"The snapshot in {str(self.folder)!r} lacks {len(mine) - len(order)} tokens; read the document anew.")
            for layer in range(cache.num_layers):
                found = (
                    torch.cat([file.get_tensor(f"{name}.{layer}")[at] for file, (_, at) in zip(files, places, strict=True)])[order]
                    for name in ("keys", "values")
                )
                k, v = (x[None].to(self.device) for x in found)
                cache.append(layer, k, v)

    def _load_carries(self, cache: KVCache) -> None:
        """What the keys of this rank, all of which were appended, carry."""
        from safetensors.torch import load_file

        files = [load_file(self.folder / part.file) for part in self.carries]
        everyone = {name: torch.cat([file[name] for file in files]) for name in files[0]}
        into, held = _places(everyone.pop("indices"), cache.layout.indices(self.ring.rank))
        for name, carry in everyone.items():
            cache.carry_on(int(name.rpartition(".")[2]), carry[held][into.argsort()][None].to(self.device))

    def _write_carries(self, cache: KVCache, end: int) -> dict[str, Any] | None:
        """This rank's file of what its keys carry, as a Part's fields; None where no layer's do."""
        from safetensors.torch import save_file

        if not cache.carried:
            return None
        tensors = {f"carry.{layer}": cache.carry(layer)[0].cpu() for layer in cache.carried}
        path = self.folder / f"carries-{end}-rank{self.ring.rank}.safetensors"
        _put(path, lambda draft: save_file(tensors | {"indices": cache.layout.indices(self.ring.rank)}, draft))
        return asdict(Part(path.name, _digest_of(path), 0, end))

    def _write(self, cache: KVCache, end: int) -> Part:
        """This rank's part: what it owns of tokens read..end-1; those read before come first in its cache."""
        from safetensors.torch import save_file

        indices = cache.layout.indices(self.ring.rank)
        spans = ((int((indices < self.read).sum()), len(indices)),)
        tensors = {"indices": indices[spans[0][0] :]}
        for layer in range(cache.num_layers):
            for name, x in zip(("keys", "values"), cache.read(layer, spans), strict=True):
                tensors[f"{name}.{layer}"] = x[0].contiguous().cpu()
        path = self.folder / f"part-{self.read}-{end}-rank{self.ring.rank}.safetensors"
        _put(path, lambda draft: save_file(tensors, draft))
        return Part(path.name, _digest_of(path), self.read, end)

    def _list(self, outdated: Sequence[Part]) -> None:
        """Write snapshot.json: from now on this is the snapshot, and outdated files go."""
        files = {name: [asdict(part) for part in parts] for name, parts in (("parts", self.parts), ("carries", self.carries))}
        listed = {"format": FORMAT, "source": self.source, "read": self.read, **files}
        text = json.dumps(listed | {"sha256": _digest(listed)}, indent=1)
        _put(self.folder / NAME, lambda draft: draft.write_text(text, encoding="utf-8"))
        for part in outdated:
            (self.folder / part.file).unlink(missing_ok=True)

    def _verify(self) -> None:
        """Compare files with their SHA-256: each rank takes its share of them."""
        for part in [*self.parts, *self.carries][self.ring.rank :: self.ring.size]:
            if not (self.folder / part.file).is_file():
                raise ConfigError(
                    f"The snapshot in {str(self.folder)!r} lacks {part.file}; bring the file back, or read the document anew."
                )
            if _digest_of(self.folder / part.file) != part.sha256:
                raise _damaged(self.folder, part.file)

    def _together(self, act: Callable[[], Any], what: str) -> list[Any]:
        """Every rank's result, in rank order. Where one fails, all raise its sentence, instead of waiting for it."""
        from safetensors import SafetensorError

        try:
            mine = {"done": act()}
        except ConfigError as error:
            mine = {"refused": str(error)}
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            mine = {"refused": f"The snapshot in {str(self.folder)!r} cannot be {what}: {reason}. See to the folder, or name another one."}
        everyone = share(self.ring, mine, self.device, "what became of the snapshot")
        for one in everyone:
            if "refused" in one:
                raise ConfigError(one["refused"])
        return [one["done"] for one in everyone]


def source_of(config: Config, model: Any, prompt: list[int], length: int, storage: str) -> dict[str, Any]:
    """All that the keys of a prompt depend on, rounding left out: what two runs must share for one to go on with the other's.

    length: of the sequence for which positions are turned. The model counts by its configuration and the first numbers of every
    weight, so it may lie elsewhere.
    """
    if config.cache.evict.kind != "none":
        raise ConfigError(
            f"Snapshots hold every key that was read, but cache.evict.kind is {config.cache.evict.kind}; "
            "leave --save and --resume out, or set cache.evict.kind to none."
        )
    of_model = hashlib.sha256((checkpoint(config.model.path) / "config.json").read_bytes())
    for name, weight in model.named_parameters():
        of_model.update(f"{name} {tuple(weight.shape)} {weight.detach().flatten()[:64].tolist()}".encode())
    of_length = config.positions.kind in ("dynamic_ntk", "longrope")  # these turn by the length of prompt and answer
    return {
        "model": of_model.hexdigest(),
        "prompt": _digest(prompt),
        "model.dtype": str(model.dtype).removeprefix("torch."),
        "layout.kind": config.layout.kind,
        "layout.chunk": config.layout.chunk,
        "attention.positions": asdict(config.positions),
        "a length in tokens of": length if of_length else None,
        **_attention(config, model),
        "cache.storage": storage,
    }


def _attention(config: Config, model: Any) -> dict[str, Any]:
    """What every layer attends to. A list of blocks counts by what each layer is asked for, however it is written."""
    asked = config.attention
    whole = asked if isinstance(asked, AttentionConfig) else AttentionConfig()
    return {
        "attention.window": whole.window,
        "attention.sinks": whole.sinks,
        "attention.branches": asdict(whole.branches) if whole.branches.kind != "none" else None,
        "attention.select": asdict(whole.select),
        "attention.carry": asdict(whole.carry) if whole.carry.kind != "none" else None,
        "attention by layer": _digest(_by_layer(asked, model)) if isinstance(asked, tuple) else None,
    }


def _by_layer(asked: tuple[LayersConfig, ...], model: Any) -> list[Any]:
    layers = by_layer(asked, int(model.config.num_hidden_layers), int(model.config.num_attention_heads))
    return [[(heads, asdict(block)) for heads, block in layers[layer]] for layer in sorted(layers)]


def _differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What the snapshot was made from, where this run differs."""
    names = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    if "model.dtype" in names and "model" in names:
        names.remove("model")  # its weights are rounded otherwise, so nothing can be said of them
    return [_DIGESTS.get(name) or f"{name} {_shown(saved.get(name))} (here it is {_shown(now.get(name))})" for name in names]


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _listed(folder: Path) -> dict[str, Any]:
    """What snapshot.json holds."""
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"There is no snapshot in {str(folder)!r} ({NAME}: {error.strerror or error}); make one with --save.") from error
    except ValueError as error:
        raise _damaged(folder, NAME) from error
    if not isinstance(found, dict) or found.pop("sha256", None) != _digest(found):
        raise _damaged(folder, NAME)
    if found["format"] != FORMAT:
        raise ConfigError(f"The snapshot in {str(folder)!r} is of format {found['format']}; this ringctx reads {FORMAT}. Read anew.")
    return found


def _places(held: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """For the indices that are in both: their places in `wanted`, and in `held`."""
    order = held.argsort()
    into = torch.isin(wanted, held).nonzero()[:, 0]
    return into, order[torch.searchsorted(held[order], wanted[into])]


def _damaged(folder: Path, name: str) -> ConfigError:
    return ConfigError(
        f"{name} of the snapshot in {str(folder)!r} is damaged: its SHA-256 is not that of what was saved. "
        "Bring back an undamaged copy of it, or read the document anew."
    )


def _digest(value: Any) -> str:
    """Of anything JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _put(path: Path, write: Callable[[Path], object]) -> None:
    """Write the file under another name, and give it its own when it is on disk: nobody ever sees half of it."""
    draft = path.with_name(f"{path.name}.draft")
    write(draft)
    _sync(draft)
    draft.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
