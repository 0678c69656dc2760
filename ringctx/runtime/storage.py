"""Storage: how one layer's keys or values are held: as written, rounded or quantised; in memory or in files.

Knows tokens and numbers. Knows nothing of layers, ranks or the model.
Source of int8 and int4: Liu et al. 2024 (KIVI, arXiv 2402.02750): asymmetric, round to nearest; keys a channel at a time
over a group of tokens, because their outliers sit in fixed channels, values a token at a time; the newest keys in full.
Letters: b batch, n tokens, g key heads, d head dim, G groups of tokens that share a step, w bytes that hold the codes of one d.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ringctx.errors import ConfigError, LayoutError, Unsupported

KINDS = ("model", "bf16", "int8", "int4")
"""From the exact to the small: as written, two bytes, one byte, half a byte a number."""
SEGMENT = 1024
"""Tokens a segment: a spilled tensor's file grows by whole ones, because each growth maps the file anew."""
BLOCK = 4096
"""Tokens that are quantised, or read back, at a time: what is computed on the way stays small."""
BITS = {"int8": 8, "int4": 4}
SCALES = 2 * torch.float32.itemsize
"""Bytes that a group's zero point and step take. They are fp32, and not bf16, which would save half of them: of a channel whose
keys lie near 16, bf16 knows the zero point to 1/16 only, so the step would have to grow by what the rounding moves."""


def open_store(kind: str, *, page: int, per_channel: bool, spill: Path | None = None) -> Store:
    """An empty store of this kind. per_channel: keys, whose channels share a step over a page; else values, step by token and head.

    spill: the folder where what is held lies in files instead of memory. Raises ConfigError for a kind or folder that is not there.
    """
    if kind not in KINDS:
        raise ConfigError(f"cache.storage is {kind!r}; possible are {', '.join(KINDS)}.")
    if kind in BITS:
        return Quantised(kind, page, per_channel, spill)
    return Plain(page, torch.bfloat16 if kind == "bf16" else None, spill)


@dataclass(frozen=True)
class Mark:
    """Where a store stood: how many tokens it held, and those of them that were not quantised yet."""

    count: int
    open: Tensor | None


class Store(ABC):
    """Tokens (b n g d) that are appended and read back; those written after a mark can be dropped again.

    Law: what is read depends on the tokens held alone, not on how they were split into writes nor on tokens dropped since.
    Reading gives the dtype and device that were written; in memory, and as written, it is a view, not to be written to.
    """

    count: int = 0
    _like: Tensor | None = None

    @property
    def is_written(self) -> bool:
        """True once something was appended, be it no token at all."""
        return self._like is not None

    @property
    def data(self) -> Tensor:
        """All tokens, (b n g d): for small caches."""
        return self.read(0, self.count)

    def write(self, x: Tensor, room: int) -> None:
        """Append x (b n g d); when memory must grow, grow for `room` tokens in all."""
        if self._like is None:
            self._like = x.new_empty(x.shape[0], 0, *x.shape[2:])
        have, got = ((t.shape[0], *t.shape[2:], t.dtype) for t in (self._like, x))
        if have != got:
            raise LayoutError(f"The cache holds (b g d) and dtype {have}, but was given {got}; use another cache for them.")
        self._append(x, room)
        self.count += x.shape[1]

    def read(self, begin: int, end: int) -> Tensor:
        """Tokens begin..end-1 in the order written, (b end-begin g d)."""
        like = self._written()
        if not 0 <= begin <= end <= self.count:
            raise LayoutError(
                f"Tokens {begin} to {end} were asked for, but the cache holds {self.count}; ask for 0 <= begin <= end <= that."
            )
        return self._read(begin, end, like)

    def select(self, positions: Tensor) -> Tensor:
        """The tokens at these places in the order written, (m) int64 -> (b m g d)."""
        like = self._written()
        if positions.dtype != torch.int64 or positions.ndim != 1:
            raise LayoutError(f"Positions are {positions.dtype} of {positions.ndim} dims; pass int64 of one dim.")
        if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < self.count:
            ends = f"{int(positions.min())} to {int(positions.max())}"
            raise LayoutError(f"Positions {ends} were asked for, but the cache holds {self.count} tokens; count from 0.")
        return self._select(positions.to(like.device), like)

    def mark(self) -> Mark:
        """Where it stands now, for `restore`."""
        return Mark(self.count, self._originals())

    def restore(self, mark: Mark) -> None:
        """Drop what was written after the mark. Raises LayoutError when the mark is of tokens that are dropped already."""
        if mark.count > self.count:
            raise LayoutError(f"The mark is of {mark.count} tokens, but the cache holds {self.count}; restore the newest marks first.")
        if self.is_written:
            self._restore(mark)
        self.count = mark.count

    def close(self) -> None:
        """Let go of memory and files; the store is of no more use."""
        self.count, self._like = 0, None
        for rows in self._rows():
            rows.close()

    @property
    def bytes(self) -> int:
        """Memory held, files left out."""
        return sum(rows.bytes for rows in self._rows() if rows.file is None)

    @property
    def mapped_bytes(self) -> int:
        """Length of the files. What the system keeps of them in memory it gives back when memory is short."""
        return sum(rows.bytes for rows in self._rows() if rows.file is not None)

    def _written(self) -> Tensor:
        """A tensor (b 0 g d) of the dtype and device that were written."""
        if self._like is None:
            raise LayoutError("This layer's cache was never written; run the prefill first.")
        return self._like

    @abstractmethod
    def _append(self, x: Tensor, room: int) -> None: ...

    @abstractmethod
    def _read(self, begin: int, end: int, like: Tensor) -> Tensor: ...

    @abstractmethod
    def _select(self, positions: Tensor, like: Tensor) -> Tensor: ...

    @abstractmethod
    def _restore(self, mark: Mark) -> None: ...

    @abstractmethod
    def _rows(self) -> tuple[Rows, ...]: ...

    def _originals(self) -> Tensor | None:
        """Tokens that are held as written until they can be quantised."""
        return None


