"""The table of GPU paths: `python -m tests.gpu.paths` runs what it names and writes docs/gpu.md. Needs Triton (`make triton` installs it).

A cell is how many tests passed, or "-" where nothing proves it that way. What ran on a GPU is read from the files that launch/gpu_check.sh
leaves (runs/gpu_check.xml, kept as docs/results/gpu-check_*.xml); without one, that column says that nothing did.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "gpu.md"
COLUMNS = ("same code on CPUs", "interpreter", "fake tensors", "signature", "compiled for sm_80, sm_90", "on a GPU")
UNIT, RANKS, GPU = "tests/unit/test_", "tests/ranks/test_", "tests/gpu/test_"
ON_GPU, RINGS = f"{GPU}kernels.py::test_", f"{GPU}rings.py::test_"


class GpuPath(NamedTuple):
    """Code that runs on a GPU: where it is, what it does, and the tests of each column."""

    where: str
    what: str
    proofs: dict[str, tuple[str, ...]]


PATHS = (
    GpuPath(
        "kernels/sdpa.py",
        "aten's CUDA flash kernel: whole and causal tiles, widths padded, lse and its gradient",
        {
            "fake tensors": (f"{UNIT}kernels_cuda.py::test_shapes_and_dtypes_of_torchs_cuda_flash_kernel",),
            "on a GPU": (f"{ON_GPU}equals_the_definition[sdpa", f"{ON_GPU}widths_groups_and_the_gradient_of_lse[sdpa"),
        },
    ),
    GpuPath(
        "kernels/flash.py",
        "flash-attn 2, 3 and 4",
        {
            "signature": (f"{UNIT}kernels_cuda.py::test_flash_attn_is_called_by_its_signature_and_answers_rightly",),
            "on a GPU": (f"{ON_GPU}each_generation_of_flash_attn_that_is_installed",),
        },
    ),
    GpuPath(
        "kernels/triton_tiles.py, kernels/triton_blocks.py",
        "tiles with masks, biases and their gradients, dropout",
        {
            "interpreter": (f"{UNIT}triton_tiles.py",),
            "compiled for sm_80, sm_90": (f"{UNIT}triton_tiles.py",),
            "on a GPU": (f"{ON_GPU}equals_the_definition[triton", f"{ON_GPU}bias_its_gradient_and_dropout[triton"),
        },
    ),
    GpuPath(
        "kernels/triton_carried.py, core/carried.py",
        "Selective Attention's tiles",
        {
            "interpreter": (f"{UNIT}triton_carried.py",),
            "compiled for sm_80, sm_90": (f"{UNIT}triton_carried.py",),
            "on a GPU": (f"{RINGS}selective_attention",),
        },
    ),
    GpuPath(
        "core/ (header, ring, transport, plan, compute)",
        "one loop for CPUs and GPUs: NCCL's batches, two communicators, waits with a deadline",
        {
            "same code on CPUs": (f"{RANKS}promises.py", f"{RANKS}fake_worlds.py"),
            "on a GPU": (
                *(f"{RINGS}{name}" for name in ("virtual_ranks", "ranks_over_nccl")),
                f"{RINGS}a_rank_that_does_not_come_is_missed",
            ),
        },
    ),
    GpuPath(
        "core/timeline.py",
        "moments as events of a CUDA stream",
        {"same code on CPUs": (f"{RANKS}timeline.py",), "on a GPU": (f"{RINGS}the_timeline_of_a_call_over_nccl",)},
    ),
    GpuPath(
        "methods/rotary.py, methods/scores.py, core/dropout.py",
        "encodings, scores and dropout drawn on the device",
        {
            "same code on CPUs": (f"{UNIT}rotary.py", f"{UNIT}scores.py", f"{UNIT}dropout.py"),
            "on a GPU": (f"{RINGS}virtual_ranks_with_scores",),
        },
    ),
    GpuPath(
        "device.py, config.py, tools/doctor.py, tools/bench/ (case, measure), tools/planner/here.py",
        "which device a rank takes, in which numbers, and what it says of itself",
        {"same code on CPUs": (f"{UNIT}runtime.py", f"{RANKS}floors.py"), "on a GPU": ()},
    ),
    GpuPath(
        "huggingface/ (context, shards)",
        "a model on each rank's GPU, whole or spread",
        {"same code on CPUs": (f"{UNIT}huggingface.py",), "on a GPU": ()},
    ),
    GpuPath(
        "training/ (job, loader, recompute), embed/deepspeed.py, config_training.py",
        "training on GPUs, with DeepSpeed or FSDP2",
        {"same code on CPUs": (f"{RANKS}training.py", f"{RANKS}embed.py"), "on a GPU": ()},
    ),
)  # fmt: skip


class Outcomes(NamedTuple):
    """Names of tests that ran: which passed, which failed."""

    passed: list[str]
    failed: list[str]

    def of(self, prefixes: tuple[str, ...]) -> tuple[int, int]:
        """How many that begin so passed and failed."""
        return tuple(sum(name.startswith(prefixes) for name in names) for names in self)  # type: ignore[return-value]


def read(path: Path) -> Outcomes:
    """What a JUnit file says of tests that were not skipped, by their pytest names."""
    found = Outcomes([], [])
    for case in ElementTree.parse(path).iter("testcase"):
        if case.find("skipped") is None:
            name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
            bad = case.find("failure") is not None or case.find("error") is not None
            (found.failed if bad else found.passed).append(name)
    return found


def run(column: str) -> Outcomes:
    """Run this column's tests here."""
    tests = [test for path in PATHS for test in path.proofs.get(column, ())]
    env = dict(
        os.environ, OMP_NUM_THREADS="1", TRITON_DEFAULT_FP_FUSION="1", **({"TRITON_INTERPRET": "1"} if column == "interpreter" else {})
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "not slow and not gpu",
            "-o",
            "junit_family=xunit1",
            f"--junitxml={out}",
            *tests,
        ]
        subprocess.run(command, env=env, cwd=ROOT)
        return read(out)


