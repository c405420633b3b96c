"""The Triton forward kernels compute what the reference defines: one set of bodies, in the interpreter and on a GPU.

err(kernel, fp64) <= 2 * (err(reference in the kernel's dtype, fp64) + eps * max|fp64|), all finite.
On a machine without a GPU the bodies run in a process of their own, since Triton chooses its interpreter at import.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from sla2_compile.kernels import ops
from sla2_compile.kernels.arguments import ForwardArgs, RouteArgs
from sla2_compile.kernels.blocks import num_blocks, num_kept
from sla2_compile.kernels.cuda import device
from sla2_compile.kernels.cuda import dispatch as cuda
from sla2_compile.kernels.cuda.forward import launches as attention_schedule
from sla2_compile.kernels.cuda.forward import sm90 as hopper
from sla2_compile.kernels.cuda.forward import states_launches as states_schedule
from sla2_compile.kernels.cuda.route import launches as route_schedule
from sla2_compile.kernels.layout import Layout
from sla2_compile.kernels.reference import sla2 as reference
from sla2_compile.kernels.support import GLUON_TRITONS
from tests.kernels.oracle import assert_oracle
from tests.kernels.schedules import as_long_calls, forget_schedules, remember_tensors, state_bytes
from tests.kernels.triton_case import (
    DEVICE,
    INTERPRETED,
    Case,
    body,
    dispatched_attention,
    dispatched_forward,
    dispatched_route,
    exact,
    poison_outputs,
    scheduled_attention,
    scheduled_route,
)

CASES = {
    "plain": Case(),
    "fp16": Case(dtype=torch.float16),
    "fp16, projected": Case(dtype=torch.float16, projected=True),
    "batch, whole-block tokens": Case(B=2, compression_ratio=256, topk_ratio=0.15),
    "every token, elu": Case(compression_ratio=1, feature_map="elu", block_q=32, block_k=16, Nq=75, Nk=107),
    "all keys, relu": Case(linear_scope="all", feature_map="relu", alpha="head", compression_ratio=16),
    "causal": Case(is_causal=True, Nq=203),
    "causal, longer keys, fp16": Case(is_causal=True, Nq=75, Nk=203, dtype=torch.float16, block_q=32),
    "masked": Case(masked=True, B=2, heads=2, groups=1),
    "causal masked": Case(is_causal=True, masked=True, Nq=203, Nk=75, alpha="block"),
    "empty complement": Case(topk_ratio=1.0, alpha="none"),
    "transposed, odd dims": Case(D=40, Dv=24, transposed=True, groups=1, heads=2, block_q=16, block_k=16),
    "D 96": Case(D=96, Dv=96, block_q=128, block_k=64, transposed=True, topk_ratio=0.5),
    "D 128": Case(D=128, Dv=128, block_q=128, block_k=64, Nq=333, Nk=457, projected=True, compression_ratio=16),
    "D 256": Case(D=256, Dv=256, block_q=64, block_k=64, compression_ratio=4, groups=1),
    "one block": Case(Nq=7, Nk=5, groups=1),
    "three keys": Case(Nq=70, Nk=3, topk_ratio=0.5),
    "large values": Case(scale_of_values=1e3, compression_ratio=4),
    "D 256, block 128 x 128": Case(D=256, Dv=256, block_q=128, block_k=128, groups=1, Nq=150, Nk=400),
    "block 128 x 128": Case(block_q=128, block_k=128, Nq=300, Nk=700, topk_ratio=0.4, D=128, Dv=64),
}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_outputs(monkeypatch)


def rounded_scores(case: Case, x: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The reference's block scores in dtype, with its causal mask."""
    y = exact(x, dtype)
    k = y["k"] - reference.masked_mean(y["k"], y["mask"])[:, :, None]
    args = (y["proj_q"], y["proj_k"], y["mask"], case.compression_ratio, case.block_q, case.block_k, case.D**-0.5)
    peak, typical = reference.block_scores(y["q"], k, *args)
    if case.is_causal:
        allowed, _ = reference.causal_blocks(case.Nq, case.Nk, case.block_q, case.block_k, peak.device)
        peak, typical = (s.masked_fill(~allowed, float("-inf")) for s in (peak, typical))
    return peak, typical


