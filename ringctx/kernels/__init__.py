"""Attention of one tile on one device: a registry of kernels that take a call or say why not.

Knows shapes, dtypes and devices. Knows nothing of ranks, and imports nothing of core.
"""

from ringctx.kernels.base import Call, Elementwise, Kernel, TileScores, accumulation_dtype
from ringctx.kernels.registry import BY_NAME_ONLY, REGISTRY, choose, names

__all__ = ["BY_NAME_ONLY", "REGISTRY", "Call", "Elementwise", "Kernel", "TileScores", "accumulation_dtype", "choose", "names"]
