"""Every refusal of the ops: rule, value and fix, the same from real and from fake tensors."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sla2_compile.kernels import checks
from sla2_compile.kernels.arguments import (
    AttentionArgs,
    BackwardArgs,
    RouteArgs,
    SelectArgs,
    SparseArgs,
    SparseBackwardArgs,
)
from sla2_compile.kernels.ops import attention, attention_backward, route
from sla2_compile.kernels.records import arguments, flat, of
from sla2_compile.kernels.select_ops import select
from sla2_compile.kernels.sparse_ops import sparse_attention, sparse_attention_backward


def good() -> dict[str, Any]:
    """Arguments that the ops take: B=2, Hq=4, Hkv=2, Nq=40, Nk=50, D=16, Dv=24, Tm=2, Tn=4."""
    return {
        "q": torch.zeros(2, 4, 40, 16),
        "k": torch.zeros(2, 2, 50, 16),
        "v": torch.zeros(2, 2, 50, 24),
        "proj_q": torch.eye(16),
        "proj_k": torch.eye(16),
        "key_mask": torch.ones(2, 50, dtype=torch.bool),
        "k_mean": torch.zeros(2, 2, 16),
        "lut": torch.zeros(2, 4, 2, 1, dtype=torch.int32),
        "log_rest": torch.zeros(2, 4, 2),
        "alpha_gain": torch.ones(4),
        "alpha_bias": torch.zeros(4, 1),
        "topk_ratio": 0.3,
        "compression_ratio": 8,
        "block_q": 32,
        "block_k": 16,
        "scale": 0.25,
        "feature_map": "softmax",
        "linear_scope": "complement",
        "is_causal": False,
        "low_bit": "none",
        "tail": "proxy",
        "proxy_order": 1,
        "by_threshold": False,
        "threshold": 1.0,
        "head_ratios": (0.3, 0.5, 0.3, 0.3),
        "protect": (0, 1),
        "do": torch.zeros(2, 4, 40, 24),
        "o": torch.zeros(2, 4, 40, 24),
        "lse": torch.zeros(2, 4, 40),
    }


RECORDS: dict[Any, Any] = {
    route: RouteArgs,
    attention: AttentionArgs,
    attention_backward: BackwardArgs,
    sparse_attention: SparseArgs,
    sparse_attention_backward: SparseBackwardArgs,
    select: SelectArgs,
}


def record(kind: Any, args: dict[str, Any]) -> Any:
    return of(kind, [args[x.name] for x in arguments(kind)])


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Callable[[], torch.Tensor]:
    return lambda: torch.zeros(*shape, dtype=dtype, device=device)


# (ops that refuse, what is wrong, the whole message)
BOTH, R, A, W = (route, attention), (route,), (attention, attention_backward), (attention_backward,)
S = (sparse_attention, sparse_attention_backward)
C = (select,)
REFUSALS: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    (BOTH, {"q": zeros(4, 40, 16)},
     "q must have shape (batch, heads, tokens, head_dim), got (4, 40, 16); reshape it to 4-D"),
    (A, {"v": zeros(2, 50, 24)},
     "v must have shape (batch, heads, tokens, head_dim), got (2, 50, 24); reshape it to 4-D"),
    (BOTH, {"q": zeros(2, 4, 40, 16, dtype=torch.int64)},
     "q must be float64, float32, bfloat16 or float16, got torch.int64; cast it first"),
    (BOTH, {"k": zeros(2, 2, 50, 16, dtype=torch.bfloat16)},
     "k must have q's dtype torch.float32, got torch.bfloat16; cast q, k and v to one dtype"),
    (BOTH, {"k": zeros(3, 2, 50, 16)},
     "k must have q's batch size 2, got 3; expand it first"),
    (BOTH, {"k": zeros(2, 2, 0, 16)},
     "k must have at least one token, got (2, 2, 0, 16); skip attention over empty sequences"),
    (BOTH, {"q": zeros(2, 4, 0, 16)},
     "q must have at least one token, got (2, 4, 0, 16); skip attention over empty sequences"),
    (BOTH, {"q": zeros(2, 4, 40, 257)},
     "q must have a head dim from 1 to 256, got 257; use full attention here"),
    (A, {"v": zeros(2, 2, 50, 0)},
     "v must have a head dim from 1 to 256, got 0; use full attention here"),
    (BOTH, {"k": zeros(2, 2, 50, 8)},
     "k must have q's head dim 16, got 8; project both to one width"),
    (A, {"v": zeros(2, 2, 49, 24)},
     "v must have k's heads and tokens (2, 50), got (2, 49); match k and v"),
    (BOTH, {"q": zeros(2, 3, 40, 16)},
     "q must have a multiple of k's 2 heads, got 3; repeat or drop heads"),
    (BOTH, {"q": zeros(0, 4, 40, 16)},
     "q must have at least one sequence, got (0, 4, 40, 16); skip attention over empty batches"),
    (BOTH, {"k": zeros(2, 0, 50, 16), "v": zeros(2, 0, 50, 24)},
     "k must have at least one head, got (2, 0, 50, 16); skip attention without heads"),
    (BOTH, {"key_mask": zeros(2, 50)},
     "key_mask must be boolean, True where the key takes part, got torch.float32; compare first"),
    (BOTH, {"key_mask": zeros(2, 40, dtype=torch.bool)},
     "key_mask must have shape (2, 50), got (2, 40); expand it over the batch"),
    (BOTH, {"key_mask": zeros(2, 1, 1, 50, dtype=torch.bool)},
     "key_mask must have shape (2, 50), got (2, 1, 1, 50); expand it over the batch"),
    (BOTH, {"block_q": 24},
     "block_q must be a power of two from 8 to 256, got 24; use 128 and 64 for long sequences"),
    (BOTH, {"block_k": 512},
     "block_k must be a power of two from 8 to 256, got 512; use 128 and 64 for long sequences"),
    (R, {"compression_ratio": 12},
     "compression_ratio must be a power of two, got 12; use 4, 8 or 16"),
    (R, {"compression_ratio": 0},
     "compression_ratio must be a power of two, got 0; use 4, 8 or 16"),
    (R, {"topk_ratio": 0.0},
     "topk_ratio must lie in (0, 1], got 0.0; 0.15 keeps 15 % of the key blocks"),
    (R, {"topk_ratio": 1.5},
     "topk_ratio must lie in (0, 1], got 1.5; 0.15 keeps 15 % of the key blocks"),
    (R, {"topk_ratio": float("nan")},
     "topk_ratio must lie in (0, 1], got nan; 0.15 keeps 15 % of the key blocks"),
    (R, {"proj_q": zeros(16, 8)},
     "proj_q must have shape (16, 16), got (16, 8); one head_dim x head_dim matrix per site"),
    (R, {"proj_k": zeros(16)},
     "proj_k must have shape (16, 16), got (16,); one head_dim x head_dim matrix per site"),
    (A, {"k_mean": zeros(2, 4, 16)},
     "k_mean must have shape (2, 2, 16), got (2, 4, 16); take it from sla2::route"),
    (A, {"lut": zeros(2, 4, 3, 1, dtype=torch.int32)},
     "lut must be int32 of shape (2, 4, 2, topk), got torch.int32 (2, 4, 3, 1); route with the same block_q"),
    (A, {"lut": zeros(2, 4, 2, 1, dtype=torch.int64)},
     "lut must be int32 of shape (2, 4, 2, topk), got torch.int64 (2, 4, 2, 1); route with the same block_q"),
    (A, {"lut": zeros(2, 4, 2, 0, dtype=torch.int32)},
     "lut must keep at least one key block, got (2, 4, 2, 0); take it from sla2::route"),
    (A, {"log_rest": zeros(2, 4, 3)},
     "log_rest must have shape (2, 4, 2), got (2, 4, 3); take it from sla2::route"),
    (A, {"alpha_gain": zeros(2)},
     "alpha_gain must have shape (4,) and come with alpha_bias, got (2,); give one value per head"),
    (A, {"alpha_bias": None},
     "alpha_gain must have shape (4,) and come with alpha_bias, got (4,); give one value per head"),
    (A, {"alpha_bias": zeros(4, 3)},
     "alpha_bias must broadcast to (4, 2), got (4, 3); alpha='block' fits one sequence length only"),
    (A, {"alpha_bias": zeros(4)},
     "alpha_bias must broadcast to (4, 2), got (4,); alpha='block' fits one sequence length only"),
    (A, {"feature_map": "gelu"},
     "feature_map must be one of softmax, elu, relu, got 'gelu'; softmax is the paper's"),
    (A, {"linear_scope": "selected"},
     "linear_scope must be one of complement, all, got 'selected'; use complement"),
    (A, {"linear_scope": "all", "is_causal": True},
     "linear_scope must be 'complement' when is_causal, got 'all'; all keys would include future ones"),
    (A, {"low_bit": "int4"},
     "low_bit must be one of none, int8, int8_fp8, got 'int4'; int8_fp8 is the paper's"),
    (C, {"topk_ratio": 0.0},
     "topk_ratio must lie in (0, 1], got 0.0; 0.15 keeps 15 % of the key blocks"),
    (C, {"head_ratios": (0.3, 0.5)},
     "head_ratios must have a ratio for each of q's 4 heads, got 2; or leave it out"),
    (C, {"head_ratios": (0.3, 0.5, 1.5, 0.3)},
     "head_ratios must lie in (0, 1], got 1.5; 0.15 keeps 15 % of the key blocks"),
    (C, {"protect": (0, 1, 2)},
     "protect must be ascending pairs of key blocks from 0 to 4, got (0, 1, 2); "
     "a range is its first block and its end"),
    (C, {"protect": (3, 5)},
     "protect must be ascending pairs of key blocks from 0 to 4, got (3, 5); "
     "a range is its first block and its end"),
    (S, {"q": zeros(4, 40, 16)},
     "q must have shape (batch, heads, tokens, head_dim), got (4, 40, 16); reshape it to 4-D"),
    (S, {"key_mask": zeros(2, 40, dtype=torch.bool)},
     "key_mask must have shape (2, 50), got (2, 40); expand it over the batch"),
    (S, {"block_q": 24},
     "block_q must be a power of two from 8 to 256, got 24; use 128 and 64 for long sequences"),
    (S, {"lut": zeros(2, 4, 3, 1, dtype=torch.int32)},
     "lut must be int32 of shape (2, 4, 2, topk), got torch.int32 (2, 4, 3, 1); route with the same block_q"),
    (S, {"tail": "linear"},
     "tail must be one of none, proxy, got 'linear'; proxy pools the blocks that are not selected"),
    (S, {"proxy_order": 3},
     "proxy_order must be 1 or 2, got 3; 2 also counts the spread of a block's keys"),
    (S[1:], {"do": zeros(2, 4, 24, 40)},
     "do must be torch.float32 of shape (2, 4, 40, 24) on cpu, got torch.float32 (2, 4, 24, 40) on cpu; "
     "take it as sla2::sparse_attention gave it"),
    (W, {"do": zeros(2, 4, 24, 40)},
     "do must be torch.float32 of shape (2, 4, 40, 24) on cpu, got torch.float32 (2, 4, 24, 40) on cpu; "
     "take it as sla2::attention gave it"),
    (W, {"do": zeros(2, 4, 40, 24, dtype=torch.bfloat16)},
     "do must be torch.float32 of shape (2, 4, 40, 24) on cpu, got torch.bfloat16 (2, 4, 40, 24) on cpu; "
     "take it as sla2::attention gave it"),
    (W, {"lse": zeros(2, 4, 39)},
     "lse must be torch.float32 of shape (2, 4, 40) on cpu, got torch.float32 (2, 4, 39) on cpu; "
     "take it as sla2::attention gave it"),
    (W, {"o": zeros(2, 4, 40, 16)},
     "o must be torch.float32 of shape (2, 4, 40, 24) on cpu, got torch.float32 (2, 4, 40, 16) on cpu; "
     "take it as sla2::attention gave it"),
]  # fmt: skip
CASES = [(op, wrong, message) for ops, wrong, message in REFUSALS for op in ops]
# devices differ only where a second one can be had: a fake tensor's can
ON_ANOTHER_DEVICE = [
    (op, name, f"{name} must {rule}, got meta; {fix}")
    for ops, name, rule, fix in (
        (BOTH, "k", "be on q's device cpu", "move q, k and v to one device"),
        (A, "v", "be on q's device cpu", "move q, k and v to one device"),
        (BOTH, "key_mask", "be on k's device cpu", "move it"),
        (S, "k_mean", "be on q's device cpu", "move the model and its inputs together"),
        (S, "lut", "be on q's device cpu", "move the model and its inputs together"),
        (R, "proj_q", "be on q's device cpu", "move the model and its inputs together"),
        (R, "proj_k", "be on q's device cpu", "move the model and its inputs together"),
    )
    for op in ops
]


def call(op: Any, wrong: dict[str, Any]) -> Any:
    args = good() | {name: value() if callable(value) else value for name, value in wrong.items()}
    return op(*flat(record(RECORDS[op], args)))


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize(("op", "wrong", "message"), CASES, ids=[f"{c[0].name}-{c[2][:50]}" for c in CASES])
def test_refusal(op: Any, wrong: dict[str, Any], message: str, fake: bool) -> None:
    with FakeTensorMode() if fake else nullcontext(), pytest.raises(ValueError, match="must") as refused:
        call(op, wrong)
    assert str(refused.value) == message


@pytest.mark.parametrize(("op", "name", "message"), ON_ANOTHER_DEVICE, ids=[c[2][:40] for c in ON_ANOTHER_DEVICE])
def test_refusal_of_a_second_device(op: Any, name: str, message: str) -> None:
    """Asked of the checks themselves: PyTorch refuses fakes on two devices before the op sees them."""
    args = good()
    args[name] = args[name].to("meta")
    check: dict[Any, Any] = {
        route: checks.check_route,
        attention: checks.check_attention,
        attention_backward: checks.check_backward,
        sparse_attention: checks.check_sparse,
        sparse_attention_backward: checks.check_sparse_backward,
        select: checks.check_select,
    }
    with pytest.raises(ValueError, match="must") as refused:
        check[op](record(RECORDS[op], args))
    assert str(refused.value) == message


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_what_is_right_is_taken(fake: bool) -> None:
    def shapes() -> list[tuple[int, ...]]:
        return [tuple(x.shape) for op in RECORDS for x in call(op, {})]

    want = [
        (2, 4, 2, 1), (2, 4, 2), (2, 4, 2), (2, 2, 16),
        (2, 4, 40, 24), (2, 4, 40),
        (2, 4, 40, 16), (2, 2, 50, 16), (2, 2, 50, 24), (2, 2, 16), (4,), (4, 1),
        (2, 4, 40, 24), (2, 4, 40), (2, 4, 40),
        (2, 4, 40, 16), (2, 2, 50, 16), (2, 2, 50, 24),
        (2, 4, 2, 3), (2, 4, 2), (2, 4, 2), (2, 2, 16),
    ]  # fmt: skip
    with FakeTensorMode() if fake else nullcontext():
        assert shapes() == want


def test_every_refusal_is_tested() -> None:
    """Each fix that the checks can name stands in one of the messages above."""
    calls = [n for n in ast.walk(ast.parse(inspect.getsource(checks))) if isinstance(n, ast.Call)]
    fixes = [
        str(n.args[3].value)
        for n in calls
        if isinstance(n.func, ast.Name) and n.func.id == "fail" and isinstance(n.args[3], ast.Constant)
    ]
    assert len(fixes) >= 20
    known = [message for *_, message in (*CASES, *ON_ANOTHER_DEVICE)]
    for fix in fixes:
        assert any(message.endswith(f"; {fix}") for message in known), fix


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ([0, 4], "hold key blocks 0 to 3, or -1 behind the last, got 4"),
        ([-2, 1], "hold key blocks 0 to 3, or -1 behind the last, got -2"),
        ([2, 1], r"ascend in each row, with every -1 at its end, got \[2, 1\]"),
        ([1, 1], "ascend in each row"),
        ([-1, 1], "ascend in each row"),
    ],
)
def test_debug_mode_refuses_a_table_that_no_router_made(
    row: list[int], rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLA2_DEBUG", "1")
    # good()'s key_mask lets a row end early
    lut = torch.tensor([0, 3], dtype=torch.int32).expand(2, 4, 2, 2).clone()
    call = {**good(), "lut": lut}
    attention(*record(AttentionArgs, call))
    lut[1, 2, 1] = torch.tensor([3, -1])
    attention(*record(AttentionArgs, call))
    lut[1, 2, 1] = torch.tensor(row)
    with pytest.raises(ValueError, match=f"lut must {rule}"):
        attention(*record(AttentionArgs, call))


@pytest.mark.parametrize(("row", "rule"), [([0, 4], "hold key blocks 0 to 3"), ([1, 1], "ascend in each row")])
def test_debug_mode_refuses_it_in_the_backward_too(
    row: list[int], rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLA2_DEBUG", "1")
    lut = torch.tensor([0, 3], dtype=torch.int32).expand(2, 4, 2, 2).clone()
    saved = {**good(), "lut": lut}
    attention_backward(*flat(record(BackwardArgs, saved)))
    lut[1, 2, 1] = torch.tensor(row)
    with pytest.raises(ValueError, match=f"lut must {rule}"):
        attention_backward(*flat(record(BackwardArgs, saved)))


def test_values_of_a_table_are_not_read_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLA2_DEBUG", "0")
    lut = torch.full((2, 4, 2, 1), 99, dtype=torch.int32)
    checks.check_table(record(AttentionArgs, {**good(), "lut": lut}))
    monkeypatch.setenv("SLA2_DEBUG", "1")
    with pytest.raises(ValueError, match="lut must hold key blocks"):
        checks.check_table(record(AttentionArgs, {**good(), "lut": lut}))


def test_only_causality_and_masks_make_a_row_end_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLA2_DEBUG", "1")
    lut = torch.tensor([0, -1], dtype=torch.int32).expand(2, 4, 2, 2)
    for change in ({}, {"key_mask": None, "is_causal": True}):
        call = {**good(), "lut": lut, **change}
        attention(*record(AttentionArgs, call))
    call = {**good(), "lut": lut, "key_mask": None}
    with pytest.raises(ValueError, match=r"hold key blocks 0 to 3, got -1; .* and key_mask, or look for NaN"):
        attention(*record(AttentionArgs, call))


def test_the_path_of_a_gpu_refuses_the_same() -> None:
    """Metadata is checked before the table is: the rule comes out, not an IndexError of the check's own."""
    pytest.importorskip("triton", reason="triton is not installed")
    from sla2_compile.kernels.cuda import dispatch as cuda

    for change, rule in (
        ({"k": torch.zeros(2, 50)}, "k must have shape"),
        ({"block_k": 0}, "block_k must be a power of two"),
        ({"lut": torch.zeros(2, 4, 2, 1)}, "lut must be int32"),
    ):
        call = {**good(), **change}
        with pytest.raises(ValueError, match=rule):
            cuda.attention(record(AttentionArgs, call))
    call = {**good(), "proj_q": torch.eye(3)}
    with pytest.raises(ValueError, match="proj_q must have shape"):
        cuda.route(record(RouteArgs, call))
