"""Rings from torchrun's environment and from the axes of a DeviceMesh, on 4 ranks."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_rings_of_a_mesh_answer_like_the_oracle():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "-m", "tests.launch.mesh_job"]
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, cwd=ROOT, env=kept | {"OMP_NUM_THREADS": "1"}, text=True, capture_output=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
