"""Plans, without a process: tiles cover what the pattern allows, parcels fit together, gradients come home, costs add up."""

import itertools

import pytest
import torch

from ringctx import Layout
from ringctx.core.choose import Shape, choose
from ringctx.core.pattern import CAUSAL, FULL, PARTIAL
from ringctx.core.plan import Plan, make_plan, path, steps_of, wanted
from ringctx.core.tiles import MOST_PARTS, area, cut_columns, needs, parts, pieces, spans_of, tiles, union, width
from ringctx.patterns import blocks, causal, dilated, documents, full, global_tokens, prefix, sinks, window
from tests.cases import small_tiles

PATTERNS = {
    "full": full(),
    "causal": causal(),
    "window": causal() & window(9),
    "sinks": causal() & (window(6) | sinks(2)),
    "documents": causal() & documents((0, 5, 20, 21, 45)),
    "prefix": prefix(11),
    "dilated": causal() & dilated(3),
    "globals": causal() & (window(3) | global_tokens((7, 30))),
    "blocks": blocks(torch.eye(5, dtype=torch.bool).roll(1, 0), 9),
    "nothing": causal() & ~causal(),
}
LAYOUTS = {
    "contiguous": Layout.contiguous,
    "zigzag": Layout.zigzag,
    "striped": Layout.striped,
    "residue": lambda length, size: Layout.residue(length, size, 3),
}
S = 45
every = pytest.mark.parametrize(("pattern", "layout"), list(itertools.product(PATTERNS, LAYOUTS)))
SIZES = [1, 2, 3, 4]
TRANSPORTS = ["rotate", "fetch", "gather"]


@pytest.fixture(autouse=True)
def short_sequences_are_divided_too():
    with small_tiles(4):
        yield


def plans(pattern: str, layout: str, size: int, transport: str, nodes: int = 1) -> list[Plan]:
    where = LAYOUTS[layout](S, size)
    return [make_plan((PATTERNS[pattern],), where, where, rank, transport, nodes) for rank in range(size)]


def visits_of(plan: Plan):
    return [plan.home, *(v for hop in plan.hops for v in hop.visits)]


def pairs(rows: torch.Tensor, visits, pattern) -> torch.Tensor:
    """How often each query of these rows meets each key in the visits' tiles."""
    met = torch.zeros(len(rows), S, dtype=torch.int64)
    for visit in visits:
        keys = torch.tensor([x for r in visit.ranges for x in r], dtype=torch.int64)
        assert len(keys) == width(visit.spans)
        for verdict, a, b, c, d in visit.tiles[0]:
            assert verdict != CAUSAL or b - a == d - c
            assert verdict != PARTIAL or (b - a <= 4 and d - c <= 16)
            tile = pattern.allows(rows[a:b], keys[c:d]) if verdict == PARTIAL else torch.ones(b - a, d - c, dtype=torch.bool)
            met[a:b].index_add_(1, keys[c:d], (tile.tril() if verdict == CAUSAL else tile).long())
    return met


@every
def test_tiles_cover_what_is_allowed_and_each_pair_once(pattern, layout):
    for size, transport in itertools.product(SIZES, TRANSPORTS):
        for rank, plan in enumerate(plans(pattern, layout, size, transport)):
            rows = LAYOUTS[layout](S, size).indices(rank)
            assert torch.equal(pairs(rows, visits_of(plan), PATTERNS[pattern]), PATTERNS[pattern].allows(rows, torch.arange(S)).long())


@every
def test_what_one_rank_sends_another_receives(pattern, layout):
    for size, transport in itertools.product(SIZES, TRANSPORTS):
        folds = [n for n in (1, 2) if size % n == 0 and (n == 1 or transport == "rotate")]
        for nodes in folds:
            ring = plans(pattern, layout, size, transport, nodes)
            for number in range(max(len(p.hops) for p in ring)):
                hops = {p.rank: p.hops[number] for p in ring if number < len(p.hops)}
                sent = sorted((r, x.peer, x.owner, x.spans) for r, hop in hops.items() for x in hop.send)
                received = sorted((x.peer, r, x.owner, x.spans) for r, hop in hops.items() for x in hop.receive)
                assert sent == received
                sent = sorted((r, v.grads_to, v.owner, v.spans) for r, hop in hops.items() for v in hop.visits if v.grads_to is not None)
                received = sorted((x.peer, r, x.owner, x.spans) for r, hop in hops.items() for x in hop.grads_receive)
                assert sent == received


