"""Variables: the latest value of a name, among assignments that are out of date and tokens that mean nothing.

    b=7 . , a=3 , b=2 . a? 3 ...        assignments, one token each; noise; a question, and the latest value of its name

Selective Attention is meant for it: a new assignment makes the older one of its name unneeded.
Source: the task of the introduction of Leviathan, Kalman & Matias 2024 (arXiv 2410.02703); its form here is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringctx.config_training import VariablesConfig
from ringctx.training.labels import IGNORED


def vocabulary(task: VariablesConfig) -> list[str]:
    """The tokens, in order: beginning, questions, values, noise, assignments."""
    names, values = [f"name{n}" for n in range(task.names)], [f"value{n}" for n in range(task.values)]
    noise = [f"noise{n}" for n in range(task.noise)]
    return ["<begin>", *(f"{name}?" for name in names), *values, *noise, *(f"{name}={value}" for name in names for value in values)]


def draw(task: VariablesConfig, count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """ids and labels (count length): labels are IGNORED but at questions, where they are the value that follows."""
    make = torch.Generator().manual_seed(seed)
    texts = [_text(task, length + 1, make) for _ in range(count)]
    tokens, answers = (torch.tensor(x) for x in zip(*texts, strict=True))
    return tokens[:, :-1], torch.where(answers[:, 1:], tokens[:, 1:], IGNORED)


def ages(task: VariablesConfig, ids: Tensor, labels: Tensor) -> Tensor:
    """Of each question, how many tokens ago its name was assigned the value that is asked for, (questions,)."""
    first_assignment = 1 + task.names + task.values + task.noise
    found = []
    for line, answers in zip(ids.tolist(), labels.tolist(), strict=True):
        assigned = dict[int, int]()
        for at, (token, answer) in enumerate(zip(line, answers, strict=True)):
            if token >= first_assignment:
                assigned[(token - first_assignment) // task.values] = at
            elif answer != IGNORED:
                found.append(at - assigned[token - 1])
    return torch.tensor(found)


def _text(task: VariablesConfig, length: int, make: torch.Generator) -> tuple[list[int], list[bool]]:
    """Tokens, and which of them answer a question."""
    first_value = 1 + task.names
    first_noise = first_value + task.values
    first_assignment = first_noise + task.noise
    pick = lambda count: int(torch.randint(count, (), generator=make))
    tokens, answers, latest = [0], [False], dict[int, int]()
    while len(tokens) < length:
        name = pick(task.names)
        asks = name in latest and float(torch.rand((), generator=make)) < task.asked
        if asks:
            statement = [1 + name, first_value + latest[name]]
        else:
            latest[name] = pick(task.values)
            statement = [first_assignment + name * task.values + latest[name]]
        noise = [first_noise + pick(task.noise) for _ in range(pick(task.noise + 1))] if task.noise else []
        tokens += [*statement, *noise]
        answers += [*([False, True] if asks else [False]), *([False] * len(noise))]
    return tokens[:length], answers[:length]
