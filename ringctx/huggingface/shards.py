"""Shards: a model whose weights are spread over the ranks of a row, by transformers' own tensor-parallel plan.

    one DeviceMesh of ring x tp, 2 x 2:        rank 0: tokens of share 0, heads of part 0     rank 1: the same tokens, heads of part 1
                                               rank 2: tokens of share 1, heads of part 0     rank 3: the same tokens, heads of part 1

A row holds one share of the tokens and sums hidden states; a column is a ring, whose attention has h / tp heads.
Knows transformers' loading and its mesh. Knows nothing of layouts or caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import get_kv_heads_per_rank

from ringctx.core.ring import Ring
from ringctx.errors import ConfigError, Unsupported


@dataclass
class _RowsOfReplicas(DistributedConfig):
    """Transformers' mesh of replicas x tp, where a replica is a row: its weights are read, never synchronised."""

    @property
    def dp_size(self) -> int:
        """Ranks among which weights are gathered and gradients reduced by FSDP: none."""
        return self.fsdp_size or 1


def load(folder: Path, world: Ring, parts: int, *, dtype: torch.dtype, device: torch.device) -> tuple[Any, Ring]:
    """The model with 1/parts of every split weight, read from safetensors as such, and the ring of this rank's column.

    parts 1: the whole model, and the world as its ring. All ranks of the world call it together. The column's bytes are
    counted in the world's traffic; the sums within a row are torch's own collectives, and are not.
    Raises ConfigError when `parts` does not divide the ranks, Unsupported when the model has no plan, its heads do not
    divide, or its ranks would compute elsewhere than on `device`.
    """
    if parts == 1:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).to(device).eval(), world
    check(AutoConfig.from_pretrained(folder, local_files_only=True), world.size, parts)
    accelerator = torch.accelerator.current_accelerator()
    if (accelerator.type if accelerator else "cpu") != device.type:
        raise Unsupported(
            f"Tensor parallel puts a model on the machine's {accelerator}, but the ranks compute on {device.type}; "
            "use as many ranks as there are GPUs, or hide them with CUDA_VISIBLE_DEVICES=."
        )
    rows = _RowsOfReplicas(tp_size=parts, dp_replicate_size=world.size // parts)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, distributed_config=rows)
    mesh = model._mesh_manager.get_mesh(("dp_replicate", "tp"))
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=world.timeout), mesh.get_group("tp"))
    ring = Ring.from_mesh(mesh, "dp_replicate", timeout=world.timeout, strict=world.strict)
    ring.traffic = world.traffic
    return model.eval(), ring


def check(config: Any, num_ranks: int, parts: int) -> None:
    """Whether a model of this configuration can be spread so. Raises ConfigError or Unsupported, saying what can."""
    if num_ranks % parts:
        raise ConfigError(
            f"model.tensor_parallel is {parts}, but there {'is 1 rank' if num_ranks == 1 else f'are {num_ranks} ranks'}; "
            f"ranks are ring x tensor_parallel, so start a multiple of {parts} (--ranks)."
        )
    plan = config.base_model_tp_plan
    if not plan:
        raise Unsupported(
            f"transformers has no tensor-parallel plan for models of type {config.model_type!r}; set model.tensor_parallel to 1."
        )
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if any(get_kv_heads_per_rank(plan, count, parts) is None for count in (heads, groups)):
        fit = ", ".join(str(n) for n in range(1, groups + 1) if not heads % n and not groups % n)
        raise Unsupported(
            f"model.tensor_parallel is {parts}, but the model has {heads} query heads and {groups} key heads, "
            f"and each rank of a row holds equally many; possible: {fit}."
        )


def parts_of(model: nn.Module) -> int:
    """Over how many ranks the model's weights are spread; 1 for a whole model."""
    return int(getattr(model, "tp_size", None) or 1)


def key_heads_of(model: Any) -> int:
    """Key heads of this rank. Some plans split projections but give every rank all heads."""
    heads = get_kv_heads_per_rank(model.tp_plan or {}, model.config.num_key_value_heads, parts_of(model))
    assert isinstance(heads, int)
    return heads
