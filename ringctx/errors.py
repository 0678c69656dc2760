"""Every error ringctx raises on purpose: a sentence that says what was asked, what is possible, and what to do.

RingctxError
├── ConfigError      a request that cannot be right (a value, a file, a spelling)          exit code 2
├── LayoutError      tokens and ranks that do not fit together                             exit code 2
├── Unsupported      a combination nobody here computes; lists every reason                exit code 2
├── RanksDisagree    ranks called with different shapes, layouts or attention              exit code 2
└── RankLost         a rank or a link failed, or missed its deadline                       exit code 3
"""

from __future__ import annotations


class RingctxError(Exception):
    """Base of all errors that ringctx raises on purpose."""

    exit_code = 2


class ConfigError(RingctxError, ValueError):
    """A value, a file or a spelling that cannot be right."""


class LayoutError(RingctxError, ValueError):
    """Tokens, shards and ranks that do not fit together."""


class Unsupported(RingctxError, NotImplementedError):
    """A refusal: nobody here computes this combination; the message lists every reason."""


class RanksDisagree(RingctxError):
    """Ranks made the same call with different shapes, dtypes, layouts, attention, or in another order."""


class RankLost(RingctxError):
    """A rank or a link failed, or missed its deadline; says which rank, at which hop."""

    exit_code = 3