@every
def test_every_visitor_s_gradient_comes_home_once(pattern, layout):
    for size, transport in itertools.product(SIZES, TRANSPORTS):
        ring = plans(pattern, layout, size, transport)
        home = [torch.zeros(p.num_keys) for p in ring]
        expected = [torch.zeros(p.num_keys) for p in ring]
        under_way: dict[tuple[int, int], float] = {}  # (rank, owner) -> how many visitors' gradients wait there
        for number in range(max(len(p.hops) for p in ring)):
            arriving = []
            for plan in ring:
                for visit in plan.hops[number].visits if number < len(plan.hops) else ():
                    total = 1.0 + (under_way.pop((plan.rank, visit.owner)) if visit.grads_from is not None else 0.0)
                    arriving.append((visit, total))
                    for a, b in visit.spans:
                        expected[visit.owner][a:b] += 1
            for visit, total in arriving:
                if visit.grads_to == visit.owner:
                    for a, b in visit.spans:
                        home[visit.owner][a:b] += total
                else:
                    under_way[visit.grads_to, visit.owner] = total
        assert not under_way
        assert all(torch.equal(x, y) for x, y in zip(home, expected, strict=True))


@every
def test_steps_of_a_hop_compute_every_pair_of_it_once_and_fit_together(pattern, layout):
    for size, transport in itertools.product(SIZES, TRANSPORTS):
        ring = plans(pattern, layout, size, transport)
        for number in range(max(len(p.hops) for p in ring)):
            hops = {p.rank: p.hops[number] for p in ring if number < len(p.hops)}
            steps = {rank: steps_of(hop, least=1) for rank, hop in hops.items()}
            for rank, hop in hops.items():
                rows = LAYOUTS[layout](S, size).indices(rank)
                parts = [visit for step in steps[rank] for visit in step.visits]
                assert torch.equal(pairs(rows, hop.visits, PATTERNS[pattern]), pairs(rows, parts, PATTERNS[pattern]))
                assert len(steps[rank]) <= MOST_PARTS
            for at in range(max(map(len, steps.values()))):
                now = {rank: some[at] for rank, some in steps.items() if at < len(some)}
                sent = sorted((r, v.grads_to, v.owner, v.spans) for r, step in now.items() for v in step.visits)
                received = sorted((x.peer, r, x.owner, x.spans) for r, step in now.items() for x in step.grads_receive)
                assert sent == received


@pytest.mark.parametrize("verdict", [FULL, CAUSAL, PARTIAL])
def test_columns_of_a_tile_are_its_columns(verdict):
    rows = ((int(verdict), 3, 23, 5, 25), (int(FULL), 23, 30, 0, 5))
    whole = torch.zeros(30, 25, dtype=torch.int64)
    whole[3:23, 5:25] = torch.ones(20, 20, dtype=torch.int64).tril() if verdict == CAUSAL else 1
    whole[23:30, :5] = 1
    for c, d in [(0, 25), (0, 5), (5, 12), (12, 25), (24, 25), (3, 9)]:
        found = torch.zeros(30, d - c, dtype=torch.int64)
        for kind, a, b, y, z in cut_columns(rows, c, d):
            assert kind != CAUSAL or b - a == z - y
            found[a:b, y:z] += torch.ones(b - a, z - y, dtype=torch.int64).tril() if kind == CAUSAL else 1
        assert torch.equal(found, whole[:, c:d])


