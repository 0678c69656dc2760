"""Run by torchrun, or alone: transformers' Trainer, Accelerate and PEFT with a small model; losses go to a file by rank 0."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.tiny import tiny

RANKS = int(os.environ.get("WORLD_SIZE", "1"))
MAKE = torch.Generator().manual_seed(0)
ROWS = [{"input_ids": (row := torch.randint(3, 97, (29,), generator=MAKE)), "labels": row} for _ in range(8)]


def by_trainer(folder: Path, lora: bool = False) -> list[float]:
    """Losses and gradient norms, logged at every step."""
    from transformers import Trainer, TrainingArguments

    from ringctx.embed.huggingface import RingTrainer, join

    model: Any = _lora() if lora else tiny()
    args = TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=1, num_train_epochs=1, gradient_accumulation_steps=2, use_cpu=True,
        learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, eval_strategy="epoch",
        gradient_checkpointing=RANKS > 1,
    )  # fmt: skip
    named: dict[str, Any] = {"model": model, "args": args, "train_dataset": ROWS, "eval_dataset": ROWS[:4]}
    trainer = Trainer(**named) if RANKS == 1 else RingTrainer(join(model), **named)
    trainer.train()
    return [one[name] for one in trainer.state.log_history for name in ("loss", "grad_norm", "eval_loss") if name in one]


def by_accelerate() -> list[float]:
    """Losses and gradient norms."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    from ringctx.embed.accelerate import join

    accelerator = Accelerator(cpu=True)
    model = tiny().train()
    job = join(model)
    prepared = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-3), DataLoader(ROWS, batch_size=1))  # type: ignore[arg-type]
    trained, optimizer, loader = prepared
    found = []
    for batch in job.loader(loader):
        loss = trained(**batch).loss
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found += [float(loss.detach()), float(norm)]
    return found


def _lora() -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(tiny(), config)


def main(folder: Path) -> None:
    """All of them."""
    torch.set_num_threads(1)
    found = {"trainer": by_trainer(folder), "lora": by_trainer(folder, lora=True), "accelerate": by_accelerate()}
    if not dist.is_initialized() or dist.get_rank() == 0:
        (folder / f"{RANKS}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
