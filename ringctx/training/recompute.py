"""Activation checkpointing that computes layers again, but sends nothing again: what attention over the ring gave is kept.

Kept of each layer: its input, and attention's out (b s h d) and lse (b s h). Knows the model's own checkpointing.
Source: selective activation checkpointing, torch.utils.checkpoint; the choice of what is kept is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from ringctx.device import return_freed_memory
from ringctx.huggingface import Context


def recompute(model: Any, context: Context) -> None:
    """Compute the model's layers again in backward, all but attention over the ring.

    Where the tokens live is remembered with each layer, so another batch may have begun when the backward comes.
    The process's memory allocator is told to give large blocks back: see `ringctx.device.return_freed_memory`.
    """
    return_freed_memory()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # its name before 5.23
    enable({"use_reentrant": False, "context_fn": contexts_of(context)})


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
