"""Bench: the ring timed against torch's own attention, against its floors, and against other libraries' rings."""

from ringctx.tools.bench.accuracy import accuracy
from ringctx.tools.bench.case import Case
from ringctx.tools.bench.measure import Row, measure
from ringctx.tools.bench.peers import PEERS, peer
from ringctx.tools.bench.table import as_json, table

__all__ = ["PEERS", "Case", "Row", "accuracy", "as_json", "measure", "peer", "table"]