@body
@pytest.mark.parametrize("name", CASES)
def test_route(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_route(CASES[name], monkeypatch)


LONG = [
    "plain", "every token, elu", "causal, longer keys, fp16", "causal masked", "transposed, odd dims", "D 256",
    "three keys",
]  # fmt: skip


@body
@pytest.mark.parametrize("name", LONG)
def test_route_of_long_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_long_calls(monkeypatch)
    check_route(CASES[name], monkeypatch)


def check_route(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores and k_mean by the oracle; then table, log_rest and entropy are those of the kernel's own scores."""
    x, kept = case.tensors(), remember_tensors(monkeypatch)
    lut, log_rest, entropy, k_mean = case.route(x, scheduled_route)
    eps = torch.finfo(case.dtype).eps

    low, want = (rounded_scores(case, x, dtype) for dtype in (case.dtype, torch.float64))
    # rows end with a few columns that nobody reads
    peak, typical = (kept[name][..., : num_blocks(case.Nk, case.block_k)].double() for name in ("peak", "typical"))
    tn = peak.shape[-1]
    forced = torch.zeros(1, dtype=torch.bool, device=peak.device)
    if case.is_causal:
        allowed, forced = reference.causal_blocks(case.Nq, case.Nk, case.block_q, case.block_k, peak.device)
        peak, typical = (s.masked_fill(~allowed, float("-inf")) for s in (peak, typical))
    assert_oracle("peak", peak, low[0], want[0], eps)
    assert_oracle("typical", typical, low[1], want[1], eps)
    mean, mean_low = (reference.masked_mean(x["k"].to(dtype), x["mask"]) for dtype in (torch.float64, case.dtype))
    assert_oracle("k_mean", k_mean, mean_low, mean, eps)

    rank = peak.masked_fill(forced & (peak > float("-inf")), float("inf"))
    K = num_kept(tn, case.topk_ratio, case.block_q, case.block_k, case.is_causal)
    values, chosen = rank.topk(K, dim=-1)
    table = chosen.masked_fill(values == float("-inf"), tn).sort(dim=-1).values
    assert torch.equal(lut, table.masked_fill(table == tn, -1).int())
    block_mask = torch.zeros_like(peak, dtype=torch.bool).scatter(-1, chosen, values > float("-inf"))
    torch.testing.assert_close(
        log_rest.double(), typical.masked_fill(block_mask, float("-inf")).logsumexp(-1), rtol=1e-5, atol=1e-4
    )
    log_p = peak - peak.logsumexp(dim=-1, keepdim=True)
    spread = -torch.where(peak > float("-inf"), log_p.exp() * log_p, 0.0).sum(dim=-1)
    torch.testing.assert_close(entropy.double(), spread, rtol=1e-4, atol=1e-4)


def without_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    found = attention_schedule.support
    monkeypatch.setattr(attention_schedule, "support", lambda facts: found(facts)._replace(kernel="triton"))


@body
@pytest.mark.parametrize("name", ["plain", "masked", "causal masked", "D 96", "transposed, odd dims", "large values"])
def test_attention_with_the_copy_engine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of K and V through tensor descriptors, as on sm_90, also in the interpreter."""
    if INTERPRETED:
        monkeypatch.setattr(device, "capability", lambda device: 90)
    without_the_fused_kernel(monkeypatch)
    check_attention(CASES[name])


@body
@pytest.mark.parametrize("name", ["plain", "masked", "causal masked", "D 96", "large values"])
def test_attention_with_pointers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of K and V through pointers, as on chips without a copy engine."""
    monkeypatch.setattr(attention_schedule, "describable", lambda x: False)
    without_the_fused_kernel(monkeypatch)
    check_attention(CASES[name])


@body
@pytest.mark.parametrize("name", CASES)
def test_attention(name: str) -> None:
    check_attention(CASES[name])


@body
@pytest.mark.parametrize(
    "name", ["plain", "causal masked", "transposed, odd dims", "all keys, relu", "empty complement"]
)
def test_attention_of_long_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_long_calls(monkeypatch)
    check_attention(CASES[name])


def check_attention(case: Case) -> None:
    """One look-up table for all three, so that rounding in the router cannot choose another block."""
    x = case.tensors()
    wide = exact(x, torch.float64)
    x["lut"], log_rest, _, k_mean = case.route(wide, reference.route)
    x["log_rest"], x["k_mean"] = log_rest.float(), k_mean.float()
    got = case.attention(x, scheduled_attention)
    low = case.attention(exact(x, case.dtype), reference.attention)
    want = case.attention(exact(x, torch.float64), reference.attention)
    for part, a, b, c in zip(("o", "lse"), got, low, want, strict=False):
        assert a.dtype == (torch.float32 if part == "lse" else case.dtype)
        assert_oracle(part, a, b, c, torch.finfo(case.dtype).eps)


@body
@pytest.mark.parametrize(
    ("name", "length"),
    [("plain", "short"), ("causal masked", "short"), ("D 128", "short"), ("three keys", "short"), ("plain", "long")],
)
def test_forward_is_route_and_attention(name: str, length: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One op without gradients: what both compute, also when its launches are made again."""
    if length == "long":
        as_long_calls(monkeypatch)
    case, kept = CASES[name], remember_tensors(monkeypatch)
    x = case.tensors()
    x["lut"], x["log_rest"], entropy, x["k_mean"] = case.route(x, scheduled_route)
    o = case.attention(x, scheduled_attention)[0]
    # the mean of the keys may be summed in another order
    near: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
    for _ in range(2):
        got = case.forward(x, dispatched_forward)
        assert torch.equal(kept["lut"], x["lut"])
        if length == "long":
            # the same launches
            assert torch.equal(got, o)
            assert torch.equal(kept["log_rest"], x["log_rest"])
            assert torch.equal(kept["k_mean"], x["k_mean"])
        for part, wanted in (("log_rest", x["log_rest"]), ("entropy", entropy), ("k_mean", x["k_mean"])):
            torch.testing.assert_close(kept[part], wanted, **near)
        torch.testing.assert_close(got, o)
    assert attention_schedule.forward_schedule.cache_info().misses == 1
    # of the same layouts, not of the tensors seen first
    other = replace(case, seed=1).tensors()
    assert not torch.equal(case.forward(other, dispatched_forward), o)


@body
@pytest.mark.parametrize("change", [{"dtype": torch.float32}, {"block_k": 8}])
def test_forward_leaves_what_kernels_do_not_take(change: dict[str, Any]) -> None:
    case = replace(Case(), **change)
    x = case.tensors()
    _, layouts = case.forward(x, lambda *args: cuda.laid_out(ForwardArgs(*args)))
    assert cuda.scheduled_forward(layouts, False) is None
    assert torch.equal(case.forward(x, dispatched_forward), case.forward(x, ops.forward))


@body
def test_empty_complement_is_full_attention() -> None:
    case = CASES["empty complement"]
    x = case.tensors()
    x["lut"], x["log_rest"], _, x["k_mean"] = case.route(x, scheduled_route)
    assert (x["log_rest"] == float("-inf")).all()
    o = case.attention(x, scheduled_attention)[0]
    q, k, v = (x[n].double() for n in "qkv")
    k, v = (t.repeat_interleave(case.groups, dim=1) for t in (k, v))
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    low = torch.nn.functional.scaled_dot_product_attention(*(t.to(case.dtype) for t in (q, k, v)))
    assert_oracle("o", o, low, full, torch.finfo(case.dtype).eps)


@body
@pytest.mark.parametrize("change", ["zeros", "constant", "no key at all"])
def test_degenerate_inputs_stay_finite(change: str) -> None:
    case = replace(Case(), feature_map="relu", masked=change == "no key at all")
    x = case.tensors()
    if change == "no key at all":
        x["mask"][:] = False
    else:
        for name in "qkv":
            x[name].fill_(0.0 if change == "zeros" else 3.0)
    x["lut"], x["log_rest"], _, x["k_mean"] = case.route(x, scheduled_route)
    o, lse = case.attention(x, scheduled_attention)
    assert o.isfinite().all()
    if change == "no key at all":
        assert (lse == float("-inf")).all()
        assert not o.any()
        assert (x["lut"] == -1).all()


@body
@pytest.mark.parametrize("Nk", [203, 5])
def test_wild_table_reads_nothing_outside(Nk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """k and v lie inside NaN: a read outside them would show. The values of such a call mean nothing."""
    monkeypatch.setattr(attention_schedule, "describable", lambda x: False)
    case = replace(Case(), Nk=Nk, topk_ratio=1.0)
    x = case.tensors()
    x["lut"], x["log_rest"], _, x["k_mean"] = case.route(x, scheduled_route)
    for name in "kv":
        guarded = torch.full((1, 3, Nk + 512, case.D), float("nan"), device=DEVICE, dtype=case.dtype)
        guarded[:, 1:2, 256 : 256 + Nk] = x[name]
        x[name] = guarded[:, 1:2, 256 : 256 + Nk]
    for wild in (-7, 1000, 2**30):
        x["lut"].fill_(wild)
        assert case.attention(x, scheduled_attention)[0].isfinite().all()


@body
@pytest.mark.parametrize("heads", [1, 4])
def test_heads_in_groups(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded memory for the states: many launches give what one gives, also where the last group is smaller."""
    as_long_calls(monkeypatch)
    case, kept = replace(Case(), B=2, heads=3), remember_tensors(monkeypatch)
    x = case.tensors()
    x["lut"], x["log_rest"], _, x["k_mean"] = case.route(x, scheduled_route)
    whole = case.attention(x, scheduled_attention)[0]
    monkeypatch.setattr(states_schedule, "STATE_BYTES", state_bytes(kept, heads, of=6))
    forget_schedules()
    assert torch.equal(whole, case.attention(x, scheduled_attention)[0])
    assert len(kept["states"]) == heads


def views(way: str, case: Case) -> dict[str, Any]:
    """Inputs as projections leave them, none of them in one piece."""
    B, H, N, D = case.B, case.heads, case.Nk, case.D
    g = torch.Generator().manual_seed(0)
    if way == "transposed":
        made = [torch.randn(B, N, H, D, generator=g).to(DEVICE, case.dtype).transpose(1, 2) for _ in "qkv"]
    else:
        made = list(torch.randn(B, N, 3, H, D, generator=g).to(DEVICE, case.dtype).permute(2, 0, 3, 1, 4).unbind(0))
    mask = (torch.rand(1, N, generator=g) < 0.8).to(DEVICE).expand(B, N)
    # a bias seen from the other side: (1, Hq) as (Hq, 1)
    bias = torch.randn(1, H, generator=g).to(DEVICE).T
    return {**dict(zip("qkv", made, strict=True)), "mask": mask, "bias": bias}


@body
@pytest.mark.parametrize("way", ["transposed", "slices of qkv"])
def test_views_are_read_where_they_lie(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy: the launches are given the tensors themselves, and give what they give of copies."""
    case = replace(Case(), B=2, heads=2, groups=1, Nq=75, Nk=75)
    x = {**case.tensors(), **views(way, case)}
    assert not any(x[name].is_contiguous() for name in "qkv")
    kept = remember_tensors(monkeypatch)

    def check_inputs(*given: Tensor | None) -> None:
        for n, tensor in enumerate(given):
            if tensor is not None:
                seen = kept[f"input {n}"]
                assert seen.data_ptr() == tensor.data_ptr(), f"input {n} was copied"
                assert (seen.shape, seen.stride()) == (tensor.shape, tensor.stride())

    options = (case.topk_ratio, case.compression_ratio, case.block_q, case.block_k, 0.125, False)
    x["lut"], x["log_rest"], _, x["k_mean"] = dispatched_route(x["q"], x["k"], None, None, x["mask"], *options)
    check_inputs(x["q"], x["k"], None, None, x["mask"])
    tensors = [x[name] for name in ("q", "k", "v", "k_mean", "lut", "log_rest", "gain", "bias", "mask")]
    rest = (case.block_q, case.block_k, 0.125, "softmax", "complement", False, "none")
    o = dispatched_attention(*tensors, *rest)[0]
    check_inputs(*tensors)
    assert torch.equal(o, dispatched_attention(*(t.contiguous() for t in tensors), *rest)[0])


@body
@pytest.mark.parametrize("name", ["q", "k"])
def test_nan_is_seen_and_leads_nowhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table stays within its range; NaN comes out, or debug mode names it where the router chose nothing."""
    monkeypatch.setenv("SLA2_DEBUG", "1")
    case = replace(Case(), Nq=64, Nk=96)
    x = case.tensors()
    x[name][0, 0, 5] = float("nan")
    x["lut"], x["log_rest"], _, x["k_mean"] = case.route(x, dispatched_route)
    assert ((x["lut"] >= -1) & (x["lut"] < num_blocks(case.Nk, case.block_k))).all()
    if (x["lut"] == -1).any():
        with pytest.raises(ValueError, match=r"got -1; take it from .*, or look for NaN in q or k if it is"):
            case.attention(x, dispatched_attention, "none")
    else:
        assert case.attention(x, dispatched_attention, "none")[0].isnan().any()


def test_rule_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 1, 4, 8)
    wide = torch.zeros(1, 1, 4, 256).half()

    def takes(q: Tensor, block_q: int, block_k: int, scale: float) -> bool:
        x = Layout.of(q)
        return cuda.takes_route(RouteArgs(x, x, None, None, None, 0.5, 8, block_q, block_k, scale, False))

    assert takes(x.bfloat16(), 128, 64, 0.1)
    assert takes(x.half(), 16, 16, 0.1)
    assert takes(wide, 128, 128, 0.1)
    for y, block_q, block_k, scale in ((x, 64, 64, 1.0), (x.half(), 8, 64, 1.0), (x.half(), 64, 256, 1.0)):
        assert not takes(y, block_q, block_k, scale)
    assert not takes(x.half(), 64, 64, -1.0)
    monkeypatch.setattr(device, "shared_limit", lambda device: 99 * 1024)
    assert takes(wide, 128, 64, 0.1)
    assert not takes(wide, 128, 128, 0.1)
    monkeypatch.setattr(device, "capability", lambda device: 75)
    assert not takes(x.half(), 64, 64, 0.1)


if not INTERPRETED:

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_graph_capture(dtype: torch.dtype) -> None:
        """The whole call replays from a CUDA graph: no synchronisation, no plan on the host."""
        from sla2_compile.kernels.functional import AttentionOptions, sla2_attention

        q, k, v = (torch.randn(2, 4, 1111, 64, device=DEVICE, dtype=dtype) for _ in range(3))
        want = sla2_attention(q, k, v, AttentionOptions())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = sla2_attention(q, k, v, AttentionOptions())
        o.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(o, want)

    @pytest.mark.gpu
    def test_new_length_compiles_nothing() -> None:
        from sla2_compile.kernels.functional import AttentionOptions, sla2_attention

        def call(n: int) -> None:
            q = torch.randn(1, 2, n, 64, device=DEVICE, dtype=torch.bfloat16)
            sla2_attention(q, q, q, AttentionOptions())

        def built() -> int:
            names = {**vars(attention_schedule), **vars(states_schedule), **vars(route_schedule)}
            kernels = [x for name, x in names.items() if name.endswith("_kernel")]
            kernels += [hopper.kernel()] if device.triton_version() in GLUON_TRITONS else []
            return sum(len(x.device_caches[torch.cuda.current_device()][0]) for x in kernels)

        for n in (3001, 3072):
            call(n)
        before = built()
        for n in (2049, 2050, 2600, 3000, 3333, 4096):
            call(n)
        assert built() == before

    @pytest.mark.gpu
    def test_gradients_reach_everything() -> None:
        """Autograd on a GPU: Triton forward, portable backward."""
        from sla2_compile.kernels.functional import AttentionOptions, sla2_attention

        q, k, v = (torch.randn(1, 2, 700, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
        grads = []
        for dtype in (torch.bfloat16, torch.float32):
            y = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
            o = sla2_attention(y[0], y[1], y[2], AttentionOptions(topk_ratio=1.0, block_q=64, block_k=32))
            o.float().square().sum().backward()
            grads.append([t.grad.double().flatten() for t in y if t.grad is not None])
        for low, high in zip(*grads, strict=True):
            assert torch.nn.functional.cosine_similarity(low, high, dim=0) > 0.999
