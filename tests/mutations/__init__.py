"""Breaks of the code that have bitten others, as data: each must be noticed by the few tests that it names.

A mutation replaces a text that occurs exactly once in its file. `python -m tests.mutants` applies them one by one.
"""

from __future__ import annotations

from tests.mutations.branches import BRANCHES
from tests.mutations.calls import CALLS_AND_CACHES
from tests.mutations.carries import CARRIES
from tests.mutations.functions import FUNCTIONS
from tests.mutations.kinds import Mutation
from tests.mutations.masks import WHO_SEES_WHOM
from tests.mutations.native import NATIVE
from tests.mutations.scores import HEADS_AND_SCORES
from tests.mutations.sums import SUMS
from tests.mutations.training import TRAINED
from tests.mutations.travel import TRAVEL

MUTATIONS: tuple[Mutation, ...] = (
    *TRAVEL,
    *SUMS,
    *WHO_SEES_WHOM,
    *HEADS_AND_SCORES,
    *BRANCHES,
    *CALLS_AND_CACHES,
    *CARRIES,
    *TRAINED,
    *FUNCTIONS,
    *NATIVE,
)
