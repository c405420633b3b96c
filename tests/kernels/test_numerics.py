"""The portable implementation computes what the reference defines: float64 tight, low precision by one oracle rule.

err(portable, fp64) <= 2 * (err(reference in portable's dtype, fp64) + eps * max|fp64|)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sla2_compile.kernels.blocks import router_tokens
from sla2_compile.kernels.functional import AttentionOptions, sla2_attention
from sla2_compile.kernels.ops import attention, route
from sla2_compile.kernels.portable import route as portable_route
from sla2_compile.kernels.portable import tiling
from sla2_compile.kernels.reference import sla2 as reference
from tests.kernels.oracle import CallArguments, assert_oracle

LOW = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case(CallArguments):
    """One attention call; lengths lie off the block grid."""

    B: int = 2
    heads: int = 2
    groups: int = 2
    Nq: int = 75
    Nk: int = 107
    D: int = 16
    Dv: int = 24
    block_q: int = 32
    block_k: int = 16
    topk_ratio: float = 0.3
    compression_ratio: int = 8
    is_causal: bool = False
    masked: bool = False
    feature_map: str = "softmax"
    linear_scope: str = "complement"
    alpha: str = "routed"
    projected: bool = True
    seed: int = 0

    def tensors(self) -> dict[str, Any]:
        """float64 inputs; keys carry an offset that smoothing has to remove."""
        g = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        Hq, D = self.heads * self.groups, self.D
        tm = math.ceil(self.Nq / self.block_q)
        made: dict[str, Any] = {
            "q": normal(self.B, Hq, self.Nq, D),
            "k": normal(self.B, self.heads, self.Nk, D) + normal(1, self.heads, 1, D),
            "v": normal(self.B, self.heads, self.Nk, self.Dv),
            "proj_q": torch.eye(D, dtype=torch.float64) + 0.3 * normal(D, D) if self.projected else None,
            "proj_k": torch.eye(D, dtype=torch.float64) + 0.3 * normal(D, D) if self.projected else None,
            "gain": normal(Hq).exp() if self.alpha in ("routed", "block") else None,
            "bias": {"none": None, "head": normal(Hq, 1), "routed": normal(Hq, 1), "block": normal(1, tm)}[
                self.alpha
            ],
            "mask": None,
        }
        if self.masked:
            mask = torch.rand(self.B, self.Nk, generator=g) < 0.7
            mask[0, self.Nk // 3 : 2 * self.Nk // 3] = False
            mask[:, 0] = True
            made["mask"] = mask
        return made

    def call(self, x: dict[str, Any]) -> Tensor:
        """Return o of a whole call of the ops."""
        options = AttentionOptions(
            self.topk_ratio, self.compression_ratio, self.block_q, self.block_k, self.feature_map, self.linear_scope
        )
        learned = {"proj_q": x["proj_q"], "proj_k": x["proj_k"], "alpha_gain": x["gain"], "alpha_bias": x["bias"]}
        return sla2_attention(
            x["q"], x["k"], x["v"], options, key_mask=x["mask"], is_causal=self.is_causal, **learned
        )

    def reference_call(self, x: dict[str, Any]) -> Tensor:
        """Return o of a whole call of the reference, whose estimates count as constants."""
        lut, log_rest, _, k_mean = self.route(x, reference.route)
        return self.attention(
            {**x, "lut": lut, "log_rest": log_rest.detach(), "k_mean": k_mean}, reference.attention
        )[0]


@st.composite
def cases(draw: st.DrawFn, whole_blocks: int = 0) -> Case:
    """Draw a call with at least so many whole blocks of queries and keys besides the ragged last ones."""
    block_q, block_k = draw(st.sampled_from([8, 16, 32])), draw(st.sampled_from([8, 16, 32]))
    is_causal = draw(st.booleans())
    off_q, off_k = draw(st.integers(1, block_q - 1)), draw(st.integers(1, block_k - 1))
    return Case(
        B=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 2)),
        groups=draw(st.integers(1, 3)),
        Nq=draw(st.integers(whole_blocks, 4)) * block_q + off_q,
        Nk=draw(st.integers(whole_blocks, 6)) * block_k + off_k,
        D=draw(st.sampled_from([8, 16, 24])),
        Dv=draw(st.sampled_from([8, 16, 40])),
        block_q=block_q,
        block_k=block_k,
        topk_ratio=draw(st.sampled_from([0.03, 0.15, 0.3, 0.5, 0.9, 1.0])),
        compression_ratio=draw(st.sampled_from([1, 4, 8, 16, 256])),
        is_causal=is_causal,
        masked=draw(st.booleans()),
        feature_map=draw(st.sampled_from(["softmax", "elu", "relu"])),
        linear_scope="complement" if is_causal else draw(st.sampled_from(["complement", "all"])),
        alpha=draw(st.sampled_from(["none", "head", "routed", "block"])),
        projected=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def examples(count: int) -> Any:
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def cast(x: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Copies of all tensors, the floating-point ones in dtype."""
    return {
        name: t.to(dtype if t.is_floating_point() else t.dtype, copy=True) if isinstance(t, Tensor) else t
        for name, t in x.items()
    }


