"""Other libraries' causal attention over ranks, on this ring's process group, for `ringctx bench --peer`.

Each is called as its documentation says. Where one insists on flash-attn, which needs a GPU, and none is installed, torch's CPU kernel
stands in for it, in the signatures of flash-attn 2.8; torch's context parallelism, whose dispatcher refuses CPUs, is called one level below
it, with that same kernel. Nothing else of theirs is changed. Tensors (b s h d), the rank's share.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import math
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringctx.core.layout import Layout
from ringctx.errors import ConfigError
from ringctx.tools.bench.case import sdpa

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Peer:
    """package, module: to install and to import. layout: how it wants the sequence. make: its attention on a process group."""

    name: str
    package: str
    module: str
    layout: Callable[[int, int], Layout]
    make: Callable[[dist.ProcessGroup], Attend]


def peer(name: str) -> Peer:
    """Raises ConfigError for one that is unknown or not installed."""
    if name not in PEERS:
        raise ConfigError(f"There is no peer {name!r} to measure; there are {', '.join(PEERS)}.")
    found = PEERS[name]
    if importlib.util.find_spec(found.module) is None:
        raise ConfigError(f"{name} needs the package {found.package}, which is not installed: pip install {found.package}.")
    return found


# -- what stands in for flash-attn -----------------------------------------------------------------------------------------


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1,
    window_size_right: int = -1, softcap: float = 0.0, alibi_slopes: Tensor | None = None, return_softmax: bool = False,
) -> tuple[Tensor, Tensor, None, None]:  # fmt: skip
    out, lse = FLASH(*(x.transpose(1, 2) for x in (q, k, v)), dropout_p, causal, scale=softmax_scale)
    return out.transpose(1, 2), lse, None, None


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, dropout_p: float,
    softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False, rng_state: Tensor | None = None,
) -> None:  # fmt: skip
    tensors = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    grads = FLASH_BACKWARD(*tensors, softmax_lse, dropout_p, causal, scale=softmax_scale)
    for grad, found in zip((dq, dk, dv), grads, strict=True):
        grad.copy_(found.transpose(1, 2))


class _Local(torch.autograd.Function):
    """flash_attn_func."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        out, lse, *_ = _flash_forward(q, k, v, 0.0, scale, causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.facts = scale, causal
        return out

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        _flash_backward(slopes[0], q, k, v, out, lse, dq, dk, dv, 0.0, *ctx.facts)
        return dq, dk, dv, None, None


def _flash_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False, **_: Any
) -> Tensor:
    out: Tensor = _Local.apply(q, k, v, softmax_scale or q.shape[-1] ** -0.5, causal)
    return out


def _stand_in_for_flash_attn() -> None:
    if importlib.util.find_spec("flash_attn") is not None:
        return
    whole, interface = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.flash_attn_interface")
    spec = importlib.machinery.ModuleSpec("flash_attn", None)
    whole.__spec__, whole.__version__ = spec, "2.8.3"  # type: ignore[attr-defined]
    calls = {"_flash_attn_forward": _flash_forward, "_flash_attn_backward": _flash_backward, "flash_attn_func": _flash_func}
    for name, call in calls.items():
        setattr(interface, name, call)
        setattr(whole, name, call)
    for name in ("varlen_forward", "varlen_backward"):
        setattr(interface, f"_flash_attn_{name}", None)
    sys.modules |= {"flash_attn": whole, "flash_attn.flash_attn_interface": interface}


# -- the peers ---------------------------------------------------------------------------------------------------------------


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    return sdpa(q, k, v)


def _deepspeed(group: dist.ProcessGroup) -> Attend:
    import deepspeed
    from deepspeed.sequence.layer import DistributedAttention

    deepspeed.init_distributed(dist.get_backend(group), verbose=False)
    layer = DistributedAttention(_sdpa, group, scatter_idx=2, gather_idx=1)
    return lambda q, k, v: layer(q, k, v, 0)


