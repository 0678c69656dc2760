"""Cache eviction: which keys are kept when not all of them can be.

A policy scores keys, higher is kept; the keys of each key head then compete over the whole ring, and the lower index wins a tie.
"""

from ringctx.methods.eviction.choice import keep, parted
from ringctx.methods.eviction.forgotten import Forgotten
from ringctx.methods.eviction.policy import CachePolicy, Held
from ringctx.methods.eviction.positional import Duo, Streaming
from ringctx.methods.eviction.scored import TopK
from ringctx.methods.eviction.votes import H2O, PyramidKV, SnapKV

__all__ = ["H2O", "CachePolicy", "Duo", "Forgotten", "Held", "PyramidKV", "SnapKV", "Streaming", "TopK", "keep", "parted"]
