"""What a rank reads and holds of a checkpoint: `torchrun --nproc-per-node=N -m tests.shards_memory FOLDER PARTS DTYPE`.

The first run writes a random Llama of 610 MiB in bf16 into FOLDER. Anonymous memory is the process's own; mapped pages of the
file are the disk cache's, one copy for all processes of a machine.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from ringctx import Ring
from ringctx.huggingface import shards
from tests.launch.shards_job import local

MIB = 2**20


def make(folder: Path) -> None:
    """Four wide layers, saved in bf16."""
    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32_000, num_hidden_layers=4, **shape))
    model.to(torch.bfloat16).save_pretrained(folder)


def memory(folder: Path) -> str:
    """Anonymous memory of this process and the checkpoint's pages mapped into it, as Linux counts them."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    mapped, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if ":" not in line.split()[0]:
            is_ours = str(folder) in line
        elif is_ours and line.startswith("Rss:"):
            mapped += int(line.split()[1])
    return f"anonymous {int(fields['RssAnon'].split()[0]) / 1024:.0f}, file {mapped / 1024:.0f}"


def main() -> None:
    """One line a rank: MiB before, after loading, and after a forward pass of 64 tokens."""
    folder, parts, dtype = Path(sys.argv[1]).resolve(), int(sys.argv[2]), getattr(torch, sys.argv[3])
    torch.set_num_threads(1)
    with Ring.from_env(timeout=60) as world:
        if world.rank == 0 and not (folder / "config.json").is_file():
            make(folder)
        dist.barrier()
        before = memory(folder)
        model, _ = shards.load(folder, world, parts, dtype=dtype, device=torch.device("cpu"))
        loaded = memory(folder)
        with torch.no_grad():
            model(torch.arange(64)[None], use_cache=False, logits_to_keep=1)
        own = sum(local(weight).nbytes for weight in model.parameters()) / MIB
        print(f"rank {world.rank} of {parts} parts, own {own:.0f}: before {before}; loaded {loaded}; used {memory(folder)}\n", end="")


if __name__ == "__main__":
    main()
