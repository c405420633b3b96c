"""The ONNX node `sla2::attention`: its schema, and how the op `sla2::forward` becomes one."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch

from sla2_compile.export.config import INPUTS, BodyConfig
from sla2_compile.export.fake_quant import fake_quant
from sla2_compile.export.order import token_order
from sla2_compile.export.products_int8 import int_mm

DOMAIN, NAME, VERSION = "sla2", "attention", 1

ATTRIBUTES = {
    "topk_num": ir.AttributeType.INT,
    "topk_den": ir.AttributeType.INT,
    "compression_ratio": ir.AttributeType.INT,
    "block_q": ir.AttributeType.INT,
    "block_k": ir.AttributeType.INT,
    "scale": ir.AttributeType.FLOAT,
    "feature_map": ir.AttributeType.STRING,
    "linear_scope": ir.AttributeType.STRING,
    "is_causal": ir.AttributeType.INT,
    "low_bit": ir.AttributeType.STRING,
}
"""Attributes of the node; `BodyConfig` says what they mean."""

FLOATS = ("tensor(float)", "tensor(float16)")


def schema() -> onnx.defs.OpSchema:
    """The schema of the node. It is never registered: onnxscript takes it as it is."""
    S = onnx.defs.OpSchema
    option = S.FormalParameterOption
    inputs = [S.FormalParameter(name, "T", "", param_option=option.Single) for name in INPUTS[:3]]
    inputs += [S.FormalParameter(name, "P", "", param_option=option.Optional) for name in INPUTS[3:7]]
    inputs.append(S.FormalParameter("key_mask", "M", "", param_option=option.Optional))
    attributes = [
        S.Attribute(name, getattr(S.AttrType, kind.name), "", required=False) for name, kind in ATTRIBUTES.items()
    ]
    return S(
        NAME, DOMAIN, VERSION, "SLA2 attention (arXiv 2602.12675)",
        inputs=inputs, outputs=[S.FormalParameter("o", "T", "")], attributes=attributes,
        type_constraints=[("T", FLOATS, ""), ("P", FLOATS, ""), ("M", ["tensor(bool)"], "")],
    )  # fmt: skip


def share_of(topk_ratio: float) -> Fraction:
    """A ratio as a fraction of small numbers; 0.15 is 3/20."""
    return Fraction(topk_ratio).limit_denominator(10_000)


def translation_table(low_bit: str | None) -> dict[Any, Callable[..., Any]]:
    """What `torch.onnx.export` needs to know of the ops `sla2::*`, and of one of torch's.

    Args:
        low_bit: format of the nodes, one of `BodyConfig`; None takes each op's.
    """
    node = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, VERSION), NAME, schema())
    asked = low_bit

    # the exporter reads attributes from annotations, and everything without one is a tensor
    def forward(  # noqa: ANN202
        q, k, v, proj_q, proj_k, alpha_gain, alpha_bias, key_mask,  # noqa: ANN001
        topk_ratio: float, compression_ratio: int,
        block_q: int, block_k: int, scale: float, feature_map: str, linear_scope: str, is_causal: bool, low_bit: str,
    ):  # fmt: skip
        share = share_of(topk_ratio)
        return node(
            q, k, v, proj_q, proj_k, alpha_gain, alpha_bias, key_mask,
            topk_num=share.numerator, topk_den=share.denominator, compression_ratio=compression_ratio,
            block_q=block_q, block_k=block_k, scale=scale, feature_map=feature_map, linear_scope=linear_scope,
            is_causal=int(is_causal), low_bit=low_bit if asked is None else asked,
        )  # fmt: skip

    return {
        torch.ops.sla2.forward.default: forward,
        torch.ops.sla2.fake_quant.default: fake_quant,
        torch.ops.sla2.token_order.default: token_order,
        torch.ops.aten._int_mm.default: int_mm,
    }


def sizes(x: ir.Value) -> tuple[Any, ...]:
    """The shape of a value, which the op's fake gave it: numbers and symbols."""
    assert x.shape is not None
    return tuple(x.shape)


def config_of(node: ir.Node, scan: bool) -> BodyConfig:
    """Read the constants of a node from its attributes and the shapes of its inputs."""
    read = {name: node.attributes[name].value for name in ATTRIBUTES}
    read["is_causal"] = bool(read["is_causal"])
    q, k, v = (x for x in node.inputs[:3] if x is not None)
    given = tuple(name for name, x in zip(INPUTS, node.inputs, strict=False) if x is not None)

    def whole(n: Any, block: int) -> bool:
        return isinstance(n, int) and n % block == 0

    (_, Hq, Nq, D), (_, Hkv, Nk, _), (*_, Dv) = (sizes(x) for x in (q, k, v))
    assert q.dtype is not None
    return BodyConfig(
        Hq, Hkv, D, Dv, **read, given=given, whole_q=whole(Nq, read["block_q"]), whole_k=whole(Nk, read["block_k"]),
        scan=scan, dtype=q.dtype.name,
    )  # fmt: skip
