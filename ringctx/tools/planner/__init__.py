"""Planner: what a run costs before it is started: bytes, hops, memory, balance and time, and the layout and transport to take.

Knows plans, shapes of models and figures of machines. Starts nothing; sends nothing but what `here` measures.
"""

from ringctx.tools.planner.here import Here, asked_here
from ringctx.tools.planner.machine import DEVICES, LINKS, NODE_LINK, device_named, link_of
from ringctx.tools.planner.predict import Asked, Option, Prediction, predict
from ringctx.tools.planner.report import text
from ringctx.tools.planner.simulate import Link

__all__ = [
    "DEVICES", "LINKS", "NODE_LINK", "Asked", "Here", "Link", "Option", "Prediction",
    "asked_here", "device_named", "link_of", "predict", "text",
]  # fmt: skip
