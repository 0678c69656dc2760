"""The exactness grid, run by `make exact`: every case against the float64 oracle, on a pool of gloo ranks.

    python -m tests.exact --minutes 60            go on where the last run stopped
    python -m tests.exact --share 2/4             the second quarter of the cases
    python -m tests.exact --only zigzag-causal    cases whose name contains this; --again repeats what is already known

Results are lines of JSON, one a case, in .exact/results.jsonl. Exits 1 if any case of the share is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch

from ringctx.kernels.sdpa import _compute_dtype
from tests.cases import TOLERANCE, Case, compare, on_rank, oracle, problem
from tests.grid import grid, half, long
from tests.pool import Pool
from tests.single import single_call

HALF_FACTORS = {"out": 1.15, "dq": 1.1, "dk": 1.0, "dv": 1.0}
"""How much worse than one call of torch's own kernel in the same dtype an answer in half precision may be."""
ROUNDED_PARTS = 2**0.5
"""The same where the CPU computes in that dtype: parts are rounded to it before they are summed, one rounding more. Long causal
sequences are held to HALF_FACTORS there too, in tests/ranks/test_half_precision.py."""


def judge(pool: Pool, case: Case) -> dict[str, Any]:
    """Run one case: its errors and bounds, or that it was refused. Raises RankFailed or RanksHang if ranks do."""
    given = problem(case)
    pool.start(on_rank, case, size=case.size, fold=case.fold)
    try:
        reference = oracle(case, given)  # while the ranks are at it
    finally:
        ranks = pool.results(timeout=300.0)
    refusals = {r["refused"] for r in ranks if "refused" in r}
    if refusals:
        assert all("refused" in r for r in ranks), f"only some ranks refuse: {refusals}"
        return {"refused": sorted(refusals)[0]}
    found = compare(given, reference, ranks)
    if case.dtype in TOLERANCE:
        bounds = dict.fromkeys(found, TOLERANCE[case.dtype])
    else:
        is_native = _compute_dtype(given.q.dtype) == given.q.dtype
        bounds = {
            name: (ROUNDED_PARTS if is_native else HALF_FACTORS[name]) * error for name, error in single_call(given, reference).items()
        }
        found = {name: found[name] for name in bounds}
    return {"errors": found, "bounds": bounds}


def wrong(result: dict[str, Any]) -> list[str]:
    """What is beyond its bound, or how the case failed."""
    if "failed" in result:
        return [result["failed"]]
    return [
        f"{n} is off by {x:.2e}, allowed {result['bounds'][n]:.2e}"
        for n, x in result.get("errors", {}).items()
        if not x <= result["bounds"][n]
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.exact", description="The exactness grid.")
    parser.add_argument("--share", default="1/1", metavar="K/N", help="the K-th of N parts of the cases")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no case after so many minutes")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--results", type=Path, default=Path(".exact/results.jsonl"))
    parser.add_argument("--again", action="store_true", help="repeat cases that have a result")
    return parser.parse_args()


def main() -> int:
    """Run what is left of the share, tell what is wrong and the worst errors."""
    args = _arguments()
    torch.set_num_threads(1)
    part, parts = map(int, args.share.split("/"))
    cases = [case for n, case in enumerate((*long(), *half(), *grid())) if n % parts == part - 1 and args.only in str(case)]
    cases.sort(key=lambda case: case.size > 4)
    known = _known(args.results) if not args.again else {}
    todo = [case for case in cases if str(case) not in known or "failed" in known[str(case)]]
    print(f"{len(cases)} cases in this share, {len(todo)} to run, about {sum(c.cost for c in todo) / 60:.0f} minutes", flush=True)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with Pool() as pool, args.results.open("a") as lines:
        for number, case in enumerate(todo, 1):
            if time.monotonic() - began > 60 * args.minutes:
                print(f"out of time: {len(todo) - number + 1} cases left; run it again to go on")
                break
            start = time.monotonic()
            try:
                result = judge(pool, case)
            except AssertionError as error:
                result = {"failed": str(error)}
            known[str(case)] = result
            lines.write(json.dumps({"case": str(case), **result, "seconds": round(time.monotonic() - start, 2)}) + "\n")
            lines.flush()
            for complaint in wrong(result):
                print(f"WRONG {case}: {complaint}", flush=True)
            if number % 100 == 0:
                print(f"{number} of {len(todo)} in {time.monotonic() - began:.0f} s", flush=True)
    return _report(cases, known)


def _known(path: Path) -> dict[str, dict[str, Any]]:
    """Results of earlier runs, the latest of each case."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["case"]: row for row in rows}


def _report(cases: list[Case], known: dict[str, dict[str, Any]]) -> int:
    """Print refusals, the worst errors by dtype and transport, and the verdict; 1 if anything is wrong."""
    results = [(case, known[str(case)]) for case in cases if str(case) in known]
    for reason, count in Counter(r["refused"] for _, r in results if "refused" in r).items():
        print(f"refused {count} x: {reason}")
    worst: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for case, result in results:
        row = worst[case.dtype, case.route]
        row["cases"] = row.get("cases", 0) + 1
        for name, error in result.get("errors", {}).items():
            name = "dparams" if name.startswith("dparams") else name
            row[name] = max(row.get(name, 0.0), error)
    columns = ("out", "lse", "dq", "dk", "dv", "dparams")
    print(f"\nworst errors\n{'dtype':6}{'route':12}{'cases':>6}" + "".join(f"{name:>10}" for name in columns))
    for (dtype, route), row in sorted(worst.items()):
        numbers = "".join(f"{row[name]:>10.1e}" if name in row else f"{'-':>10}" for name in columns)
        print(f"{dtype:6}{route:12}{row['cases']:>6.0f}{numbers}")
    bad = [str(case) for case, result in results if wrong(result)]
    print(f"\n{len(results)} of {len(cases)} cases known, {len(bad)} wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
