"""`python -m ringctx …` and `torchrun … -m ringctx …`."""

from __future__ import annotations

import sys

from ringctx.cli import main

sys.exit(main())
