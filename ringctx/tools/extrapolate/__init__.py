"""Extrapolate: models trained short and tested long, one method of positions beside another.

Knows training and configurations. Knows nothing of command lines.
"""

from ringctx.tools.extrapolate.measure import Asked, Result, Row, check, measure
from ringctx.tools.extrapolate.methods import METHODS
from ringctx.tools.extrapolate.report import bar, text, write

__all__ = ["METHODS", "Asked", "Result", "Row", "bar", "check", "measure", "text", "write"]
