"""A backward whose forward was in low bit takes the scores that the forward had, in blocked PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sla2_compile.kernels.arguments import AttentionArgs, BackwardArgs, BackwardResult, Saved, accumulation_dtype
from sla2_compile.kernels.ops import attention_backward
from sla2_compile.kernels.portable.backward import rounded_tiles
from sla2_compile.kernels.portable.tiling import Scratch, cut
from sla2_compile.kernels.records import flat
from sla2_compile.kernels.reference import low_bit as formats
from tests.kernels import fake_quant
from tests.kernels.plain_case import PlainCase

CASES = {
    "plain": PlainCase(),
    "grouped, ragged, masked": PlainCase(groups=2, masked=True, topk_ratio=0.5),
    "causal": PlainCase(is_causal=True, Nq=203),
    "elu, all keys, alpha of blocks": PlainCase(feature_map="elu", linear_scope="all", alpha="block"),
    "bias alone": PlainCase(alpha="head", topk_ratio=1.0),
    "large values": PlainCase(size=20.0),
}


def gradient_of(call: AttentionArgs[Tensor]) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(*call.q.shape[:3], call.v.shape[3], generator=g, dtype=torch.float64).to(call.q.dtype)


def gradients(call: AttentionArgs[Tensor], do: Tensor) -> dict[str, Tensor]:
    """By the op, from o and lse as the fake-quantised reference has them."""
    acc = accumulation_dtype(call.q.dtype)
    o, lse = fake_quant.attention(fake_quant.in_float64(call))
    args = BackwardArgs(do.to(call.q.dtype), Saved(o.to(call.q.dtype), lse.to(acc), call))
    made = BackwardResult(*attention_backward(*flat(args)))
    return dict(zip(fake_quant.NAMES, made, strict=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("low_bit", ["int8", "int8_fp8"])
def test_gradients_are_those_of_the_fake_quantised_reference(name: str, low_bit: str) -> None:
    call = CASES[name].call(torch.float64)._replace(low_bit=low_bit)
    do = gradient_of(call)
    got, want = gradients(call, do), fake_quant.gradients(call, do)
    # that of k_mean is the sum of k's, which may cancel
    sizes = {"k_mean": want["k"].abs().sum(dim=2).max()}
    for part, exactly in want.items():
        assert (got[part] - exactly).abs().max() <= 1e-9 * sizes.get(part, exactly.abs().max()), part


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low_bit", ["int8", "int8_fp8"])
def test_every_dtype_keeps_direction_and_size(low_bit: str, dtype: torch.dtype) -> None:
    call = CASES["plain"].call(dtype)._replace(low_bit=low_bit)
    do = gradient_of(call)
    got, want = gradients(call, do), fake_quant.gradients(call, do)
    for part in ("q", "k", "v"):
        cosine, size = fake_quant.likeness(got[part], want[part])
        assert cosine >= 0.9999, part
        assert abs(size - 1) < 0.01, part


def test_scores_in_the_inputs_dtype_would_give_other_gradients() -> None:
    """So that the tests above can fail: what the saved format changes is far above their tolerance."""
    call = CASES["large values"].call(torch.float64)
    do = torch.ones(*call.q.shape[:3], call.v.shape[3], dtype=torch.float64)
    want = fake_quant.gradients(call._replace(low_bit="int8"), do)
    wide = fake_quant.attention(call._replace(low_bit="int8"))
    made = BackwardResult(*attention_backward(*flat(BackwardArgs(do, Saved(*wide, call)))))
    cosine, _ = fake_quant.likeness(made.dq, want["q"])
    assert cosine < 0.9999


@pytest.mark.parametrize("low_bit", ["int8", "int8_fp8"])
def test_rows_of_ds_add_up(low_bit: str) -> None:
    """With all keys selected and alpha a constant, a constant added to all keys moves nothing: dk adds up to 0.

    In int8_fp8 o is not the product of P and v, and its rowsum(dO * O) would miss that.
    """
    call = PlainCase(alpha="head", topk_ratio=1.0).call(torch.float64)._replace(low_bit=low_bit)
    do = gradient_of(call)
    got = gradients(call, do)
    assert got["k"].sum(dim=2).abs().max() < 1e-9 * got["k"].abs().sum(dim=2).max()
    assert got["k_mean"].abs().max() < 1e-9 * got["k"].abs().sum(dim=2).max()


def test_quantised_tiles_are_the_references() -> None:
    case = PlainCase(masked=True, Nk=107)
    call = case.call(torch.float32)._replace(low_bit="int8")
    scratch = Scratch(torch.device("cpu"))
    tiles = cut(call, slice(0, 1), slice(0, 2), slice(0, 2), scratch)
    got = rounded_tiles(tiles)
    q8, q_scale = formats.to_int8(call.q, (-1,))
    k8, k_scale = formats.quantise_keys(call.k - call.k_mean[:, :, None], call.key_mask, case.block_k)
    assert torch.equal(got.q.view(1, 2, -1, case.D)[:, :, : case.Nq], q8 * q_scale)
    assert torch.equal(got.k.view(k8.shape), k8 * k_scale[..., None, None])
