"""`python -m ringctx …` and `torchrun … -m ringctx …`."""

from __future__ import annotations

import atexit
import logging
import os
import sys

from ringctx.cli import main
from ringctx.runtime.launch import is_rank

code = main()
if not is_rank():
    sys.exit(code)
# A rank does not wait for the interpreter to be taken down: a thread of gloo that lets go of its last tensor meanwhile aborts the process.
atexit._run_exitfuncs()
logging.shutdown()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
