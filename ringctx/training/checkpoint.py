"""Checkpoints: folders step-<n>, each whole or not there, of which the newest is kept.

    step-<n>/   a model and its tokenizer in Hugging Face's form, which `model.path` takes; optimizer.pt; progress.json

What is written is whole and by name, so any number of ranks goes on from it, with any engine.
Knows files. Rank 0 writes; all ranks see the same folder and read the same.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from ringctx.errors import ConfigError
from ringctx.huggingface.weights import save as save_model
from ringctx.training.step import MOMENTS, State

_NAME = re.compile(r"step-(\d+)")


def newest(out: Path) -> Path | None:
    """The newest whole checkpoint in the folder, or None."""
    found = [path for path in out.glob("step-*") if _NAME.fullmatch(path.name)]
    return max(found, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def save(out: Path, model: Any, state: State, tokenizer: Any, progress: dict[str, Any]) -> Path:
    """Write the folder of progress["steps"] under another name, give it its own, then remove the older ones."""
    path = out / f"step-{progress['steps']}"
    draft = out / f".{path.name}"
    shutil.rmtree(draft, ignore_errors=True)
    save_model(model, draft, state.weights)
    tokenizer.save_pretrained(draft)
    torch.save({name: {key: of[key] for key in MOMENTS} for name, of in state.moments.items()}, draft / "optimizer.pt")
    (draft / "progress.json").write_text(json.dumps(progress))
    for file in draft.iterdir():
        _sync(file)
    shutil.rmtree(path, ignore_errors=True)
    draft.replace(path)
    _sync(out)
    for old in out.glob("step-*"):
        if _NAME.fullmatch(old.name) and old != path:
            shutil.rmtree(old)
    return path


def resume(path: Path, made_from: dict[str, Any], otherwise: dict[str, Any]) -> tuple[State, dict[str, Any]]:
    """The state and the progress. Raises ConfigError where the run was another one.

    otherwise: what a run was made from that says nothing of a key, because that key is newer than the run.
    """
    from safetensors.torch import load_file

    progress: dict[str, Any] = json.loads((path / "progress.json").read_text())
    saved = _filled(progress["made_from"], otherwise)
    differences = [name for name in made_from if saved[name] != made_from[name]]
    if differences:
        raise ConfigError(
            f"{str(path.parent)!r} holds a run with other {', '.join(differences)}; set training.out to another folder, or remove this one."
        )
    return State(load_file(path / "model.safetensors"), torch.load(path / "optimizer.pt", weights_only=True)), progress


def _filled(saved: Any, otherwise: Any) -> Any:
    """What was saved, with the keys that it lacks; of a list, such as blocks of attention, each by the same."""
    if isinstance(saved, list) and isinstance(otherwise, dict):
        return [_filled(one, otherwise) for one in saved]
    if not (isinstance(saved, dict) and isinstance(otherwise, dict)):
        return saved
    return otherwise | {key: _filled(value, otherwise.get(key)) for key, value in saved.items()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
