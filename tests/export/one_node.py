"""A model of one `sla2::attention` node with dynamic batch and lengths, its inputs, and what it must give."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from sla2_compile.export.body.function import attention_function
from sla2_compile.export.config import INPUTS, BodyConfig
from sla2_compile.export.node import ATTRIBUTES, DOMAIN, NAME
from sla2_compile.kernels.functional import AttentionOptions, sla2_attention

LEARNED = INPUTS[:7]
BASE = BodyConfig(4, 4, 32, 32, 3, 20, 8, 64, 32, 0.2, given=LEARNED)
DTYPES = {"FLOAT": torch.float32, "FLOAT16": torch.float16}


def model_of(c: BodyConfig, opset: int = 20) -> onnx.ModelProto:
    h, T = onnx.helper, onnx.TensorProto
    float_type = getattr(T, c.dtype)
    shapes: dict[str, list[Any]] = {
        "q": ["B", c.Hq, "N", c.D], "k": ["B", c.Hkv, "M", c.D], "v": ["B", c.Hkv, "M", c.Dv],
        "proj_q": [c.D, c.D], "proj_k": [c.D, c.D], "alpha_gain": [c.Hq], "alpha_bias": ["heads", "blocks"],
        "key_mask": ["B", "M"],
    }  # fmt: skip
    given = [name for name in INPUTS if name in c.given]
    inputs = [
        h.make_tensor_value_info(name, T.BOOL if name == "key_mask" else float_type, shapes[name]) for name in given
    ]
    names = [name if name in c.given else "" for name in INPUTS]
    while not names[-1]:
        names.pop()
    attributes: dict[str, Any] = {
        name: int(x) if isinstance(x := getattr(c, name), bool) else x for name in ATTRIBUTES
    }
    node = h.make_node(NAME, names, ["o"], domain=DOMAIN, name="site", **attributes)
    out = h.make_tensor_value_info("o", float_type, ["B", c.Hq, "N", c.Dv])
    return h.make_model(
        h.make_graph([node], "graph", inputs, [out]),
        opset_imports=[h.make_opsetid("", opset), h.make_opsetid(DOMAIN, 1)],
        ir_version=10,
        functions=[ir.to_proto(attention_function(c, opset))],
    )


def session(model: onnx.ModelProto | str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    what = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(what, options, providers=["CPUExecutionProvider"])


def inputs_of(c: BodyConfig, B: int, Nq: int, Nk: int, bias: tuple[int, int] | None = None) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    mask = torch.rand(B, Nk, generator=g) > 0.3
    # whole blocks are hidden
    mask[0, Nk // 2 :] = False
    x = {
        "q": normal(B, c.Hq, Nq, c.D),
        "k": normal(B, c.Hkv, Nk, c.D) + normal(1, c.Hkv, 1, c.D),
        "v": normal(B, c.Hkv, Nk, c.Dv),
        "proj_q": torch.eye(c.D) + 0.05 * normal(c.D, c.D),
        "proj_k": torch.eye(c.D) + 0.05 * normal(c.D, c.D),
        "alpha_gain": 1 + 0.2 * normal(c.Hq),
        "alpha_bias": 0.3 * normal(*(bias or (c.Hq, 1))),
        "key_mask": mask,
    }
    dtype = DTYPES[c.dtype]
    return {name: y.to(dtype) if y.is_floating_point() else y for name, y in x.items() if name in c.given}


def run(loaded: Any, x: dict[str, Tensor]) -> Tensor:
    (made,) = loaded.run(None, {name: y.numpy() for name, y in x.items()})
    return torch.from_numpy(np.asarray(made)).double()


def wanted(c: BodyConfig, x: dict[str, Tensor]) -> Tensor:
    """What the project's own op gives in float64, in the input's precision."""
    options = AttentionOptions(
        c.topk_num / c.topk_den, c.compression_ratio, c.block_q, c.block_k, c.feature_map, c.linear_scope
    )
    wide = {name: y.double() if y.is_floating_point() else y for name, y in x.items()}
    q, k, v, *_ = wide.values()
    rest = {name: y for name, y in wide.items() if name not in "qkv"}
    with torch.no_grad():
        return sla2_attention(q, k, v, options, is_causal=c.is_causal, scale=c.scale, **rest)  # type: ignore[arg-type]


def error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()
