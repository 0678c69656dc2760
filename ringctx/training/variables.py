"""Variables: the latest value of a name, among assignments that are out of date and tokens that mean nothing.

    b 7 . , a 3 , b 2 . a ? 3 ...        a name and its value; noise; a name, a question mark, and its latest value

Selective Attention is meant for it: a new assignment makes the older one of its name unneeded.
Source: the task of the introduction of Leviathan, Kalman & Matias 2024 (arXiv 2410.02703); its form here is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringctx.config_training import VariablesConfig
from ringctx.training.batch import IGNORED

ASK = 1
"""The question mark; 0 begins every text."""


def vocabulary(task: VariablesConfig) -> list[str]:
    """The tokens, in order: beginning, question mark, names, values, noise."""
    named = [f"{kind}{n}" for kind, count in (("name", task.names), ("value", task.values), ("noise", task.noise)) for n in range(count)]
    return ["<begin>", "?", *named]


def draw(task: VariablesConfig, count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """ids and labels (count length): labels are IGNORED but at question marks, where they are the value that follows."""
    make = torch.Generator().manual_seed(seed)
    texts = [_text(task, length + 1, make) for _ in range(count)]
    tokens, answers = (torch.tensor(x) for x in zip(*texts, strict=True))
    return tokens[:, :-1], torch.where(answers[:, 1:], tokens[:, 1:], IGNORED)


def _text(task: VariablesConfig, length: int, make: torch.Generator) -> tuple[list[int], list[bool]]:
    """Tokens, and which of them answer a question."""
    first_value = 2 + task.names
    first_noise = first_value + task.values
    pick = lambda count: int(torch.randint(count, (), generator=make))
    tokens, answers, latest = [0], [False], dict[int, int]()
    while len(tokens) < length:
        name = pick(task.names)
        if name in latest and float(torch.rand((), generator=make)) < task.asked:
            statement = [2 + name, ASK, latest[name]]
        else:
            latest[name] = first_value + pick(task.values)
            statement = [2 + name, latest[name]]
        noise = [first_noise + pick(task.noise) for _ in range(pick(task.noise + 1))] if task.noise else []
        tokens += [*statement, *noise]
        answers += [False] * (len(statement) - 1) + [len(statement) == 3] + [False] * len(noise)
    return tokens[:length], answers[:length]
