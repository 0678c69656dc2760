"""Fine-tune a causal language model on a text with DeepSpeed; each sequence over all ranks. `finetune.py` is the same without ringctx."""

import argparse
import json
from pathlib import Path

import deepspeed
import torch
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer

from ringctx.embed.deepspeed import join


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--deepspeed_config", type=Path, required=True)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--local_rank", type=int, default=0)
    asked = parser.parse_args()

    deepspeed.init_distributed()
    torch.manual_seed(0)
    tokenizer, model = AutoTokenizer.from_pretrained(asked.model), AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)
    tokens = torch.tensor(tokenizer(asked.text.read_text()).input_ids)
    rows = [{"input_ids": row, "labels": row} for row in tokens.split(asked.length) if len(row) == asked.length]

    config = json.loads(asked.deepspeed_config.read_text())
    job = join(model)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config, mpu=job.mpu)
    loader = DataLoader(rows, batch_size=engine.train_micro_batch_size_per_gpu(), sampler=DistributedSampler(rows, shuffle=False))
    losses = []
    while engine.global_steps < asked.steps:
        for batch in job.loader(loader):
            batch = {name: x.to(engine.device) for name, x in batch.items()}
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
            if engine.global_steps == asked.steps:
                break
    engine.save_checkpoint(str(asked.out))
    if engine.global_rank == 0:
        (asked.out / "losses.json").write_text(json.dumps(losses))
        print(f"{len(losses)} batches, loss {losses[0]:.4f} to {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
