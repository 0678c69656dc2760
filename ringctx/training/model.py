"""The model that is trained: a checkpoint, or a Llama made anew; wrapped, so that it attends as the configuration asks."""

from __future__ import annotations

from typing import Any

import torch

from ringctx.asked.attention import encoding_of
from ringctx.asked.layers import layers_of
from ringctx.config import Config
from ringctx.config_training import ScratchConfig
from ringctx.core.ring import Ring
from ringctx.device import device_of, dtype_of
from ringctx.errors import ConfigError
from ringctx.huggingface import trained_of, turn
from ringctx.huggingface.weights import checkpoint
from ringctx.training.job import Job
from ringctx.training.recompute import recompute


def check(config: Config) -> None:
    """Raise ConfigError for what cannot be trained."""
    if config.model.tensor_parallel > 1:
        raise ConfigError("`ringctx train` holds whole weights on each rank; set model.tensor_parallel to 1.")
    if config.training.memory_loss and not config.carries:
        raise ConfigError("training.memory_loss is what keys cost that a carry has not forgotten; set attention.carry.kind to selective.")


def job_of(config: Config, ring: Ring, vocabulary: int | None) -> Job:
    """The model on the ring, the same weights on every rank. vocabulary: tokens of the data, None where the model has its own."""
    check(config)
    device = device_of(config.model)
    dtype = torch.float32 if config.model.dtype == "auto" else dtype_of(config.model, device)
    if config.training.scratch.layers:
        assert vocabulary is not None
        model = llama(config.training.scratch, vocabulary, config.training.context, config.training.seed)
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(checkpoint(config.model.path), dtype=dtype, local_files_only=True)
    model = model.to(device=device, dtype=dtype)
    asked, training = layers_of(config.attention, model.config), config.training
    ways = {"transport": config.ring.transport, "kernel": config.ring.kernel, "layout": config.layout.kind}
    known = trained_of(model) if config.positions.kind != "none" else None
    job = Job.on(ring, model, asked, tile=training.tile or None, **ways)
    if known is not None:
        turn(model, encoding_of(config.positions, known, training.context))
    if training.recompute:
        recompute(model, job.context, offload=training.offload)
    return job


def llama(asked: ScratchConfig, vocabulary: int, context: int, seed: int, width: int | None = None) -> Any:
    """Random weights, in torch's default dtype. width: of a head, by default the hidden width over the heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=asked.hidden, intermediate_size=asked.intermediate, num_hidden_layers=asked.layers,
        num_attention_heads=asked.heads, num_key_value_heads=asked.key_heads, max_position_embeddings=context, tie_word_embeddings=True,
        head_dim=width, bos_token_id=None, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