@contextmanager
def multiplying(native: bool) -> Iterator[None]:
    """Multiply in the inputs' dtype, as on a CPU with matrix units, or in whatever this CPU does best."""
    with pytest.MonkeyPatch.context() as patch:
        if native:
            patch.setattr(tiling, "compute_dtype", lambda x: x.dtype)
        yield


def shared_route(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Inputs that dtype holds exactly, and one look-up table for all: rounding must not choose another block."""
    x = cast(cast(case.tensors(), dtype), torch.float64)
    x["lut"], x["log_rest"], _, x["k_mean"] = case.route(x, reference.route)
    return x


@examples(150)
@example(Case(is_causal=True, masked=True, Nq=200, Nk=75))
@example(Case(is_causal=True, masked=True, Nq=75, Nk=200, topk_ratio=1.0))
@given(cases())
def test_route_in_float64(case: Case) -> None:
    x = case.tensors()
    got, want = case.route(x, route), case.route(x, reference.route)
    assert torch.equal(got[0], want[0])
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b)


@examples(150)
@example(Case(is_causal=True, masked=True, Nq=200, Nk=75))
@given(cases())
def test_attention_in_float64(case: Case) -> None:
    x = case.tensors()
    x["lut"], x["log_rest"], _, x["k_mean"] = case.route(x, reference.route)
    got, want = case.attention(x, attention), case.attention(x, reference.attention)
    for name, a, b in zip(("o", "lse"), got, want, strict=False):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")  # type: ignore[misc]


@examples(100)
@given(cases(), st.sampled_from(LOW))
def test_block_scores_by_the_oracle(case: Case, dtype: torch.dtype) -> None:
    x = cast(case.tensors(), dtype)
    sizes = (case.compression_ratio, case.block_q, case.block_k, case.D**-0.5)
    scores = []
    for kind in (dtype, torch.float64):
        y = cast(x, kind)
        k = y["k"] - reference.masked_mean(y["k"], x["mask"])[:, :, None]
        scores.append(reference.block_scores(y["q"], k, y["proj_q"], y["proj_k"], x["mask"], *sizes))
    (rows_q, a), (rows_k, b) = (router_tokens(size, case.compression_ratio) for size in (case.block_q, case.block_k))
    q_pool, _ = portable_route.pool_tokens(x["q"], rows_q, None)
    k_pool, count = portable_route.pool_tokens(x["k"], rows_k, x["mask"])
    mean = reference.masked_mean(x["k"].to(k_pool.dtype), x["mask"])
    k_pool = k_pool - mean[:, :, None]
    if case.projected:
        q_pool, k_pool = q_pool @ x["proj_q"].to(q_pool.dtype).mT, k_pool @ x["proj_k"].to(k_pool.dtype).mT
    got = portable_route.block_scores(q_pool, k_pool, count, a, b, case.D**-0.5)
    for name, portable, low, exact in zip(("peak", "typical"), got, *scores, strict=True):
        assert_oracle(name, portable, low, exact, torch.finfo(dtype).eps)


@examples(100)
@given(cases(), st.sampled_from(LOW), st.booleans())
def test_attention_by_the_oracle(case: Case, dtype: torch.dtype, native: bool) -> None:
    x = shared_route(case, dtype)
    exact = case.attention(cast(x, torch.float64), reference.attention)
    low = case.attention(cast(x, dtype), reference.attention)
    # sla2::route hands over in the accumulation dtype
    handed = cast(x, dtype) | {name: x[name].float() for name in ("log_rest", "k_mean")}
    with multiplying(native):
        got = case.attention(handed, attention)
    for name, ours, theirs, want in zip(("o", "lse"), got, low, exact, strict=False):
        assert_oracle(name, ours, theirs, want, torch.finfo(dtype).eps)


@examples(60)
@given(cases(whole_blocks=3), st.sampled_from(LOW), st.sampled_from(["softmax", "elu"]), st.booleans())
def test_gradients_by_the_oracle(case: Case, dtype: torch.dtype, feature_map: str, native: bool) -> None:
    """Without relu: where phi(q) Z is almost 0, block states lose digits that the plain sum over keys keeps."""
    case = replace(case, feature_map=feature_map, B=2, heads=2, groups=2)
    x = shared_route(case, dtype)
    g = torch.Generator().manual_seed(1)
    do = torch.randn(case.B, case.heads * case.groups, case.Nq, case.Dv, generator=g).to(dtype)
    wanted = ("q", "k", "v", "gain", "bias")
    results = []
    for kind, run in ((dtype, attention), (dtype, reference.attention), (torch.float64, reference.attention)):
        y = cast(x, kind)
        y = {name: t.requires_grad_() if name in wanted and t is not None else t for name, t in y.items()}
        # k is smoothed inside, as in a whole call: the gradient of its mean alone is a sum that cancels
        if run is attention:
            y["log_rest"], y["k_mean"] = x["log_rest"].float(), reference.masked_mean(y["k"].float(), y["mask"])
            with multiplying(native):
                case.attention(y, run)[0].backward(do)
        else:
            y["k_mean"] = reference.masked_mean(y["k"], y["mask"])
            case.attention(y, run)[0].backward(do.to(kind))
        grads = {name: y[name].grad.flatten() for name in wanted if y[name] is not None}
        # in float32 a few rows' rounding is a matter of luck in either: the gradient is judged as one vector
        results.append(grads if dtype == torch.bfloat16 else {"all": torch.cat(list(grads.values()))})
    got, low, exact = results
    for name in exact:
        assert_oracle(name, got[name], low[name], exact[name], torch.finfo(dtype).eps)


@examples(60)
@given(cases())
def test_gradients_in_float64(case: Case) -> None:
    """Through route and attention, against autograd of the reference with its estimates held constant."""
    x = case.tensors()
    names = [name for name in ("q", "k", "v", "gain", "bias") if x[name] is not None]
    results = []
    for run in (case.call, case.reference_call):
        y = {name: t.clone().requires_grad_() if name in names else t for name, t in x.items()}
        o = run(y)
        o.square().sum().backward()
        results.append((o, *(y[name].grad for name in names)))
    for name, got, want in zip(("o", *names), *results, strict=True):
        torch.testing.assert_close(got, want, msg=lambda m, name=name: f"{name}: {m}")  # type: ignore[misc]


SMALL = Case(B=1, heads=1, groups=2, Nq=11, Nk=19, D=4, Dv=3, block_q=8, block_k=8, compression_ratio=4)
GRADCHECKS = {
    "routed": SMALL,
    "masked": Case(**{**SMALL.__dict__, "masked": True, "B": 2}),
    "causal": Case(**{**SMALL.__dict__, "is_causal": True, "Nk": 25, "Nq": 21}),
    "causal masked block alpha": replace(SMALL, is_causal=True, masked=True, alpha="block"),
    "head alpha, elu": replace(SMALL, alpha="head", feature_map="elu"),
    "no alpha, relu, all": replace(SMALL, alpha="none", feature_map="relu", linear_scope="all"),
}


@pytest.mark.parametrize("case", GRADCHECKS.values(), ids=GRADCHECKS.keys())
def test_gradcheck_of_the_reference(case: Case) -> None:
    x = case.tensors()
    x["lut"], x["log_rest"], _, x["k_mean"] = case.route(x, reference.route)
    names = [name for name in ("q", "k", "v", "k_mean", "gain", "bias") if x[name] is not None]

    def call(*given: Tensor) -> Tensor:
        return case.attention({**x, **dict(zip(names, given, strict=True))}, reference.attention)[0]

    assert torch.autograd.gradcheck(call, [x[name].requires_grad_() for name in names])


@pytest.mark.parametrize("name", ["v", "gain", "bias"])
def test_gradcheck_of_the_op(name: str) -> None:
    """Numerical derivatives in what the router does not see; q and k move log_rest, a constant by definition."""
    x = SMALL.tensors()
    assert torch.autograd.gradcheck(lambda t: SMALL.call({**x, name: t}), [x[name].requires_grad_()])


def test_gradcheck_of_the_op_in_queries_and_keys() -> None:
    """With one alpha a head, the estimate log_rest plays no part and q, k can be checked numerically too."""
    case = replace(SMALL, alpha="head")
    x = case.tensors()
    given = [x[name].requires_grad_() for name in ("q", "k")]
    assert torch.autograd.gradcheck(lambda q, k: case.call({**x, "q": q, "k": k}), given)
