"""What must hold whatever computes it: the invariants of SLA2 on the reference and on the portable ops.

Full attention in float64 is the truth. Where a result must equal full attention, the oracle rule of the numerics
tests applies, with PyTorch's attention in the same dtype in the reference's place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sla2_compile.kernels.functional import AttentionOptions, sla2_attention
from sla2_compile.kernels.portable import tiling
from sla2_compile.kernels.reference import sla2 as reference

DTYPES = (torch.float32, torch.bfloat16)
OPTIONS = AttentionOptions(topk_ratio=0.25, compression_ratio=8, block_q=32, block_k=16)
Attention = Callable[..., Tensor]


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, *,
    key_mask: Tensor | None = None, is_causal: bool = False, alpha_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`sla2_attention` by the reference."""
    sizes, scale = options.block_sizes(q.shape[2], k.shape[2]), q.shape[3] ** -0.5
    lut, log_rest, _, k_mean = reference.route(
        q, k, None, None, key_mask, options.topk_ratio, options.router_ratio(*sizes), *sizes, scale, is_causal
    )
    return reference.attention(
        q, k, v, k_mean, lut, log_rest, None, alpha_bias, key_mask,
        *sizes, scale, options.feature_map, options.linear_scope, is_causal,
    )[0]  # fmt: skip


