"""Which kernel is chosen, what is logged, and every refusal's sentence."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from ringctx.errors import ConfigError, Unsupported
from ringctx.kernels import Call, choose, names
from ringctx.kernels.native import Native

CALL = Call(device="cpu", dtype=torch.float32, h=4, g=2, d=32, e=32)


def test_auto_takes_the_fastest_that_is_exact():
    here = "sdpa" if Native().why_not(CALL) else "native"
    assert choose(CALL).name == here
    assert choose(dataclasses.replace(CALL, mask=True, bias=True, backward=True)).name == here
    assert choose(dataclasses.replace(CALL, dtype=torch.float64)).name == "sdpa"
    for hard in ("elementwise", "bias_grad", "dropout"):
        assert choose(dataclasses.replace(CALL, **{hard: True})).name == "reference"
    assert choose(CALL, "precise").name == "precise"
    assert names() == ("auto", "flash", "native", "sdpa", "triton", "reference", "precise")


def test_the_choice_is_logged_once_with_the_reasons_of_the_better_ones(caplog):
    choose.cache_clear()
    with caplog.at_level(logging.INFO, "ringctx.kernels"):
        choose(dataclasses.replace(CALL, dropout=True))
        choose(dataclasses.replace(CALL, dropout=True))
    (record,) = caplog.records
    for part in (
        "reference computes float32 on cpu",
        "flash: needs CUDA",
        "sdpa: aten's flash kernel draws its own dropout",
        "triton: ",
    ):
        assert part in record.getMessage()


@pytest.mark.parametrize(
    "name, change, reason",
    [
        ("flash", {}, "flash: needs CUDA"),
        ("native", {"dtype": torch.float64}, "native: computes bfloat16 and float32 only"),
        ("native", {"dtype": torch.bfloat16, "dropout": True}, "native: knows no dropout"),
        ("sdpa", {"elementwise": True}, "sdpa: aten's flash kernel has no elementwise scores"),
        ("sdpa", {"bias_grad": True}, "sdpa: aten's flash kernel has no gradient of a bias"),
        ("precise", {"dropout": True}, "precise: aten's flash kernel draws its own dropout and cannot take a given one"),
        ("sdpa", {"device": "mps"}, "sdpa: aten has no flash kernel for mps"),
        ("sdpa", {"device": "cuda", "mask": True}, "sdpa: aten's CUDA flash kernel takes neither mask nor bias"),
        ("sdpa", {"device": "cuda"}, "sdpa: aten's CUDA flash kernel computes bfloat16 and float16 only"),
        ("sdpa", {"device": "cuda", "dtype": torch.bfloat16, "e": 264}, "at most 256 wide"),
        ("sdpa", {"dtype": torch.int32}, "float64, float32, bfloat16 and float16 only"),
        ("flash", {"device": "cuda"}, "flash: computes bfloat16 and float16 only"),
        ("flash", {"device": "cuda", "dtype": torch.bfloat16, "bias_grad": True}, "flash: has no bias grad here"),
        ("flash", {"device": "cuda", "dtype": torch.bfloat16, "dropout": True}, "flash: draws its own dropout"),
        ("flash", {"device": "cuda", "dtype": torch.bfloat16}, r"flash: not installed \(pip install ringctx\[flash\]\)"),
        ("triton", {"device": "cuda", "elementwise": True}, "triton: has no elementwise scores here"),
        ("triton", {"device": "cuda", "d": 264}, "triton: is at most 256 wide"),
        ("reference", {"dtype": torch.float8_e4m3fn}, "reference: it computes float64"),
    ],
)
def test_every_refusal_says_why_and_what_to_do(name, change, reason):
    call = dataclasses.replace(CALL, **change)
    with pytest.raises(Unsupported, match=reason) as caught:
        choose(call, name)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"no kernel for {call}"
    assert lines[-1].startswith(("  Use kernel=", "  Cast"))


def test_auto_lists_every_refusal():
    with pytest.raises(Unsupported) as caught:
        choose(dataclasses.replace(CALL, dtype=torch.int32))
    told = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:-1]]
    assert told == ["flash", "native", "sdpa", "triton", "reference"]


def test_a_misspelt_kernel_gets_the_nearest_name():
    with pytest.raises(ConfigError, match="no kernel 'spda'.* Did you mean 'sdpa'"):
        choose(CALL, "spda")
    with pytest.raises(ConfigError, match="Leave it at 'auto'"):
        choose(CALL, "zzz")
