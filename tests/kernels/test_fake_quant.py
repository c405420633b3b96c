"""8 bits on any device: the op `sla2::fake_quant`, and the sparse branch in low bit without a kernel for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sla2_compile.kernels.ops import attention, forward, route
from sla2_compile.kernels.quantise import fake_quant
from sla2_compile.kernels.reference import low_bit as reference_low_bit
from sla2_compile.kernels.reference import sla2 as reference
from tests.kernels.oracle import assert_oracle
from tests.kernels.test_numerics import LOW, Case, cases, cast, examples, multiplying, shared_route

LEVELS = ("int8", "int8_fp8")


@examples(60)
@given(cases(), st.sampled_from(LEVELS), st.sampled_from(LOW), st.booleans())
def test_attention_in_low_bit_by_the_oracle(case: Case, low_bit: str, dtype: torch.dtype, native: bool) -> None:
    x = shared_route(case, dtype)
    want = case.attention(x, reference.attention, low_bit)
    low = case.attention(cast(x, dtype), reference.attention, low_bit)
    handed = cast(x, dtype) | {name: x[name].float() for name in ("log_rest", "k_mean")}
    with multiplying(native):
        got = case.attention(handed, attention, low_bit)
    for name, n in (("o", 0), ("lse", 1)):
        assert_oracle(name, got[n], low[n], want[n], torch.finfo(dtype).eps)


@examples(60)
@given(cases(), st.sampled_from(LEVELS))
def test_attention_in_low_bit_in_float64(case: Case, low_bit: str) -> None:
    x = shared_route(case, torch.float64)
    got, want = case.attention(x, attention, low_bit), case.attention(x, reference.attention, low_bit)
    for a, b in zip(got, want, strict=False):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("low_bit", LEVELS)
def test_forward_is_route_and_attention_in_low_bit(low_bit: str) -> None:
    case = Case(masked=True)
    x = cast(case.tensors(), torch.float32)
    x["lut"], x["log_rest"], _, x["k_mean"] = case.route(x, route)
    o, _ = case.attention(x, attention, low_bit)
    assert torch.equal(case.forward(x, forward, low_bit), o)
    assert not torch.equal(case.forward(x, forward), o)


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x + 3.0).to(dtype)


def test_rounds_as_the_reference_does() -> None:
    x, real = tokens(2, 3, 75, 40), torch.rand(2, 75, generator=torch.Generator().manual_seed(1)) < 0.8
    values, scale = reference_low_bit.to_int8(x, (-1,))
    assert torch.equal(fake_quant(x, 1), values * scale)
    counted = (x * real[:, None, :, None]).sum(2, keepdim=True) / real.sum(1)[:, None, None, None]
    k8, k_scale = reference_low_bit.quantise_keys(x - counted, real, 32)
    keys = (k8 * k_scale[..., None, None]).flatten(2, 3)[:, :, :75] + counted
    seen = real[:, None, :, None]
    made = fake_quant(x, 32, smooth=True, key_mask=real)
    torch.testing.assert_close(made * seen, keys * seen, rtol=0.0, atol=1e-5)
    assert torch.equal(made.masked_fill(seen, 0.0), x.masked_fill(seen, 0.0))
    v8, v_log = reference_low_bit.quantise_values(x, real, 32)
    values = (v8.float() * v_log.exp2()[..., None, None]).flatten(2, 3)[:, :, :75]
    made = fake_quant(x, 32, "e4m3", key_mask=real)
    torch.testing.assert_close(made * seen, values, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("format", ["int8", "e4m3"])
@pytest.mark.parametrize("rows", [1, 7, 32, 200])
def test_a_second_rounding_changes_nothing(format: str, rows: int) -> None:
    once = fake_quant(tokens(1, 2, 75, 16), rows, format)
    torch.testing.assert_close(fake_quant(once, rows, format), once, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("format", ["int8", "e4m3"])
def test_zeros_huge_and_tiny_numbers_stay_finite(format: str) -> None:
    """Numbers below the least scale become zeros."""
    for size in (0.0, 1e-30, 1e-9, 1e24):
        x = tokens(1, 1, 20, 8) * size
        made = fake_quant(x, 4, format)
        assert made.isfinite().all()
        assert (made - x).abs().max() <= (x.abs().max() / 15 if size > 1e-20 else size * 10)


def masked(x: Tensor) -> Tensor:
    return torch.arange(x.shape[2]).expand(x.shape[0], -1) < x.shape[2] - 5


CALLS: dict[str, dict[str, Any]] = {
    "rows": {"rows": 1, "format": "int8"},
    "keys": {"rows": 16, "format": "int8", "smooth": True},
    "values": {"rows": 16, "format": "e4m3"},
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_passes_opcheck(name: str, dtype: torch.dtype) -> None:
    x = tokens(2, 3, 40, 8, dtype=dtype)
    for given_x in (x, x.transpose(1, 2), x.clone().requires_grad_()):
        for mask in (None, masked(given_x)):
            args = (given_x, *CALLS[name].values())
            torch.library.opcheck(torch.ops.sla2.fake_quant.default, args, {"key_mask": mask})


@pytest.mark.parametrize("name", CALLS)
def test_the_gradient_passes_straight_through(name: str) -> None:
    x = tokens(2, 3, 40, 8).requires_grad_()
    weight = tokens(2, 3, 40, 8, seed=1)
    (fake_quant(x, **CALLS[name]) * weight).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weight)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(8) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return fake_quant(x @ self.weight, 16, smooth=True).square()


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_the_gradient_survives_export(strict: bool, decomposed: bool) -> None:
    net, x = Net(), tokens(2, 3, 40, 8)
    tokens_dim = torch.export.Dim.DYNAMIC
    program = torch.export.export(net, (x,), dynamic_shapes=({2: tokens_dim},), strict=strict)
    program = program.run_decompositions() if decomposed else program
    longer = tokens(2, 3, 51, 8)
    for given_x in (x, longer):
        wanted = []
        for model in (net, program.module()):
            made = model(given_x)
            (grad,) = torch.autograd.grad(made.sum(), [dict(model.named_parameters())["weight"]])
            wanted += [made, grad]
        assert torch.equal(wanted[0], wanted[2])
        torch.testing.assert_close(wanted[1], wanted[3])
    nodes = [node for node in program.graph.nodes if node.target is torch.ops.sla2.fake_quant.default]
    assert len(nodes) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(3, 4), 1), r"x must have shape \(batch, heads, tokens, head_dim\), got \(3, 4\)"),
        ((torch.zeros(1, 1, 2, 3, dtype=torch.int8), 1), "x must be floating point, got torch.int8"),
        ((torch.zeros(1, 1, 2, 3), 0), "rows must be at least 1, got 0; q takes 1 and k takes block_k"),
        ((torch.zeros(1, 1, 2, 3), 1, "int4"), "format must be one of int8, e4m3, got 'int4'"),
    ],
)
def test_what_does_not_fit_is_refused(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fake_quant(*args)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantize_and_back_is_fake_quant(name: str, dtype: torch.dtype) -> None:
    x = tokens(2, 3, 40, 8, dtype=dtype)
    for mask in (None, masked(x)):
        args = tuple(CALLS[name].values())
        # opcheck's schema test multiplies every output, which PyTorch cannot do in FP8
        checks = ("test_faketensor", "test_aot_dispatch_static", *(() if name == "values" else ("test_schema",)))
        torch.library.opcheck(torch.ops.sla2.quantize.default, (x, *args), {"key_mask": mask}, test_utils=checks)
        values, scale, mean = torch.ops.sla2.quantize(x, *args, key_mask=mask)
        assert values.dtype in (torch.int8, torch.float8_e4m3fn)
        back = (values, scale, mean, CALLS[name]["rows"], x)
        torch.library.opcheck(torch.ops.sla2.dequantize.default, back, test_utils=checks)
        made, want = torch.ops.sla2.dequantize(*back), fake_quant(x, **CALLS[name], key_mask=mask)
        seen = slice(None) if mask is None else slice(0, 35)
        torch.testing.assert_close(made[:, :, seen], want[:, :, seen], rtol=1e-5, atol=1e-5)