def _yunchang_ulysses(group: dist.ProcessGroup) -> Attend:
    _stand_in_for_flash_attn()
    from yunchang import UlyssesAttention

    layer = UlyssesAttention(group)
    return lambda q, k, v: layer(q, k, v, causal=True, softmax_scale=q.shape[-1] ** -0.5)


def _yunchang_zigzag(group: dist.ProcessGroup) -> Attend:
    _stand_in_for_flash_attn()
    from yunchang.ring.zigzag_ring_flash_attn import zigzag_ring_flash_attn_func

    return lambda q, k, v: zigzag_ring_flash_attn_func(q, k, v, causal=True, group=group)


def _ring_flash_attn(group: dist.ProcessGroup) -> Attend:
    _stand_in_for_flash_attn()
    adapters = types.ModuleType("ring_flash_attn.adapters")  # it imports names that newer transformers do not have
    for name in ("substitute_hf_flash_attn", "update_ring_flash_attn_params"):
        setattr(adapters, name, None)
    sys.modules.setdefault("ring_flash_attn.adapters", adapters)
    from ring_flash_attn import zigzag_ring_flash_attn_func

    return lambda q, k, v: zigzag_ring_flash_attn_func(q, k, v, causal=True, group=group)


def _ringmaster(group: dist.ProcessGroup) -> Attend:
    from ringmaster.ring.p2p_attn import ring_p2p_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = ring_p2p_attention(*(x.transpose(1, 2) for x in (q, k, v)), group=group, causal=True, scaling=q.shape[-1] ** -0.5)
        return out

    return attend


def _torch(group: dist.ProcessGroup) -> Attend:
    from torch.distributed.tensor.experimental._context_parallel import _attention as cp

    class Ring(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> Tensor:
            views = [x.transpose(1, 2).contiguous() for x in tensors]
            q, k, v = views
            out, lse = cp._templated_ring_attention(group, 2, FLASH, q, k, v, True, dropout_p=0.0, scale=None)[:2]
            ctx.save_for_backward(*views, out, lse)
            return out.transpose(1, 2)

        @staticmethod
        def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, ...]:
            dout = slopes[0].transpose(1, 2).contiguous()
            q, k, v, out, lse = ctx.saved_tensors
            back = cp._templated_ring_attention_backward
            grads = back(group, 2, FLASH_BACKWARD, dout, "grad_out", q, k, v, out, lse, True, dropout_p=0.0, scale=None)
            return tuple(x.transpose(1, 2) for x in grads[:3])

    return lambda q, k, v: Ring.apply(q, k, v)


def _lucidrains(group: dist.ProcessGroup) -> Attend:
    from ring_attention_pytorch.ring_flash_attention import ring_flash_attn

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = ring_flash_attn(q, k, v, causal=True, bucket_size=math.gcd(512, q.shape[1]), ring_reduce_col=True)
        return out

    return attend


_ALL = (
    Peer("deepspeed_ulysses", "deepspeed", "deepspeed", Layout.contiguous, _deepspeed),
    Peer("yunchang_ulysses", "yunchang", "yunchang", Layout.contiguous, _yunchang_ulysses),
    Peer("yunchang_zigzag", "yunchang", "yunchang", Layout.zigzag, _yunchang_zigzag),
    Peer("ring_flash_attn_zigzag", "ring-flash-attn", "ring_flash_attn", Layout.zigzag, _ring_flash_attn),
    Peer("ringmaster_p2p", "axolotl-ringmaster", "ringmaster", Layout.contiguous, _ringmaster),
    Peer("torch_context_parallel", "torch", "torch", Layout.zigzag, _torch),
    Peer("ring_attention_pytorch", "ring-attention-pytorch", "ring_attention_pytorch", Layout.contiguous, _lucidrains),
)
PEERS: Mapping[str, Peer] = {one.name: one for one in _ALL}
"""By name."""
