"""A snapshot outlives the ranks that wrote it: killed in mid-prefill, gone on with by another number of ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from ringctx.config import load
from ringctx.core.ring import Ring
from ringctx.runtime.answer import Answer
from ringctx.runtime.engine import Engine
from tests.launch.test_generate import QUESTION, TINY, environment, generate, pid_of, run

SETTINGS = ["--json", "--set", "layout.chunk=8", "--set", "cache.save_every=64"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a document that takes a hundred chunks, and a cache of its own."""
    folder: Path = tmp_path_factory.mktemp("snapshot")
    (folder / "text.txt").write_text("And God said, Let there be a firmament in the midst of the waters. " * 12)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(place) -> Answer:
    """One rank's answer, the document read at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        return Engine.load(load(TINY), Ring.alone()).generate((place / "text.txt").read_text(), QUESTION)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for ranks in /proc")
def test_killed_on_two_ranks_in_mid_prefill_and_resumed_on_three(place, uninterrupted):
    folder = place / "saved"
    command = [sys.executable, *generate(place, *SETTINGS, "--ranks", "2", "--save", str(folder))]
    with subprocess.Popen(command, env=environment(place), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and num_read(folder) < 256:
            time.sleep(0.01)
        os.kill(pid_of(process.pid, 1), signal.SIGKILL)
        err = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 3 and "Rank 1 was killed by SIGKILL" in err, err
    read = num_read(folder)
    assert 256 <= read < uninterrupted.prompt_tokens

    resumed = run(place, *generate(place, *SETTINGS, "--ranks", "3", "--resume", str(folder)))
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["tokens"] == uninterrupted.tokens
    (of_document,) = re.findall(rf"{read} of (\d+) tokens were read before\.", resumed.stderr)
    assert read < int(of_document) < uninterrupted.prompt_tokens


def num_read(folder: Path) -> int:
    """Tokens that the snapshot holds; 0 while there is none."""
    listed = folder / "snapshot.json"
    return int(json.loads(listed.read_text())["read"]) if listed.exists() else 0
