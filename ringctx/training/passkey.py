"""Passkey: a number that is hidden in a text and asked for at its end, digit by digit.

    … The passkey is 83921. Remember it. …  …  The passkey is 83921        the last five tokens, a digit each, are the answer

Source: Mohtashami & Jaggi 2023 (Landmark Attention, arXiv 2305.16300); here among real text, so that it is nothing unusual that is found.
Knows tokens. Knows nothing of models or ranks. Letters: b sequences, S tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ringctx.errors import ConfigError

DIGITS = 5
BEFORE, AFTER = "\nThe passkey is ", ". Remember it.\n"


def plant(tokens: Tensor, tokenizer: Any, seed: int) -> tuple[Tensor, Tensor]:
    """Text (b S) -> the same with a passkey in each sequence, anywhere, and asked for at its end; and which tokens answer, bool (b S).

    Raises ConfigError where a tokenizer has no token for each digit, or a sequence is too short to hold one.
    """
    read = lambda text: torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    before, after = read(BEFORE), read(AFTER)
    digits = torch.tensor(tokenizer.convert_tokens_to_ids([str(n) for n in range(10)]))
    if len(set(digits.tolist())) != 10:
        raise ConfigError(
            "The tokenizer has no token for each digit, and passkeys are answered digit by digit; set training.passkeys to 0."
        )
    b, length = tokens.shape
    end = len(before) + DIGITS
    room = length - end - (end + len(after))
    if room < 0:
        raise ConfigError(f"A passkey and its question take {length - room} tokens, and a sequence has {length}; set context higher.")
    make = torch.Generator().manual_seed(seed)
    planted, answers = tokens.clone(), torch.zeros_like(tokens, dtype=torch.bool)
    for row in planted:
        number = digits[torch.randint(10, (DIGITS,), generator=make)]
        at = int(torch.randint(room + 1, (), generator=make))
        said = torch.cat([before, number, after])
        row[at : at + len(said)] = said
        row[length - end :] = torch.cat([before, number])
    answers[:, length - DIGITS :] = True
    return planted, answers
