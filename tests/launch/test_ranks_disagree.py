"""Two ranks of one `ringctx generate` that were asked different things: one sentence each, exit code 2, within 15 seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "tiny_cpu.yaml")
RANK = """
import os, sys, time
from pathlib import Path
from ringctx.cli import main
rank = os.environ["RANK"]
arguments = [a.replace("RANK", rank) for a in sys.argv[2:]]
if sys.argv[1] == "dtype" and rank == "1":
    arguments += ["--set", "model.dtype=bfloat16"]
began = time.monotonic()
code = main(arguments)
Path(f"code{rank}").write_text(str(code))
Path(f"seconds{rank}").write_text(str(time.monotonic() - began))
time.sleep(3)  # torchrun stops the other rank as soon as this one ends; let it say its own word first
sys.exit(code)
"""


@pytest.mark.parametrize(("what", "told"), [("length", "layout is"), ("dtype", "dtype is")])
def test_ranks_that_disagree_say_so_and_end_with_2(tmp_path, what, told):
    (tmp_path / "rank.py").write_text(RANK)
    for rank in "01":
        times = 5 + int(rank) if what == "length" else 5
        (tmp_path / f"text{rank}.txt").write_text("In the beginning God created the heaven and the earth. " * times)
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment = kept | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "rank.py", what]
    command = [*launcher, "generate", TINY, "--document", "textRANK.txt", "--question", "Who?"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=120, check=False)
    assert [(tmp_path / f"code{rank}").read_text() for rank in "01"] == ["2", "2"], done.stderr
    sentences = {line.partition("] ")[2] for line in done.stderr.splitlines() if "Ranks disagree" in line}
    assert len(sentences) == 1, done.stderr
    assert told in sentences.pop()
    assert all(float((tmp_path / f"seconds{rank}").read_text()) < 15 for rank in "01")  # loading the model included
