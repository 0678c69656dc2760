"""Inspect: what a model's attention looks like on a document, head by head, over the ring: which sparse pattern it bears.

Knows the engine and measures of rows. Knows nothing of command lines.
"""

from ringctx.tools.inspect.measure import Asked, Head, Result, check, measure, selectors_of
from ringctx.tools.inspect.report import bar, text, write

__all__ = ["Asked", "Head", "Result", "bar", "check", "measure", "selectors_of", "text", "write"]
