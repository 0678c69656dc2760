"""Patterns that cannot be: what was asked, and what to do."""

from __future__ import annotations

import pytest

from ringctx.errors import ConfigError, LayoutError
from ringctx.patterns import (
    band,
    blocks,
    causal,
    dilated,
    documents,
    fixed,
    full,
    global_tokens,
    own_block,
    per_head,
    prefix,
    queries_from,
    random_blocks,
    sinks,
    star,
    strided,
    window,
)
from tests.unit.test_patterns import INDEX, tiles

REFUSALS = [
    (lambda: window(0), ConfigError, "window was given 0; a window counts the token itself.*1 or more"),
    (lambda: window(2.0), ConfigError, "window was given 2.0"),
    (lambda: window(True), ConfigError, "window was given True"),
    (lambda: sinks(-1), ConfigError, "sinks was given -1.*0 or more"),
    (lambda: prefix(-1), ConfigError, "prefix was given -1"),
    (lambda: dilated(0), ConfigError, "dilated was given 0; it is the distance"),
    (lambda: strided(0), ConfigError, "strided was given 0"),
    (lambda: band(3, 2), ConfigError, "band was asked from 3 to 2"),
    (lambda: own_block(0), ConfigError, "chunks was given 0; its first number is a chunk's length"),
    (lambda: queries_from(-1), ConfigError, "queries_from was given -1; it is the first query that sees all"),
    (lambda: star(0, 9), ConfigError, "chunks was given 0"),
    (lambda: random_blocks(0, 1), ConfigError, "random_blocks was given 0; its first number is a block's length"),
    (lambda: random_blocks(4, 0), ConfigError, "random_blocks was given 0; its second number counts the blocks"),
    (lambda: fixed(0, 1), ConfigError, "fixed was given 0; its first number"),
    (lambda: fixed(4, 0), ConfigError, "fixed was given 0; its second number"),
    (lambda: fixed(4, 5), ConfigError, r"fixed\(4, 5\) asks for more summaries than a segment has tokens"),
    (lambda: global_tokens([]), ConfigError, "global_tokens takes whole numbers, at least one"),
    (lambda: global_tokens([-1]), ConfigError, "global_tokens was given -1; a token is named by its index"),
    (lambda: global_tokens([0.5]), ConfigError, "global_tokens takes whole numbers.*float32"),
    (lambda: documents(), ConfigError, "documents takes one description"),
    (lambda: documents([0, 4], ids=[0, 0, 0, 0]), ConfigError, "documents takes one description"),
    (lambda: documents([0, 0, 1, 1]), ConfigError, r"cannot tell whether 0 0 1 1 is cu_seqlens.*documents\(ids=...\)"),
    (lambda: documents([3, 4, 9]), ConfigError, "cannot tell whether 3 4 9"),
    (lambda: documents([0]), ConfigError, "cannot tell whether 0 is"),
    (lambda: documents([0.0, 4.0]), ConfigError, "documents takes whole numbers.*float32"),
    (lambda: documents(cu_seqlens=[1, 4]), ConfigError, "cu_seqlens rises from 0 to the number of tokens, and 1 4 does not"),
    (lambda: documents(cu_seqlens=[0, 5, 4]), ConfigError, "0 5 4 does not"),
    (lambda: documents(cu_seqlens=[0, 0]), ConfigError, "0 0 does not"),
    (lambda: documents(cu_seqlens=[[0, 4]]), ConfigError, "cu_seqlens rises from 0"),
    (lambda: documents(ids=[[[0]]]), ConfigError, r"ids are \(S\) or \(b, S\), and these have shape \(1, 1, 1\)"),
    (lambda: documents(ids=[[0, 1], [0]]), ConfigError, "ids takes a list or a tensor.*rows of equal length"),
    (lambda: documents("0 5 9"), ConfigError, "documents takes a list or a tensor"),
    (lambda: blocks([[1, 0]], 4), ConfigError, "blocks takes a bool mask.*int64"),
    (lambda: blocks([True, False], 4), ConfigError, r"blocks takes a bool mask.*\(2,\)"),
    (lambda: blocks([[True]], 0), ConfigError, "blocks was given 0; its size"),
    (lambda: blocks([[True]], (4, 4, 4)), ConfigError, r"one size or two.*\(4, 4, 4\)"),
    (lambda: per_head({}), ConfigError, "this leaves out 0"),
    (lambda: per_head({causal(): [0, 3]}), ConfigError, "this leaves out 1 2; name each"),
    (lambda: per_head({causal(): [0, 1], full(): 1}), ConfigError, "this names 1 twice"),
    (lambda: per_head({causal(): [-1, 0]}), ConfigError, "names heads below 0"),
    (lambda: per_head({causal: 0}), ConfigError, r"per_head composes patterns.*did you mean causal\(\)"),
    (lambda: window(4) & causal, ConfigError, r"And composes patterns.*did you mean causal\(\)"),
    (lambda: window(4) | 3, ConfigError, "Or composes patterns, and 3 is none"),
    (lambda: documents(ids=[[0], [1]]) & documents(ids=[[0], [1], [2]]), ConfigError, "these tell 2 and 3 rows apart"),
    (lambda: per_head({causal(): [0, 1]}).heads(4), ConfigError, "per_head names 2 heads and the queries have 4"),
    (lambda: (causal() & blocks(tiles(2, 3, 3), 4)).heads(3), ConfigError, "a mask for each of 2 heads and the queries have 3"),
    (lambda: documents([0, 5]).judge(range(4, 6), range(2)), LayoutError, r"documents\(0 5\) says.*up to index 4, and index 5"),
    (lambda: documents([0, 5]).allows(INDEX[:2], INDEX[:7]), LayoutError, "index 6 was asked; build it for the whole sequence"),
    (lambda: blocks(tiles(3, 2), 4).judge(range(2), range(9)), LayoutError, "up to index 7, and index 8"),
    (lambda: blocks(tiles(2, 3), 4).allows(INDEX, INDEX), LayoutError, "up to index 7, and index 11"),
]


@pytest.mark.parametrize(("asked", "error", "sentence"), REFUSALS, ids=[sentence[:40] for *_, sentence in REFUSALS])
def test_a_refusal_says_what_was_asked_and_what_to_do(asked, error, sentence):
    with pytest.raises(error, match=f"(?s){sentence}") as caught:
        asked()
    assert str(caught.value).endswith(".")