both = pytest.mark.parametrize("run", [reference_attention, sla2_attention], ids=["reference", "portable"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
maps = pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(
    Nq: int = 75, Nk: int = 107, Hq: int = 4, Hkv: int = 2, B: int = 2, D: int = 16, Dv: int = 24,
    seed: int = 0, dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shapes = ((B, Hq, Nq, D), (B, Hkv, Nk, D), (B, Hkv, Nk, Dv))
    q, k, v = (normal(*shape, seed=3 * seed + i, dtype=dtype) for i, shape in enumerate(shapes))
    return q, k, v


def full(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    mask = reference.visible_keys(q.shape[2], k.shape[2], key_mask, is_causal, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def plain(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Full attention in the inputs' dtype throughout, as the reference computes; SDPA keeps float32 inside."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    mask = reference.visible_keys(q.shape[2], k.shape[2], key_mask, is_causal, q.device)
    s = ((q @ k.mT) * q.shape[3] ** -0.5).masked_fill(~mask, float("-inf"))
    return torch.softmax(s, dim=-1).nan_to_num(0.0) @ v


def relative_error(o: Tensor, q: Tensor, k: Tensor, v: Tensor) -> float:
    want = full(q.double(), k.double(), v.double())
    return ((o.double() - want).norm() / want.norm()).item()


def assert_as_exact_as(low: Tensor, got: Tensor, exact: Tensor) -> None:
    """The oracle rule: at most twice the error of `low`, plus eps of the largest value."""
    assert torch.isfinite(got).all()
    err, allowed = ((x.double() - exact).abs().max().item() for x in (got, low))
    allowed = 2 * (allowed + torch.finfo(got.dtype).eps * exact.abs().max().item())
    assert err <= allowed, f"error {err:.3e}, allowed {allowed:.3e}"


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one head": {"Hq": 1, "Hkv": 1, "B": 1},
    "grouped": {"Hq": 6, "Hkv": 2},
    "one query head group": {"Hq": 4, "Hkv": 1},
    "short keys": {"Nq": 200, "Nk": 13},
    "short queries": {"Nq": 5, "Nk": 203},
    "one token": {"Nq": 1, "Nk": 1},
    "on the grid": {"Nq": 64, "Nk": 96},
}
calls = pytest.mark.parametrize("sizes", CALLS.values(), ids=CALLS.keys())


@both
@dtypes
@calls
@pytest.mark.parametrize("kind", ["full", "masked", "causal", "causal masked"])
def test_keeping_everything_is_full_attention(
    run: Attention, dtype: torch.dtype, sizes: dict[str, int], kind: str
) -> None:
    q, k, v = qkv(**sizes, dtype=dtype)
    mask = None
    if "masked" in kind:
        mask = torch.arange(k.shape[2]).expand(k.shape[0], -1) % 3 != 1
    options = AttentionOptions(topk_ratio=1.0, compression_ratio=4, block_q=32, block_k=16)
    causal = "causal" in kind
    o = run(q, k, v, options, key_mask=mask, is_causal=causal)
    exact = full(q.double(), k.double(), v.double(), mask, causal)
    low = plain if run is reference_attention else full
    assert_as_exact_as(low(q, k, v, mask, causal), o, exact)


@both
@dtypes
@maps
def test_order_of_key_blocks_is_of_no_account(run: Attention, dtype: torch.dtype, feature_map: str) -> None:
    q, k, v = qkv(Nk=112, dtype=dtype)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    options = AttentionOptions(0.3, 8, 32, 16, feature_map)
    moved_k, moved_v = (x.unflatten(2, (7, 16))[:, :, order].flatten(2, 3) for x in (k, v))
    # what the call itself is worth in this dtype, on the blocks it has chosen
    exact = run(q.double(), k.double(), v.double(), options)
    assert_as_exact_as(run(q, k, v, options), run(q, moved_k, moved_v, options), exact)


@both
@maps
def test_one_vector_added_to_every_key(run: Attention, feature_map: str) -> None:
    """Smoothing removes it: the sparse branch cannot see it, and the linear branch and the router do not."""
    q, k, v = (x.double() for x in qkv())
    options = AttentionOptions(0.3, 8, 32, 16, feature_map)
    shifted = k + 5.0 * normal(1, 1, 1, k.shape[3], seed=9).double()
    for alpha_bias in (None, torch.full((1, 1), 1e4)):
        want = run(q, k, v, options, alpha_bias=alpha_bias)
        torch.testing.assert_close(run(q, shifted, v, options, alpha_bias=alpha_bias), want)


@dtypes
def test_one_vector_added_to_every_key_costs_no_digits(dtype: torch.dtype) -> None:
    """In low precision smoothing pays: a large offset may cost what rounding the keys themselves costs, no more."""
    q, k, v = qkv(dtype=dtype)
    offset = torch.full((k.shape[3],), 8.0, dtype=dtype)
    shifted = k + offset
    rounded = shifted.double() - offset.double()
    exact = sla2_attention(q.double(), rounded, v.double(), OPTIONS)
    assert_as_exact_as(
        sla2_attention(q, rounded.to(dtype), v, OPTIONS), sla2_attention(q, shifted, v, OPTIONS), exact
    )


@both
@dtypes
def test_error_does_not_grow_with_the_share_kept(run: Attention, dtype: torch.dtype) -> None:
    errors = []
    for topk_ratio in (0.1, 0.25, 0.5, 0.75, 1.0):
        options = AttentionOptions(topk_ratio, 8, 32, 16)
        total = 0.0
        for seed in range(6):
            q, k, v = qkv(Nq=130, Nk=331, seed=seed, dtype=dtype)
            total += relative_error(run(q, k, v, options), q, k, v)
        errors.append(total / 6)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


@dtypes
@calls
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_any_shape_and_layout_gives_what_the_reference_gives(
    dtype: torch.dtype, sizes: dict[str, int], is_causal: bool
) -> None:
    q, k, v = qkv(**sizes, dtype=dtype)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    # the same choice of blocks for all: rounding in the router must not decide
    whole = torch.full((1, 1), 0.3)
    exact = reference_attention(q.double(), k.double(), v.double(), OPTIONS, is_causal=is_causal, alpha_bias=whole)
    low = reference_attention(q, k, v, OPTIONS, is_causal=is_causal, alpha_bias=whole.to(dtype))
    assert_as_exact_as(low, sla2_attention(q, k, v, OPTIONS, is_causal=is_causal, alpha_bias=whole), exact)


@pytest.mark.parametrize("first", [0, 40], ids=["all rows", "late rows"])
def test_large_scores_anywhere(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The portable sparse branch takes exp(s) as it is until a row's sum forbids it; here with a block at a time."""
    monkeypatch.setitem(tiling.TILE_ELEMENTS, "cpu", 1)
    q, k, v = qkv(dtype=torch.float64)
    q[:, :, first:] *= 300
    inputs = [[x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2)]
    # a given alpha: log_rest counts as a constant in the op only
    runs: tuple[Attention, ...] = (reference_attention, sla2_attention)
    even = torch.zeros(1, 1, dtype=torch.float64)
    want, got = (run(*x, OPTIONS, alpha_bias=even) for run, x in zip(runs, inputs, strict=True))
    torch.testing.assert_close(got, want)
    for o in (want, got):
        o.sum().backward()
    for a, b in zip(*inputs, strict=True):
        torch.testing.assert_close(b.grad, a.grad)


def hazards() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    q, k, v = qkv()
    return {
        "zero queries": (q * 0, k, v),
        "zero keys": (q, k * 0, v),
        "zero rows": (q * (torch.arange(75) % 2)[:, None], k * (torch.arange(107) % 3 > 0)[:, None], v),
        "constant": (torch.ones_like(q), torch.ones_like(k), torch.ones_like(v)),
        "one block": (q[:, :, :9], k[:, :, :9], v[:, :, :9]),
        "large": (q * 1e3, k * 1e3, v * 1e3),
        "large queries": (q * 1e3, k, v),
        "small": (q * 1e-20, k * 1e-20, v * 1e-20),
        # relu: phi(q) Z = 0 in every row
        "orthogonal": (q.abs(), -k.abs() - 1 + k.abs().amax() * (torch.arange(107) == 0)[:, None], v),
    }


@both
@dtypes
@maps
@pytest.mark.parametrize("name", list(hazards()))
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_nothing_overflows(run: Attention, dtype: torch.dtype, feature_map: str, name: str, is_causal: bool) -> None:
    q, k, v = (x.to(dtype).requires_grad_() for x in hazards()[name])
    options = AttentionOptions(0.25, 8, 32, 16, feature_map)
    o = run(q, k, v, options, is_causal=is_causal)
    assert torch.isfinite(o).all()
    # a mean of values, by any weights, lies between them
    assert o.abs().max() <= 1.01 * v.abs().max()
    if run is sla2_attention:
        o.sum().backward()
        for x in (q, k, v):
            assert x.grad is not None
            assert torch.isfinite(x.grad).all()


@both
@dtypes
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_a_row_that_sees_no_key_gives_zero(run: Attention, dtype: torch.dtype, is_causal: bool) -> None:
    q, k, v = qkv(dtype=dtype)
    mask = torch.ones(2, 107, dtype=torch.bool)
    mask[1] = False
    mask[0, :40] = False
    o = run(q, k, v, OPTIONS, key_mask=mask, is_causal=is_causal)
    assert torch.isfinite(o).all()
    assert not o[1].any()
    if is_causal:
        assert not o[0, :, :40].any()
    assert o[0, :, 40:].any()


@both
@dtypes
def test_masked_keys_leave_no_trace(run: Attention, dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype=dtype)
    mask = torch.arange(107).expand(2, -1) % 4 != 2
    noise = torch.where(mask[:, None, :, None], 0.0, 50.0).to(dtype)
    # one choice of blocks for all, alpha included: float64 must not route by other roundings
    options = AttentionOptions(1.0, 8, 32, 16, linear_scope="all")
    exact = run(q.double(), k.double(), v.double(), options, key_mask=mask)
    want, got = (run(q, k + x, v - x, options, key_mask=mask) for x in (0 * noise, noise))
    assert_as_exact_as(want, got, exact)
    # and whatever the router chooses, it chooses without them
    k64, v64 = k.double(), v.double()
    want, got = (run(q.double(), k64 + x, v64 - x, OPTIONS, key_mask=mask) for x in (0 * noise, noise))
    torch.testing.assert_close(got, want)


@both
@dtypes
def test_the_future_leaves_no_trace(run: Attention, dtype: torch.dtype) -> None:
    """Smoothing is the one exception: the mean is over all keys, and attention does not see it."""
    q, k, v = qkv(Nq=107, dtype=dtype)
    want = run(q, k, v, OPTIONS, is_causal=True)
    v = v.clone()
    v[:, :, 64:] += 50.0
    assert torch.equal(run(q, k, v, OPTIONS, is_causal=True)[:, :, :64], want[:, :, :64])


def smooth(x: Tensor, window: int) -> Tensor:
    """Average over neighbouring tokens, brought back to unit variance."""
    y = F.avg_pool1d(x.transpose(2, 3).flatten(0, 1), window, stride=1, padding=window // 2)[..., : x.shape[2]]
    return F.normalize(y.unflatten(0, x.shape[:2]).transpose(2, 3), dim=-1) * x.shape[3] ** 0.5


def data(kind: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(1, 2, 1000, 32) inputs whose attention maps look quite different."""
    q, k, v = qkv(1000, 1000, 2, 2, 1, 32, 32, seed=seed)
    if kind == "diffuse":
        return 0.3 * q, 0.3 * k, v
    if kind == "correlated":
        return k + 0.5 * q, k, k + 0.5 * v
    if kind == "smooth":
        return smooth(q, 32), smooth(k, 32), smooth(v, 32)
    # needle: every query has one key of its own, far away and among strangers
    at = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))
    return 2.0 * k[:, :, at] + 0.3 * q, 2.0 * k, v


@both
@dtypes
@pytest.mark.parametrize("kind", ["diffuse", "correlated", "smooth", "needle"])
@pytest.mark.parametrize(("topk_ratio", "compression_ratio"), [(0.05, 16), (0.15, 8), (0.25, 4)])
def test_an_untrained_call_is_no_worse_than_its_sparse_branch(
    run: Attention, dtype: torch.dtype, kind: str, topk_ratio: float, compression_ratio: int
) -> None:
    options = AttentionOptions(topk_ratio, compression_ratio)
    mixed, alone = 0.0, 0.0
    for seed in range(3):
        q, k, v = (x.to(dtype) for x in data(kind, seed))
        mixed += relative_error(run(q, k, v, options), q, k, v)
        alone += relative_error(run(q, k, v, options, alpha_bias=torch.full((1, 1), 1e4)), q, k, v)
    assert mixed <= 1.1 * alone, f"{mixed / 3:.4f} against {alone / 3:.4f} with the sparse branch alone"
