"""Doctor: what this machine can run, and why not the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ringctx.device import has_native_bfloat16
from ringctx.huggingface import weights
from ringctx.kernels import REGISTRY
from ringctx.kernels.base import Call

PACKAGES = {
    "transformers": "`ringctx generate` and wrapped models; pip install 'ringctx[huggingface]'",
    "gguf": "fetching SmolLM2 by name; pip install 'ringctx[huggingface]'",
    "accelerate": "fetching SmolLM2 by name; pip install 'ringctx[huggingface]'",
    "matplotlib": "pictures of `ringctx eval --out`; pip install 'ringctx[plot]'",
    "deepspeed": "training under DeepSpeed; pip install 'ringctx[deepspeed]'",
    "flash_attn": "the flash kernel on GPUs; pip install 'ringctx[flash]'",
}
"""Packages that ringctx can do without, and what they are for."""


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, whether it is there, and what follows."""

    what: str
    good: bool
    says: str


def examine() -> list[Finding]:
    """Everything that can be known without starting ranks."""
    return [*_machine(), *_packages(), *_kernels(), *_models()]


def as_json(findings: list[Finding]) -> list[dict[str, Any]]:
    """The findings for `--json`."""
    return [asdict(finding) for finding in findings]


def as_text(findings: list[Finding]) -> str:
    """The findings for people: + for what is there, - for what is not."""
    width = max(len(finding.what) for finding in findings)
    return "\n".join(f"{'+' if finding.good else '-'} {finding.what:<{width}}  {finding.says}" for finding in findings)


def _machine() -> list[Finding]:
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    native = has_native_bfloat16()
    return [
        Finding("torch", True, torch.__version__),
        Finding("cores", True, f"{cores}; more CPU ranks than that share cores"),
        Finding("memory", memory > 4, f"{memory:.0f} GB"),
        Finding("GPUs", bool(gpus), ", ".join(gpus) or "none; ranks run on CPU cores and talk over gloo"),
        Finding("bfloat16 on CPU", native, "native" if native else "emulated, hundreds of times slower; dtype auto takes float32"),
        Finding(
            "gloo", torch.distributed.is_gloo_available(), "CPU ranks" if torch.distributed.is_gloo_available() else "this torch lacks it"
        ),
        Finding(
            "NCCL", torch.distributed.is_nccl_available(), "GPU ranks" if torch.distributed.is_nccl_available() else "this torch lacks it"
        ),
    ]


def _packages() -> list[Finding]:
    return [
        Finding(name, True, importlib.metadata.version(name)) if importlib.util.find_spec(name) else Finding(name, False, f"missing: {use}")
        for name, use in PACKAGES.items()
    ]


def _kernels() -> list[Finding]:
    """Each kernel's word on plain causal attention, forward and backward, on each device here."""
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    dtypes = {"cpu": torch.float32, "cuda": torch.bfloat16}
    calls = [Call(device, dtypes[device], h=8, g=2, d=64, e=64, causal=True, backward=True) for device in devices]
    found = []
    for kernel in REGISTRY:
        for call in calls:
            reason = kernel.why_not(call)
            found.append(Finding(f"kernel {kernel.name}, {call.device}", reason is None, reason or "computes causal attention"))
    return found


def _models() -> list[Finding]:
    return [
        Finding(
            f"model {name}", weights.is_ready(name), str(weights.cache_dir() / name) if weights.is_ready(name) else "fetched on first use"
        )
        for name in weights.NAMED
    ]