class Plain(Store):
    """Tokens as written, or rounded to `dtype`."""

    def __init__(self, page: int, dtype: torch.dtype | None, spill: Path | None) -> None:
        self._tokens = Rows(page, dtype, spill)

    def _append(self, x: Tensor, room: int) -> None:
        self._tokens.write(x.transpose(0, 1), room)

    def _read(self, begin: int, end: int, like: Tensor) -> Tensor:
        return self._tokens.data[begin:end].transpose(0, 1).to(like)

    def _select(self, positions: Tensor, like: Tensor) -> Tensor:
        tokens = self._tokens.data
        return tokens[positions.to(tokens.device)].transpose(0, 1).to(like)

    def _restore(self, mark: Mark) -> None:
        self._tokens.count = mark.count

    def _rows(self) -> tuple[Rows, ...]:
        return (self._tokens,)


class Quantised(Store):
    """Tokens as codes of 8 or 4 bits, a zero point and a step: x' = zero + code * step, so |x - x'| <= step / 2.

    Keys (per_channel) share a step by channel over the tokens of a page, values by token and head over its channels. A page of
    keys is quantised when it is full; until then its tokens are kept as written, in memory.
    """

    def __init__(self, kind: str, page: int, per_channel: bool, spill: Path | None) -> None:
        self.kind, self.bits = kind, BITS[kind]
        self.group, self._shared = (page, 1) if per_channel else (1, -1)  # of (G group b g d), the dim that shares a step
        self._codes = Rows(page // self.group, None, spill, self.group)
        self._scales = Rows(page // self.group, None, spill, self.group)
        self._open: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Memory held, files left out."""
        return super().bytes + (0 if self._open is None else self._open.numel() * self._open.element_size())

    def close(self) -> None:
        """Let go of memory and files; the store is of no more use."""
        super().close()
        self._open = None

    def _append(self, x: Tensor, room: int) -> None:
        if self._open is None:
            self._open = self._written()
        for part in x.split(BLOCK, dim=1):
            originals = torch.cat((self._open, part), dim=1)
            full = originals.shape[1] // self.group
            if full:
                pages = originals[:, : full * self.group].transpose(0, 1).unflatten(0, (full, self.group))
                self._quantise(pages, room // self.group)
                originals = originals[:, full * self.group :].clone()
            self._open = originals

    def _quantise(self, pages: Tensor, room: int) -> None:
        """Append whole groups (G group b g d)."""
        codes, scales = quantise(pages, self.bits, self._shared)
        if not bool(scales.isfinite().all()):
            raise Unsupported(f"Keys or values that are not finite in fp32 cannot be held in {self.kind}; use cache.storage: model.")
        self._codes.write(codes, room)
        self._scales.write(scales, room)

    def _read(self, begin: int, end: int, like: Tensor) -> Tensor:
        closed = self._closed
        out = like.new_empty(like.shape[0], end - begin, *like.shape[2:])
        middle = max(begin, min(end, closed))
        for a in range(begin, middle, BLOCK):
            b = min(a + BLOCK, middle)
            first, last = a // self.group, -(-b // self.group)
            tokens = dequantise(self._codes.data[first:last], self._scales.data[first:last], self.bits, like.shape[-1]).flatten(0, 1)
            out[:, a - begin : b - begin] = tokens[a - first * self.group : b - first * self.group].transpose(0, 1)
        if end > middle:
            out[:, middle - begin :] = self._newest[:, middle - closed : end - closed]
        return out

    def _select(self, positions: Tensor, like: Tensor) -> Tensor:
        closed = self._closed
        out = like.new_empty(like.shape[0], len(positions), *like.shape[2:])
        is_closed = positions < closed
        if closed:
            codes, scales = self._codes.data, self._scales.data
            at = positions[is_closed].to(codes.device)
            tokens = dequantise(codes.flatten(0, 1)[at][:, None], scales[at // self.group], self.bits, like.shape[-1])
            out[:, is_closed] = tokens[:, 0].transpose(0, 1).to(like)
        out[:, ~is_closed] = self._newest[:, positions[~is_closed] - closed]
        return out

    def _restore(self, mark: Mark) -> None:
        self._codes.count = self._scales.count = mark.count // self.group
        self._open = self._written() if mark.open is None else mark.open

    def _originals(self) -> Tensor | None:
        return self._open

    @property
    def _closed(self) -> int:
        """How many tokens are quantised; the others are the newest."""
        return self._codes.count * self.group

    @property
    def _newest(self) -> Tensor:
        assert self._open is not None
        return self._open

    def _rows(self) -> tuple[Rows, ...]:
        return (self._codes, self._scales)


def quantise(x: Tensor, bits: int, shared: int) -> tuple[Tensor, Tensor]:
    """x (G t b g d), numbers along dim `shared` (1 or -1) with one step -> codes (G t b g w) uint8; zero and step (G b g d or 1, 2) fp32.

    zero = min, step = (max - min) / (2^bits - 1), code = round((x - zero) / step): the formula of KIVI, in fp32.
    """
    x, levels = x.float(), 2**bits - 1
    low, high = x.aminmax(dim=shared, keepdim=True)
    step = (high - low) / levels
    codes = ((x - low) / step.where(step > 0, 1)).round().clamp(0, levels)
    return pack(codes.to(torch.uint8), bits), torch.stack((low[:, 0], step[:, 0]), dim=-1)


def dequantise(codes: Tensor, scales: Tensor, bits: int, width: int) -> Tensor:
    """codes (G t b g w), zero and step (G b g d or 1, 2) -> (G t b g width) fp32."""
    return unpack(codes, bits, width).float().mul_(scales[:, None, ..., 1]).add_(scales[:, None, ..., 0])


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (… d) uint8 in as few bytes as they need (… w). 4 bits: the even channel is a byte's low half; an odd d is padded by 0."""
    if bits == 8:
        return codes
    codes = F.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """The `width` codes that `pack` packed."""
    if bits == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :width]


class Rows:
    """A tensor that grows along its first dim: in memory by `unit` rows, in a file by segments. A row holds `tokens` tokens."""

    def __init__(self, unit: int, dtype: torch.dtype | None, spill: Path | None, tokens: int = 1) -> None:
        self.unit = unit if spill is None else unit * -(-SEGMENT // (unit * tokens))
        self.dtype, self.count = dtype, 0
        self.file = None if spill is None else UnnamedFile(spill)
        self._all: Tensor | None = None

    @property
    def data(self) -> Tensor:
        """The rows in use; a view."""
        assert self._all is not None
        return self._all[: self.count]

    def write(self, x: Tensor, room: int) -> None:
        """Append rows; when memory must grow, grow for `room` rows in all."""
        needed = self.count + len(x)
        if self._all is None or needed > len(self._all):
            shape = (-(-max(needed, room) // self.unit) * self.unit, *x.shape[1:])
            self._all = self._grown(x, shape) if self.file is None else self.file.map(shape, self.dtype or x.dtype)
        self._all[self.count : needed] = x
        self.count = needed

    def _grown(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        grown = x.new_empty(shape, dtype=self.dtype or x.dtype)
        if self._all is not None:
            grown[: self.count] = self.data
        return grown

    @property
    def bytes(self) -> int:
        """Of all rows, those that wait for use included."""
        return 0 if self._all is None else self._all.numel() * self._all.element_size()

    def close(self) -> None:
        """Let go of memory or file."""
        self.count, self._all = 0, None
        if self.file is not None:
            self.file.close()


class UnnamedFile:
    """A file without a name in `folder`: nothing of it is left when it is closed, collected, or the process is killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            file = tempfile.TemporaryFile(dir=folder, buffering=0)
        except OSError as error:
            raise self._refusal("no file can be made there", error) from error
        self._descriptor, self._size = file.fileno(), 0
        self.close = weakref.finalize(self, file.close)

    def map(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The file, grown to this shape, as a tensor of shared memory. What was written before stays, and so do earlier tensors."""
        size = int(torch.Size(shape).numel()) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        try:
            if hasattr(os, "posix_fallocate"):  # a full disk is a sentence now; without it, the signal SIGBUS at some later write
                os.posix_fallocate(self._descriptor, self._size, size - self._size)
            else:
                os.truncate(self._descriptor, size)
            mapped = mmap.mmap(self._descriptor, size)
        except OSError as error:
            raise self._refusal(f"a file there cannot grow to {size} bytes", error) from error
        self._size = size
        return torch.frombuffer(mapped, dtype=dtype).view(shape)

    def _refusal(self, what: str, error: OSError) -> ConfigError:
        return ConfigError(
            f"cache.spill is {str(self.folder)!r}, but {what}: {error.strerror or error}. Name a folder on a disk with room."
        )
