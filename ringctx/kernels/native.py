"""ringctx's own kernel for CPUs with AVX-512: tiles in float32 or bfloat16, forward and backward, compiled on first use from native.cpp.

Knows a compiler, a file in the user's cache and the addresses of tensors. Knows nothing of ranks.
Letters: b batch, q and k the tile's queries and keys, h query heads, g key/value heads, d key width, e value width.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ringctx.kernels.base import Call, Tile, TileScores
from ringctx.kernels.sdpa import Sdpa, additive_mask
from ringctx.kernels.tricks import is_empty, no_gradient, nothing_seen, require_square, rows_of_lse, unit_stride

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = "-O3 -std=c++20 -fopenmp -shared -fPIC -w -fno-strict-aliasing -mavx512f -mavx512bw -mavx512vl -mavx512dq".split()
EDGE, WIDEST, SQUARE = 32, 256, 4
"""Widths are multiples of the first, up to the second; the third is the edge, in blocks, of what native.cpp looks up at once."""
UP_TO, FROM = 64, 192
"""As in native.cpp."""

log = logging.getLogger("ringctx.kernels")


class Native:
    """Tiles in bfloat16 or float32, any mask or bias as one tensor to add; out, lse and gradients in fp32. See Kernel for the shapes.

    tiles: if given, nothing else of the rectangle is seen.
    Fewer than EDGE queries, as while decoding, go to aten's kernel, which packs nothing.
    """

    name = "native"
    edge = EDGE

    def __init__(self) -> None:
        self._few = Sdpa()

    def why_not(self, call: Call) -> str | None:
        if call.device != "cpu":
            return "computes on CPUs only"
        if call.dtype not in (torch.bfloat16, torch.float32):
            return "computes bfloat16 and float32 only"
        for name, what in (("elementwise", "elementwise scores"), ("dropout", "dropout"), ("bias_grad", "gradients of a bias")):
            if getattr(call, name):
                return f"knows no {what}"
        if any(width % EDGE or width > WIDEST for width in (call.d, call.e)):
            return f"takes widths that are multiples of {EDGE} up to {WIDEST}"
        if call.dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
            return "needs a CPU with AVX512-BF16 for bfloat16"
        if not torch.cpu._is_avx512_supported():
            return "needs a CPU with AVX-512"
        return library(call.dtype)[1]

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores, tiles: tuple[Tile, ...] | None = None) -> tuple[Tensor, Tensor]:
        require_square(q, k, scores)
        if is_empty(q, k, v):
            return nothing_seen(q, v)
        if q.shape[1] < EDGE:
            return self._few.forward(q, k, v, scores)
        given, bias, grid = [unit_stride(x) for x in (q, k, v)], _bias(q, k, scores), _grid(q, k, tiles)
        out, lse = (q.new_empty(*q.shape[:3], *tail, dtype=torch.float32) for tail in ((v.shape[3],), ()))
        sizes = _sizes(q, k, v, scores, bias)
        _call(q, "ringctx_forward", *given, bias, grid, _strides(*given, bias), sizes, scores.scale, torch.get_num_threads(), out, lse)
        return out, lse

    @torch.no_grad()
    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: TileScores, dlse: Tensor | None = None,
        tiles: tuple[Tile, ...] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        require_square(q, k, scores)
        if is_empty(q, k, v):
            return no_gradient(q, k, v)
        if q.shape[1] < EDGE:
            return self._few.backward(dout, q, k, v, out, lse, scores, dlse)
        given, bias, grid = [unit_stride(x) for x in (q, k, v)], _bias(q, k, scores), _grid(q, k, tiles)
        dout, out = (unit_stride(x.to(q.dtype)) for x in (dout, out))
        grads = [torch.empty(x.shape, dtype=torch.float32) for x in (q, k, v)]
        rows = rows_of_lse(lse).float().contiguous()
        _call(
            *(q, "ringctx_backward", *given, bias, grid, dout, out, _strides(*given, bias, dout, out), rows),
            None if dlse is None else dlse.float().contiguous(),
            *(_sizes(q, k, v, scores, bias), scores.scale, torch.get_num_threads(), *grads),
        )
        dq, dk, dv = grads
        return dq, dk, dv


def _call(like: Tensor, name: str, *given: Any) -> None:
    found = library(like.dtype)[0]
    assert found is not None, "why_not was not asked"
    getattr(found, name)(*(_as_c(x) for x in given))


def _as_c(x: Any) -> Any:
    """A tensor's address, or null; a number as C has it; what is of C already, as it is."""
    if x is None or isinstance(x, Tensor):
        return ctypes.c_void_p(None if x is None else x.data_ptr())
    return ctypes.c_float(x) if isinstance(x, float) else ctypes.c_int(x) if isinstance(x, int) else x


