"""Activation checkpointing that computes layers again, but sends nothing again: what attention over the ring gave is kept.

Kept of each layer: its input, and attention's out (b s h d) and lse (b s h). Knows the model's own checkpointing.
Source: selective activation checkpointing, torch.utils.checkpoint; the choice of what is kept is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from ringctx.device import return_freed_memory
from ringctx.errors import Unsupported
from ringctx.huggingface import Context


def recompute(model: Any, context: Context, *, offload: bool = False) -> None:
    """Compute the model's layers again in backward, all but attention over the ring.

    Where the tokens live is remembered with each layer, so another batch may have begun when the backward comes.
    The process's memory allocator is told to give large blocks back: see `ringctx.device.return_freed_memory`.
    offload: keep the layers' inputs in the host's pinned memory; what attention gave stays on the GPU.
    Raises Unsupported for offload on a CPU, or where transformers cannot.
    """
    if offload and next(model.parameters()).device.type == "cpu":
        raise Unsupported("Offload moves what layers keep from a GPU to its host, and this model is on a CPU; leave it out.")
    return_freed_memory()
    enable(model, context, offload)


def enable(model: Any, context: Context, offload: bool) -> None:
    """Switch on the model's own checkpointing, with contexts that keep attention."""
    asked, kind = {"use_reentrant": False, "context_fn": contexts_of(context)}, type(model)
    if hasattr(kind, "activation_checkpointing_enable"):
        kind.activation_checkpointing_enable(model, asked, offload=offload)
    elif offload:
        raise Unsupported("This version of transformers cannot offload checkpoints; install 5.23 or later, or leave offload out.")
    else:
        kind.gradient_checkpointing_enable(model, asked)


def take_over(model: Any, context: Context) -> None:
    """Let whoever switches the model's checkpointing on by its own methods, as Trainer and PEFT do, get `recompute`."""

    def switch_on(asked: Mapping[str, Any] | None = None, *, offload: bool = False, **named: Any) -> None:
        of_theirs = set(asked or next(iter(named.values()), None) or ()) - {"use_reentrant"}
        if of_theirs:
            raise Unsupported(f"Layers are computed again as ringctx does; leave {', '.join(sorted(of_theirs))} out of the arguments.")
        recompute(model, context, offload=offload)

    newest = "activation_checkpointing_enable"  # its older name calls it
    setattr(model, newest if hasattr(model, newest) else "gradient_checkpointing_enable", switch_on)


def contexts_of(context: Context) -> Any:
    """What torch.utils.checkpoint asks for: contexts of a forward and of its recomputation."""

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        layout, documents = context.layout, context.documents
        saves, again = create_selective_checkpoint_contexts([torch.ops.ringctx.attention.default])

        @contextmanager
        def recomputing() -> Iterator[None]:
            with ExitStack() as stack:
                stack.enter_context(context.running(layout, documents=documents))
                stack.enter_context(again)
                yield

        return saves, recomputing()

    return contexts
