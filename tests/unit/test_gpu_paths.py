"""The table of GPU paths names every module that knows of GPUs, and tests that exist."""

from __future__ import annotations

import re

from tests.gpu.paths import PATHS, ROOT, Outcomes, written

KNOWS = re.compile(r"\b(cuda|nccl|triton)\b", re.IGNORECASE)
WORDS_ONLY = {"kernels/registry.py", "methods/rotary.py", "tools/planner/machine.py"}
"""These name a kernel or a device and compute nothing there."""


def test_every_module_that_knows_of_gpus_is_on_the_table():
    named = " ".join(path.where for path in PATHS)
    for file in sorted((ROOT / "ringctx").rglob("*.py")):
        name = str(file.relative_to(ROOT / "ringctx"))
        if name in WORDS_ONLY or not KNOWS.search(file.read_text()):
            continue
        assert name in named or f"{file.parent.name}/" in named and file.stem in named, name


def test_every_test_that_is_named_exists():
    for path in PATHS:
        for tests in path.proofs.values():
            for test in tests:
                file, _, name = test.partition("::")
                assert (ROOT / file).is_file(), test
                assert f"def {name.partition('[')[0]}" in (ROOT / file).read_text(), test


def test_a_cell_says_what_was_not_proved():
    nothing = Outcomes([], [])
    text = written(dict.fromkeys(("same code on CPUs", "interpreter", "fake tensors", "signature"), nothing) | {
        "compiled for sm_80, sm_90": nothing, "on a GPU": nothing}, "")  # fmt: skip
    assert "nothing was run yet" in text and "not run" in text and not re.search(r"\| \d+ ", text)
    some = Outcomes(["tests/unit/test_triton_tiles.py::test_a"], ["tests/unit/test_triton_tiles.py::test_b"])
    assert some.of(("tests/unit/test_triton_tiles.py",)) == (1, 1)
