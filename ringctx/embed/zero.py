"""Zero: a ZeRO engine's weights and moments, whole, and set again on any number of ranks at any stage.

DeepSpeed's own checkpoints are cut by rank. These are by name, as those of `ringctx train` without it.
Knows DeepSpeed's optimizers. Knows nothing of rings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ringctx.errors import Unsupported
from ringctx.training.step import MOMENTS, State


def state_of(engine: Any) -> State:
    """Weights (fp32 where there are such masters) and AdamW's moments of a DeepSpeed engine, on every rank. All ranks call it together.

    Raises Unsupported where its optimizer keeps other numbers.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    inner, stepped = _inner(engine), _steps(engine)
    if stepped:
        _link(engine)
    weights, moments = dict[str, Tensor](), dict[str, dict[str, Tensor]]()
    for name, p in engine.module.named_parameters():
        if inner is engine.optimizer or not p.requires_grad:
            weights[name] = _gathered(p)
            if p in inner.state:
                moments[name] = {key: inner.state[p][key] for key in MOMENTS}
            continue
        weights[name] = safe_get_full_fp32_param(p).view(_shape(p)).clone()
        if stepped:
            found = {key: safe_get_full_optimizer_state(p, key) for key in MOMENTS[1:]}
            moments[name] = {key: x.view(_shape(p)).clone() for key, x in found.items()} | {"step": torch.tensor(float(stepped))}
    return State(weights, moments)


def resume(engine: Any, state: State) -> None:
    """Give an engine that was just made, over a model that has its weights already, the fp32 weights and the moments of a state."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    inner, moments = _inner(engine), state.moments
    params = {name: p for name, p in engine.module.named_parameters() if name in moments}
    if not params:
        return
    if inner is engine.optimizer:
        for name, p in params.items():
            inner.state[p] = {key: moments[name][key].to(p.device if key != "step" else "cpu").clone() for key in MOMENTS}
        return
    step = next(iter(moments.values()))["step"]
    for flat in _flats(engine.optimizer):
        inner.state[flat] = {"step": step.clone(), "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
    _link(engine)
    for name, p in params.items():
        _set_master(p, state.weights[name])
        for key in MOMENTS[1:]:
            if hasattr(p, "ds_id"):
                safe_set_local_optimizer_state(p, _part(moments[name][key], p), key)
            else:
                safe_set_full_optimizer_state(p, moments[name][key].to(p.device), key)


def _set_master(p: Any, weights: Tensor) -> None:
    """In half precision the engine rounded the model's weights before it copied them."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if hasattr(p, "ds_id"):
        safe_set_local_fp32_param(p, _part(weights, p))
    else:
        safe_set_full_fp32_param(p, weights.to(p.device))


def _inner(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that steps: DeepSpeed's own wraps it at every stage but 0 in fp32."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if not isinstance(inner, torch.optim.Optimizer) or "betas" not in inner.defaults:
        raise Unsupported(f"The engine steps with {type(inner).__name__}, but what is saved are Adam's moments; use Adam or AdamW.")
    return inner


def _link(engine: Any) -> None:
    """Let parameters below stage 3 know where their moments lie. DeepSpeed does it in the first step of the first group alone."""
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _flats(optimizer: Any) -> list[Tensor]:
    """This rank's parts of the fp32 weights, as the optimizer that steps has them."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    raise Unsupported(f"What DeepSpeed's {type(optimizer).__name__} holds is not known here; save with engine.save_checkpoint instead.")


def _steps(engine: Any) -> int:
    """Steps that the moments have seen."""
    found = [int(state["step"]) for state in _inner(engine).state.values() if "step" in state]
    return max(found, default=0)


def _gathered(p: Tensor) -> Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters([p]) if hasattr(p, "ds_id") else torch.no_grad():
        return p.detach().clone()


def _shape(p: Tensor) -> torch.Size:
    shape: torch.Size = getattr(p, "ds_shape", p.shape)
    return shape


def _part(whole: Tensor, p: Any) -> Tensor:
    """This rank's part of a tensor at stage 3, which is filled up to equal parts."""
    import torch.distributed as dist

    size, rank = p.ds_tensor.ds_numel, dist.get_rank(p.ds_process_group)
    flat = whole.flatten().to(p.device)
    return torch.nn.functional.pad(flat, (0, max(0, size * (rank + 1) - len(flat))))[size * rank : size * (rank + 1)]
