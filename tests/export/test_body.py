"""The body of `sla2::attention` computes what the op does, in stock onnxruntime, at any batch and length."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx
import pytest
import torch

from sla2_compile.export.config import INPUTS
from tests.export.one_node import BASE, LEARNED, error, inputs_of, model_of, run, session, wanted

CASES = {
    "learned": BASE,
    "nothing learned": replace(BASE, given=INPUTS[:3]),
    "one token a block": replace(BASE, compression_ratio=64),
    "r 16, 5 %": replace(BASE, topk_num=1, topk_den=20, compression_ratio=16),
    "r 4, 25 %": replace(BASE, topk_num=1, topk_den=4, compression_ratio=4),
    "everything": replace(BASE, topk_num=1, topk_den=1),
    "blocks 128 x 64": replace(BASE, block_q=128, block_k=64, D=64, Dv=64),
    "blocks 32 x 16": replace(BASE, block_q=32, block_k=16),
    "grouped heads": replace(BASE, Hq=6, Hkv=2),
    "Dv 24": replace(BASE, Dv=24),
    "elu": replace(BASE, feature_map="elu"),
    "relu": replace(BASE, feature_map="relu"),
    "all keys": replace(BASE, linear_scope="all"),
    "scale 1": replace(BASE, scale=1.0),
    "bias of heads": replace(BASE, given=(*INPUTS[:5], "alpha_bias")),
    "bias alone": replace(BASE, given=(*INPUTS[:3], "alpha_bias")),
    "key mask": replace(BASE, given=INPUTS),
    "key mask alone": replace(BASE, given=(*INPUTS[:3], "key_mask")),
    "key mask, grouped": replace(BASE, Hkv=2, given=INPUTS),
    "causal": replace(BASE, is_causal=True),
    "causal, key mask": replace(BASE, is_causal=True, given=INPUTS),
    "causal, everything": replace(BASE, is_causal=True, topk_num=1, topk_den=1),
    "whole blocks": replace(BASE, whole_q=True, whole_k=True),
    "whole blocks, key mask": replace(BASE, whole_q=True, whole_k=True, given=INPUTS),
    "at once": replace(BASE, scan=False),
    "at once, causal, key mask": replace(BASE, scan=False, is_causal=True, given=INPUTS),
    "five heads": replace(BASE, Hq=5, Hkv=5),
    "half": replace(BASE, dtype="FLOAT16"),
}
LENGTHS = [(1, 128, 128), (2, 256, 512)]
RAGGED = [(3, 333, 333), (1, 129, 65), (2, 100, 40)]


@pytest.mark.parametrize("name", CASES)
def test_gives_what_the_op_gives(name: str) -> None:
    c = CASES[name]
    model = model_of(c)
    onnx.checker.check_model(model, full_check=True)
    loaded = session(model)
    for B, Nq, Nk in LENGTHS if c.whole_q else LENGTHS + RAGGED:
        x = inputs_of(c, B, Nq, Nk)
        assert error(run(loaded, x), wanted(c, x)) < (1e-3 if c.dtype == "FLOAT16" else 3e-6), (B, Nq, Nk)


def test_a_bias_of_blocks() -> None:
    c = replace(BASE, given=(*INPUTS[:5], "alpha_bias"))
    x = inputs_of(c, 2, 700, 700, bias=(1, 11))
    assert error(run(session(model_of(c)), x), wanted(c, x)) < 3e-6


INT8: dict[str, Any] = {
    "plain": {},
    "key mask": {"given": INPUTS},
    "causal": {"is_causal": True},
    "causal, key mask": {"is_causal": True, "given": INPUTS},
    "whole blocks": {"whole_q": True, "whole_k": True},
    "at once": {"scan": False},
    "grouped": {"Hq": 6, "Hkv": 2, "Dv": 24},
}


@pytest.mark.parametrize("low_bit", ["int8", "int8_int8", "int8_fp8"])
@pytest.mark.parametrize("name", INT8)
def test_int8_is_close(name: str, low_bit: str) -> None:
    c = replace(BASE, low_bit=low_bit, **INT8[name])
    model = model_of(c)
    onnx.checker.check_model(model, full_check=True)
    loaded = session(model)
    for B, Nq, Nk in LENGTHS if c.whole_q else LENGTHS + RAGGED:
        x = inputs_of(c, B, Nq, Nk)
        off = error(run(loaded, x), wanted(c, x))
        assert 1e-3 < off < 0.05, (B, Nq, Nk, off)


@pytest.mark.parametrize("low_bit", ["int8", "int8_fp8"])
@pytest.mark.parametrize("masked", [False, True])
def test_low_bit_is_that_of_qat(masked: bool, low_bit: str) -> None:
    """A model that was trained with `prepare` keeps its numerics."""
    c = replace(BASE, low_bit=low_bit, given=INPUTS if masked else LEARNED)
    x = inputs_of(c, 2, 333, 333)
    from sla2_compile.kernels.ops import forward

    learned = [x.get(name) for name in INPUTS[3:]]
    options: Any = (0.15, 8, 64, 32, 0.2, "softmax", "complement", False, low_bit)
    with torch.no_grad():
        want = forward(x["q"], x["k"], x["v"], *learned, *options).double()
    assert error(run(session(model_of(c)), x), want) < 1e-4


@pytest.mark.parametrize("opset", [19, 21, 23, 26])
def test_opsets(opset: int) -> None:
    x = inputs_of(BASE, 1, 200, 300)
    assert error(run(session(model_of(BASE, opset)), x), wanted(BASE, x)) < 3e-6
