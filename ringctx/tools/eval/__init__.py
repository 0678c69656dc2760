"""eval: what a model finds and how well it predicts over the ring, by length. `measure` is all of it; `ringctx eval` calls it."""

from __future__ import annotations

from ringctx.tools.eval.asked import SHIPPED, Asked
from ringctx.tools.eval.measure import measure
from ringctx.tools.eval.report import check_out, text, write

__all__ = ["SHIPPED", "Asked", "check_out", "measure", "text", "write"]
