"""Which kernel computes a tile: the first that does not refuse, with everybody's reasons at hand.

Knows kernels by name. Knows nothing of tensors' values.
"""

from __future__ import annotations

import difflib
import logging
from functools import lru_cache

from ringctx.errors import ConfigError, Unsupported
from ringctx.kernels.base import Call, Kernel
from ringctx.kernels.flash import Flash
from ringctx.kernels.native import Native
from ringctx.kernels.reference import Reference
from ringctx.kernels.sdpa import Sdpa
from ringctx.kernels.triton_tiles import Triton

REGISTRY: tuple[Kernel, ...] = (Flash(), Native(), Sdpa(), Triton(), Reference())
"""Kernels that "auto" tries, best first."""

BY_NAME_ONLY: tuple[Kernel, ...] = (Sdpa("precise", precise=True),)
"""Kernels that must be asked for."""

log = logging.getLogger("ringctx.kernels")


@lru_cache(maxsize=1024)
def choose(call: Call, name: str = "auto") -> Kernel:
    """The best kernel that computes this call exactly, or the one of that name.

    Raises ConfigError for an unknown name and Unsupported, with each refusal, if nobody takes the call.
    """
    refusals: list[str] = []
    for kernel in REGISTRY if name == "auto" else (_named(name),):
        reason = _why_not(kernel, call)
        if reason is None:
            log.info("%s computes %s%s", kernel.name, call, "".join(f"; not {line}" for line in refusals))
            return kernel
        refusals.append(f"{kernel.name}: {reason}")
    raise Unsupported("\n  ".join([f"no kernel for {call}", *refusals, _advice(call, name)]))


def _why_not(kernel: Kernel, call: Call) -> str | None:
    """Heads of width 0, whose logits are scores alone, are for the one kernel that multiplies nothing by nothing."""
    if not min(call.d, call.e) and kernel.name != "reference":
        return "multiplies heads of width 1 or more"
    return kernel.why_not(call)


def names() -> tuple[str, ...]:
    """Everything `choose` knows by name."""
    return ("auto", *(kernel.name for kernel in REGISTRY + BY_NAME_ONLY))


def _named(name: str) -> Kernel:
    for kernel in REGISTRY + BY_NAME_ONLY:
        if kernel.name == name:
            return kernel
    near = difflib.get_close_matches(str(name), names(), n=1)
    hint = f"Did you mean {near[0]!r}?" if near else "Leave it at 'auto'."
    raise ConfigError(f"There is no kernel {name!r}; there are {', '.join(names())}. {hint}")


def _advice(call: Call, name: str) -> str:
    if name == "auto":
        return "Cast the tensors to float32 or bfloat16."
    takers = [kernel for kernel in REGISTRY if _why_not(kernel, call) is None]
    if not takers:
        return "Cast the tensors to float32 or bfloat16."
    slowly = " to run it slowly" if takers[0].name == "reference" else ""
    return f'Use kernel="{takers[0].name}"{slowly}, or kernel="auto".'