def _bias(q: Tensor, k: Tensor, scores: TileScores) -> Tensor | None:
    """Mask, bias and, beside them, causality as one tensor to add (b q h k), whose equal batches and heads lie in memory once; or None."""
    found = additive_mask(q, k, scores)
    return None if found is None else unit_stride(found.expand(q.shape[0], q.shape[2], -1, -1)).transpose(1, 2)


def _grid(q: Tensor, k: Tensor, tiles: tuple[Tile, ...] | None) -> Tensor | None:
    return None if tiles is None else _marked(tiles, -(-q.shape[1] // EDGE), -(-k.shape[1] // EDGE))


@lru_cache(maxsize=64)
def _marked(tiles: tuple[Tile, ...], num_queries: int, num_keys: int) -> Tensor:
    """Of each block of queries and of keys, what is seen, as native.cpp has it; then of each SQUARE x SQUARE of them whether anything is.
    Kept, since a model's layers ask alike."""
    grid = torch.zeros(num_queries, num_keys, dtype=torch.uint8)
    for low, high, *borders in tiles:
        a, b, c, d = (-(-border // EDGE) for border in borders)
        apart = EDGE * torch.arange(c - b + 1, d - a)  # from a block's first query to its first key, which is all that counts
        grid[a:b, c:d] = _seen(apart, low, high).to(grid.dtype).unfold(0, d - c, 1).flip(0)
    squares = torch.nn.functional.pad(grid, (0, -num_keys % SQUARE, 0, -num_queries % SQUARE)) > 0
    squares = squares.unflatten(0, (-1, SQUARE)).unflatten(2, (-1, SQUARE)).any(3).any(1)
    return torch.cat([grid.flatten(), squares.flatten().to(grid.dtype)])


def _seen(apart: Tensor, low: int, high: int) -> Tensor:
    """What blocks so far apart see of a band: nothing, all, or what is on one side of one of its borders, which are not in one block."""
    some = (apart + EDGE > low) & (apart - EDGE < high)
    upper, lower = apart + EDGE - 1 > high, apart - EDGE + 1 < low
    return torch.where(upper, UP_TO + high - apart, torch.where(lower, FROM + low - apart, 1)) * some


def _strides(*tensors: Tensor | None) -> Any:
    numbers = [step for x in tensors for step in (x.stride()[:3] if x is not None else (0, 0, 0))]
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _sizes(q: Tensor, k: Tensor, v: Tensor, scores: TileScores, bias: Tensor | None) -> Any:
    b, s, h, d = q.shape
    return (ctypes.c_int64 * 8)(b, s, k.shape[1], h, k.shape[2], d, v.shape[3], int(scores.causal and bias is None))


@cache
def library(dtype: torch.dtype) -> tuple[ctypes.CDLL | None, str | None]:
    """The kernel for a dtype, or why there is none, in half a sentence. Compiled once for a user, a version of it, a kind of CPU."""
    amx = ["-mamx-tile", "-mamx-bf16"] if torch.cpu._is_amx_tile_supported() else []
    flags = [*FLAGS, *(["-DSINGLE"] if dtype == torch.float32 else ["-mavx512bf16", *amx])]
    compiler = shutil.which("c++") or shutil.which("g++")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ringctx"
    file = folder / f"native-{hashlib.sha256(SOURCE.read_bytes() + ' '.join(flags).encode()).hexdigest()[:16]}.so"
    if not file.is_file():
        if compiler is None:
            return None, "needs a C++ compiler to be made once (apt install g++)"
        problem = _compile([compiler, *flags], file)
        if problem:
            return None, problem
    try:
        found = ctypes.CDLL(str(file))
    except OSError as error:
        return None, f"cannot be loaded ({error})"
    return (found, None) if found.ringctx_permitted() else (None, "was not given AMX's registers by the operating system")


def _compile(command: list[str], file: Path) -> str | None:
    """Make the file, or say why not. Ranks that do so at once each make one, and the last stays."""
    log.info("Compiling ringctx's kernel for this CPU into %s; this takes a few seconds, once.", file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            made = Path(folder) / file.name
            done = subprocess.run([*command, str(SOURCE), "-o", str(made)], capture_output=True, text=True)
            if done.returncode:
                return f"was not compiled by {command[0]}: {(done.stderr.strip().splitlines() or ['no reason given'])[0]}"
            made.replace(file)
    except OSError as error:
        return f"cannot be kept in {file.parent} ({error.strerror})"
    return None
