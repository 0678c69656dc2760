"""Show: one page for the browser, of who computes and sends what, and of when it happened.

Knows configurations, plans and traces. Knows nothing of command lines.
"""

from ringctx.tools.show.page import check, write
from ringctx.tools.show.plans import Shown, shown

__all__ = ["Shown", "check", "shown", "write"]
"""shown: what a configuration asks of each layer, over ranks. write: the page."""
