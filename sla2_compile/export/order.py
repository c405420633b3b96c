"""The op `sla2::token_order` in a file: its order as constants, since a grid has one length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import onnx_opset

from sla2_compile.kernels.order import ordered, three

op: Any = onnx_opset.opset19


# the exporter reads attributes from annotations, and everything without one is a tensor
def token_order(  # noqa: ANN201
    like,  # noqa: ANN001
    grid: Sequence[int], order: str, brick: Sequence[int], unit: int, before: int, after: int, fill: bool,
):  # fmt: skip
    """The places of tokens, and the tokens of places; see `order.ordered`."""
    made = ordered(three(grid), order, three(brick), unit, before, after, torch.device("cpu"), bool(fill))
    real = torch.zeros(0, dtype=torch.bool) if made.real is None else made.real
    return tuple(op.Constant(value=ir.tensor(x.numpy())) for x in (made.index, made.back, real))
