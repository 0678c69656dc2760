"""Machines: what devices and links can do, from their makers' sheets and from kernels' published figures, or as measured here.

Units: FLOP/s, bytes, bytes a second one way, seconds. Nothing here was measured on a GPU by this project.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ringctx.errors import ConfigError
from ringctx.tools.planner.simulate import Link


@dataclass(frozen=True, kw_only=True)
class Device:
    """attention, linear: FLOP/s that these reach in bf16. tile: seconds that a tile takes besides.

    post, hidden: as in Costs.
    """

    name: str
    memory: float
    attention: float
    linear: float
    tile: float = 10e-6
    post: float = 20e-6
    hidden: float = 1.0
    source: str = ""


def _gpu(name: str, peak: float, memory_gb: float, shares: tuple[float, float], source: str) -> Device:
    """From a peak in TFLOP/s, dense in bf16, and the shares of it that attention and matrix products reach."""
    attention, linear = (share * peak * 1e12 for share in shares)
    return Device(name=name, memory=memory_gb * 1e9, attention=attention, linear=linear, source=source)


DEVICES = {
    "a100": _gpu("A100 SXM 80 GB", 312, 80, (0.6, 0.75), "NVIDIA A100 data sheet; FlashAttention-2 (arXiv 2307.08691, figures 4 to 6)"),
    "h100": _gpu("H100 SXM", 989, 80, (0.6, 0.65), "NVIDIA H100 data sheet; FlashAttention-3 (arXiv 2407.08608, figures 5 and 6)"),
    "h200": _gpu("H200 SXM", 989, 141, (0.6, 0.65), "NVIDIA H200 data sheet; kernels as of H100"),
    "b200": _gpu("B200", 2250, 180, (0.6, 0.65), "NVIDIA DGX B200 data sheet; shares assumed as of H100"),
}
"""Causal attention at width 128 and long sequences; peaks are those of the sheets without sparsity."""

LINKS = {
    "nvlink3": Link(5e-6, 300e9), "nvlink4": Link(5e-6, 450e9), "nvlink5": Link(5e-6, 900e9),
    "hdr": Link(10e-6, 25e9), "ndr": Link(10e-6, 50e9), "xdr": Link(10e-6, 100e9),
}  # fmt: skip
"""One way and a GPU: NVLink of A100, H100 and B200, half of the 600, 900 and 1,800 GB/s of the sheets; InfiniBand of 200, 400, 800 Gb/s."""
NODE_LINK = {"a100": "nvlink3", "h100": "nvlink4", "h200": "nvlink4", "b200": "nvlink5"}
SHARE = 0.8
"""Of a link's bandwidth that large messages reach."""


def device_named(name: str) -> Device:
    """Raises ConfigError for a name that is not there."""
    if name not in DEVICES:
        raise ConfigError(f"There is no device {name!r} to plan for; there are {', '.join(DEVICES)}.")
    return DEVICES[name]


def link_of(asked: str) -> Link:
    """A name of LINKS, or gigabytes a second one way. Raises ConfigError for anything else."""
    if asked in LINKS:
        return replace(LINKS[asked], bandwidth=SHARE * LINKS[asked].bandwidth)
    try:
        bandwidth = float(asked) * 1e9
    except ValueError:
        bandwidth = 0.0
    if not bandwidth > 0:
        raise ConfigError(f"A link is one of {', '.join(LINKS)}, or gigabytes a second one way, such as 12.5; got {asked!r}.")
    return Link(10e-6, bandwidth)
