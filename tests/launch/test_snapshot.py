"""A snapshot outlives the ranks that wrote it: killed in mid-prefill, gone on with by another number of ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.launch.test_generate import environment, generate, pid_of, run

SETTINGS = ["--json", "--set", "layout.chunk=8", "--set", "cache.save_every=64"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for ranks in /proc")
def test_killed_on_two_ranks_in_mid_prefill_and_resumed_on_three(tmp_path):
    (tmp_path / "text.txt").write_text("And God said, Let there be a firmament in the midst of the waters. " * 20)
    uninterrupted = run(tmp_path, *generate(tmp_path, *SETTINGS, "--set", "layout.chunk=512"))
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    want = json.loads(uninterrupted.stdout)

    folder = tmp_path / "snapshot"
    listed = folder / "snapshot.json"
    command = [sys.executable, *generate(tmp_path, *SETTINGS, "--ranks", "2", "--save", str(folder))]
    with subprocess.Popen(command, env=environment(tmp_path), stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        while process.poll() is None and read_in(listed) < 128:
            time.sleep(0.02)
        os.kill(pid_of(process.pid, 1), signal.SIGKILL)
        err = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 3 and "Rank 1 was killed by SIGKILL" in err, err
    read = read_in(listed)
    assert 128 <= read < want["prompt_tokens"]

    resumed = run(tmp_path, *generate(tmp_path, *SETTINGS, "--ranks", "3", "--resume", str(folder)))
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["tokens"] == want["tokens"]
    assert f"{read} of {want['prompt_tokens']} tokens were read before." in resumed.stderr

    part = next(folder.glob("part-64-*-rank1.safetensors"))
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    damaged = run(tmp_path, *generate(tmp_path, *SETTINGS, "--ranks", "2", "--resume", str(folder)))
    assert damaged.returncode == 2
    assert damaged.stderr.count(f"{part.name} of the snapshot in") == 1
    assert "Traceback" not in damaged.stderr


def read_in(listed: Path) -> int:
    """Tokens that the snapshot holds; 0 while there is none."""
    return int(json.loads(listed.read_text())["read"]) if listed.exists() else 0