def on_gpus() -> tuple[Outcomes, str]:
    """What the kept reports of launch/gpu_check.sh say, and of which machines they are."""
    found, files = Outcomes([], []), sorted((ROOT / "docs" / "results").glob("gpu-check_*.xml"))
    for file in files:
        one = read(file)
        found.passed.extend(one.passed)
        found.failed.extend(one.failed)
    return found, ", ".join(file.stem.removeprefix("gpu-check_") for file in files)


def written(found: dict[str, Outcomes], machines: str) -> str:
    """docs/gpu.md."""
    lines = [
        "# What is proved of the paths that run on GPUs",
        "",
        "Written by `python -m tests.gpu.paths`, which runs the tests it counts. "
        + (
            f"On a GPU: {machines}."
            if machines
            else "**On a GPU nothing was run yet**: `launch/gpu_check.sh` is ready for a machine that has one."
        ),
        "",
        "| path | what | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for path in PATHS:
        cells = [_cell(found[column], path.proofs.get(column, ()), bool(machines) or column != COLUMNS[-1]) for column in COLUMNS]
        lines.append(f"| `{path.where}` | {path.what} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", 'A number is of tests that passed; "-": no such proof.']) + "\n"


def _cell(outcomes: Outcomes, tests: tuple[str, ...], ran: bool) -> str:
    if not tests:
        return "-"
    if not ran:
        return "not run"
    passed, failed = outcomes.of(tests)
    return f"{passed}" + (f", {failed} failed" if failed else "") if passed + failed else "not run"


def main() -> int:
    """Run, write, and fail where a test failed or one that is named did not run here."""
    found = {column: run(column) for column in COLUMNS[:-1]}
    found[COLUMNS[-1]], machines = on_gpus()
    OUT.write_text(written(found, machines))
    missing = [t for column in COLUMNS[:-1] for path in PATHS for t in path.proofs.get(column, ()) if not found[column].of((t,))[0]]
    failed = [name for outcomes in found.values() for name in outcomes.failed]
    for line in (*(f"failed: {name}" for name in failed), *(f"did not run: {test}" for test in missing)):
        print(line, file=sys.stderr)
    return int(bool(failed or missing))


if __name__ == "__main__":
    sys.exit(main())