@pytest.mark.parametrize(
    ("tokens", "least", "expected"), [(0, 4, 0), (3, 4, 1), (4, 4, 1), (8, 4, 2), (1000, 1, 4), (13, 4, 2), (1000, 300, 3)]
)
def test_parts_are_few_and_hold_all(tokens, least, expected):
    found = parts(tokens, least)
    assert len(found) <= expected and union([found]) == (((0, tokens),) if tokens else ())
    assert all(b - a >= min(least, tokens) // 2 for a, b in found)


@every
def test_fetch_receives_exactly_the_keys_that_the_dense_matrix_shows(pattern, layout):
    for size in SIZES:
        where = LAYOUTS[layout](S, size)
        for rank, plan in enumerate(plans(pattern, layout, size, "fetch")):
            needed = PATTERNS[pattern].allows(where.indices(rank), torch.arange(S)).any(0)
            needed[where.indices(rank)] = False
            got = sorted(j for visit in visits_of(plan)[1:] for r in visit.ranges for j in r)
            assert got == needed.nonzero().flatten().tolist()
            assert plan.tokens_received == len(got)


@pytest.mark.parametrize(("W", "size"), list(itertools.product([1, 2, 11, 12, 13, 24, 25, 45, 60], [2, 3, 4])))
def test_a_causal_window_takes_only_the_hops_it_reaches(W, size):
    where = Layout.contiguous(12 * size, size)
    ring = [make_plan((causal() & window(W),), where, where, r, "rotate") for r in range(size)]
    assert max(len(p.hops) for p in ring) == min(size - 1, -(-(W - 1) // 12))


@pytest.mark.parametrize(("size", "nodes"), [(4, 1), (4, 2), (6, 2), (6, 3), (8, 4), (9, 3)])
def test_a_rotation_visits_every_owner_once_and_hands_on_what_it_holds(size, nodes):
    paths = [path(r, size, nodes) for r in range(size)]
    for rank in range(size):
        assert sorted(owner for owner, _, _ in paths[rank]) == [r for r in range(size) if r != rank]
    crossings = 0
    for hop in range(size - 1):
        for rank in range(size):
            owner, comes, _ = paths[rank][hop]
            assert owner == (comes if hop == 0 else paths[comes][hop - 1][0])
            assert paths[comes][hop][2] == rank
            crossings += comes * nodes // size != rank * nodes // size
    assert crossings == size * (nodes - 1)


@every
def test_no_rank_holds_more_than_two_visiting_blocks(pattern, layout):
    for size in SIZES:
        largest = max(LAYOUTS[layout](S, size).count(r) for r in range(size))
        for transport in ("rotate", "fetch"):
            assert all(plan.held <= 2 * largest for plan in plans(pattern, layout, size, transport))


@every
def test_the_counted_bytes_are_those_of_the_plans(pattern, layout):
    for size in SIZES:
        where = LAYOUTS[layout](S, size)
        choice = choose((PATTERNS[pattern],), where, where, Shape(1, 4, 2, 8, 8, 4, 4, True))
        for option in choice.options:
            if option.transport in ("rotate", "fetch", "gather"):
                ring = plans(pattern, layout, size, option.transport)
                tokens, grads = sum(p.tokens_sent for p in ring), sum(p.grad_tokens_sent for p in ring)
                assert option.bytes == 2 * 16 * 4 * (2 * tokens + grads)


def test_auto_takes_few_bytes_but_not_a_lopsided_plan():
    shape = Shape(1, 8, 8, 64, 64, 2, 4, True)
    zigzag, contiguous = Layout.zigzag(64, 2), Layout.contiguous(64, 2)
    assert choose((causal(),), zigzag, zigzag, shape).transport == "heads"
    assert choose((causal() & window(4),), zigzag, zigzag, shape).transport == "rotate"  # at a tie with fetch
    assert choose((causal(),), contiguous, contiguous, shape).transport == "heads"
    few_keys = Shape(1, 9, 3, 64, 64, 4, 4, False)
    four = Layout.zigzag(64, 4)
    assert choose((causal(),), four, four, few_keys).transport == "fetch"
    answer = Layout(((range(64, 65),), ()))
    assert choose((causal(),), answer, zigzag, few_keys).transport == "pass_q"
    assert "→ pass_q" in choose((causal(),), answer, zigzag, few_keys).explain()


def test_plans_hash_draw_and_explain_themselves():
    one, other = plans("causal", "zigzag", 2, "rotate")[0], plans("window", "zigzag", 2, "rotate")[0]
    assert one.hash == plans("causal", "zigzag", 2, "rotate")[0].hash != other.hash
    assert "◣" in one.draw()
    assert "█" in one.draw()
    assert "hop 1: receives 22 of rank 1 from rank 1" in one.explain()


def test_the_drawing_of_a_causal_tile_is_its_lower_half():
    from ringctx.core.tiles import draw

    rows = tiles(causal(), (range(4),), (range(4),))
    assert draw(rows, 4, 4, 4).split("\n") == ["◣···", "█◣··", "██◣·", "███◣"]


@pytest.mark.parametrize("tile", [(int(FULL), 3, 40, 5, 21), (int(CAUSAL), 2, 39, 8, 45), (int(PARTIAL), 0, 8, 0, 8)])
def test_pieces_are_the_tile_in_small(tile):
    def dense(parts):
        seen = torch.zeros(50, 50, dtype=torch.int64)
        for verdict, a, b, c, d in parts:
            whole = torch.ones(b - a, d - c, dtype=torch.int64)
            seen[a:b, c:d] += whole.tril() if verdict == CAUSAL else whole
        return seen

    cut = pieces(tile, 8)
    assert torch.equal(dense(cut), dense([tile]))
    assert all(max(b - a, d - c) <= 8 for _, a, b, c, d in cut)


def test_spans_and_their_union():
    assert spans_of(torch.tensor([True, True, False, True])) == ((0, 2), (3, 4))
    assert spans_of(torch.zeros(3, dtype=torch.bool)) == ()
    assert union([((0, 2), (5, 6)), ((1, 3),), ()]) == ((0, 3), (5, 6))
    assert width(((0, 3), (5, 6))) == 4


def test_the_causal_area_is_half_a_square():
    assert area(tiles(causal(), (range(16),), (range(16),))) == 16 * 17 // 2


@pytest.mark.parametrize("begin", [0, 20, 40])
@every
def test_a_chunk_wants_the_keys_that_its_queries_see(pattern: str, layout: str, begin: int):
    keys = LAYOUTS[layout](S, 3)
    queries = LAYOUTS[layout](S - begin, 3).shifted(begin)
    seen = PATTERNS[pattern].allows(torch.arange(begin, S), torch.arange(S)).any(0)
    where, spans = wanted((PATTERNS[pattern],), queries, keys)
    for rank in range(3):
        assert spans[rank] == spans_of(seen[keys.indices(rank)])
        assert where.indices(rank).tolist() == keys.indices(rank)[seen[keys.indices(rank)]].tolist()


def test_a_window_is_a_strip_for_each_leaf_of_rows_without_keys_that_none_of_them_sees():
    rows = tiles(causal() & window(6), (range(40, 64),), (range(30, 64),))
    assert rows == tuple((int(PARTIAL), a, a + 4, a + 5, a + 14) for a in range(0, 24, 4))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("second", [None, "sinks", "dilated"])
@pytest.mark.parametrize(("name", "length"), [*((name, 45) for name in PATTERNS), ("window", 700), ("sinks", 700), ("globals", 700)])
def test_needs_are_the_keys_that_somebody_sees_and_no_others(name, second, length, size):
    patterns = (PATTERNS[name],) if second is None else (PATTERNS[name], PATTERNS[second])
    for layout in (Layout.zigzag(length, size), Layout.striped(length, size)):
        for rank, owner in itertools.product(range(size), repeat=2):
            i, j = layout.indices(rank), layout.indices(owner)
            seen = torch.stack([pattern.allows(i, j).reshape(-1, len(i), len(j)).any(0).any(0) for pattern in patterns]).any(0)
            assert needs(patterns, layout.spans[rank], layout.spans[owner]) == spans_of(seen)
