"""Where a rank computes and in which numbers, and how much memory it took."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from contextlib import suppress

import torch

from ringctx.config import ModelConfig
from ringctx.errors import ConfigError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""What mallopt(3) calls them in malloc.h."""
MAPPED_FROM, MOST_FREED = 32 << 20, (2 << 30) - 1
"""Bytes: the largest that glibc takes for each."""
RETURNED_FROM = 4 << 20
"""Bytes of a block that is worth its page faults."""


def device_of(config: ModelConfig) -> torch.device:
    """This rank's device. Raises ConfigError when a GPU is asked for and there are not enough."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "cpu":
        if num_gpus >= ranks_here > 1:
            raise ConfigError("model.device is 'cpu', but the ranks have GPUs and talk over NCCL; hide them with CUDA_VISIBLE_DEVICES=.")
        return torch.device("cpu")
    if num_gpus >= ranks_here:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if config.device == "cuda":
        raise ConfigError(f"model.device is 'cuda', but {ranks_here} ranks here share {num_gpus} GPUs; use fewer ranks, or device: auto.")
    return torch.device("cpu")


def dtype_of(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype asked for; auto is bfloat16 where the hardware multiplies it natively, else float32.

    A CPU without AMX or AVX512-BF16 multiplies bfloat16 hundreds of times slower than float32.
    """
    if config.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.dtype)
        return dtype
    native = device.type == "cuda" or has_native_bfloat16()
    return torch.bfloat16 if native else torch.float32


def has_native_bfloat16() -> bool:
    """True when this CPU has instructions for bfloat16 products."""
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe() for probe in probes if probe is not None)


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep blocks of megabytes that are freed, up to 2 GiB, for the next ones; without glibc, nothing.

    Activations are such blocks. By default many of them are fetched from the system anew and cleared page by page: up to 6 times as
    many page faults, and up to 8 % of the time of reading a text on one thread.
    """
    _tell_malloc((M_MMAP_THRESHOLD, MAPPED_FROM), (M_TRIM_THRESHOLD, MOST_FREED))


def return_freed_memory() -> None:
    """Tell glibc's malloc to give blocks of 4 MiB or more back to the system when they are freed; without glibc, nothing.

    By default it keeps most of them, in between those that live from a forward to its backward: measured, half of a rank's memory
    while layers are computed again. Costs up to 8 % of a step's time in page faults.
    """
    _tell_malloc((M_MMAP_THRESHOLD, RETURNED_FROM))


def trim_freed_memory() -> None:
    """Have glibc's malloc give back at once what lies freed among blocks that live; without glibc, nothing.

    What a cache keeps of each layer splits the room of that layer's activations, and the next layer's no longer fit there: measured,
    14 to 22 MB a layer of 8,192 tokens, three times what is alive after 30 layers. What was given back costs a page fault anew.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _tell_malloc(*settings: tuple[int, int]) -> None:
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in settings:
            mallopt(name, value)


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak so far: the process's on a CPU, the allocator's on a GPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def held_memory(device: torch.device) -> int:
    """Bytes now: the process's on a CPU (its peak where the system does not tell), the allocator's on a GPU."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    try:
        with open("/proc/self/statm") as told:
            return int(told.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_memory(device)
