"""Low bit where no kernel runs: the emulation that specifies it against full precision, and what runs where."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import low_bit as low_bit_benchmark
from sla2_compile.kernels import functional, kinds, precision
from sla2_compile.kernels.functional import AttentionOptions, sla2_attention
from sla2_compile.kernels.precision import low_bit_of, low_bit_on
from sla2_compile.kernels.reference import low_bit as reference_low_bit
from sla2_compile.kernels.reference import sla2 as reference
from sla2_compile.kernels.support import MOST_KEPT
from tests.kernels.test_numerics import Case

levels = pytest.mark.parametrize("low_bit", ["int8", "int8_fp8"])


def both(case: Case, low_bit: str, **changed: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(o, lse, o_sparse, o_linear) in float64, in low bit and in full precision, over the same blocks."""
    x = {**case.tensors(), **changed}
    x["lut"], x["log_rest"], _, x["k_mean"] = case.route(x, reference.route)
    return case.attention(x, reference.attention, low_bit), case.attention(x, reference.attention)


SHAPES = {
    "D 64": Case(Nq=200, Nk=333, D=64, Dv=64, block_q=64, block_k=32),
    "D 128": Case(B=1, Nq=200, Nk=457, D=128, Dv=128, block_q=64, block_k=64, topk_ratio=0.5),
    "causal": Case(Nq=200, Nk=203, D=64, Dv=64, block_q=32, block_k=32, is_causal=True),
    "masked": Case(Nq=100, Nk=333, D=96, Dv=40, block_q=64, block_k=32, masked=True),
}


@levels
@pytest.mark.parametrize("name", SHAPES)
def test_error_on_normal_data(name: str, low_bit: str) -> None:
    """What 8 bits give: INT8 about 1 % of the norm, and E4M3's three bits of mantissa about 4 %.

    Beside bf16's own: `test_error_beside_that_of_bf16` of the kernels.
    """
    low, full = both(SHAPES[name], low_bit)
    assert torch.equal(low[3], full[3])
    for got, want in zip(low[:3], full[:3], strict=True):
        assert torch.equal(got.isfinite(), want.isfinite())
    error = ((low[2] - full[2]).norm() / full[2].norm()).item()
    least, most = {"int8": (0.004, 0.02), "int8_fp8": (0.02, 0.05)}[low_bit]
    assert least < error < most
    seen = full[1].isfinite()
    assert (low[1] - full[1])[seen].abs().max() < 0.05


def test_committed_errors_say_what_the_page_says() -> None:
    """The table is that of the data; INT8 is within 3 times bf16's error with few key blocks, FP8 nowhere."""
    result = json.loads(low_bit_benchmark.RESULTS.read_text())
    assert low_bit_benchmark.RESULTS.with_suffix(".md").read_text() == low_bit_benchmark.document(result)
    normal = [row for row in result["rows"] if row["data"] == "normal"]
    few = [row for row in normal if row["topk"] / row["tn"] < 0.06]
    many = [row for row in normal if row["topk"] / row["tn"] > 0.06]
    assert {row["D"] for row in few} == {row["D"] for row in many} == {64, 128}
    assert all(low_bit_benchmark.within_limit(row) == ["int8 whole"] for row in few)
    assert not any(low_bit_benchmark.within_limit(row) for row in many)
    page = (
        (low_bit_benchmark.RESULTS.parents[2] / "docs" / "method.md").read_text().replace("*", "").replace(" %", "%")
    )
    named = {"1 of 32", "2 of 32", "4 of 32", "8 of 32"}
    shown = [row for row in normal if row["N"] == 2048 and row["D"] == 128]
    assert {f"{row['topk']} of {row['tn']}" for row in shown} == named
    for row in shown:
        cells = low_bit_benchmark.document({**result, "rows": [row]}).splitlines()[-1].split(" | ")[4:-1]
        assert f"| normal, {' | '.join(cells)} |" in page


@levels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_takes_every_dtype(low_bit: str, dtype: torch.dtype) -> None:
    case = SHAPES["D 64"]
    made = {n: t.to(dtype) for n, t in case.tensors().items() if t is not None}
    low, _ = both(case, low_bit, **made)
    assert all(x.dtype == dtype and x.isfinite().all() for x in low)


def test_v_scale_of_a_block_does_not_move_the_others() -> None:
    """A block whose values are 1e6 times larger takes its own scale; rows that do not see it stay as they were."""
    case = replace(SHAPES["causal"], heads=1, groups=1, B=1)
    x = case.tensors()
    late = x["v"].clone()
    late[:, :, 160:] *= 1e6
    before, _ = both(case, "int8_fp8")
    after, full = both(case, "int8_fp8", v=late)
    assert torch.equal(before[2][:, :, :160], after[2][:, :, :160])
    error = (after[2] - full[2]).norm() / full[2].norm()
    assert error < 0.06


def test_round_trip_of_the_format() -> None:
    x = torch.randn(2, 3, 75, 40, generator=torch.Generator().manual_seed(0))
    real = torch.rand(2, 75, generator=torch.Generator().manual_seed(1)) < 0.8
    k8, k_scale = reference_low_bit.quantise_keys(x, real, 32)
    v8, v_log = reference_low_bit.quantise_values(x, real, 32)
    assert k8.shape == v8.shape == (2, 3, 3, 32, 40)
    want = x * real[:, None, :, None]
    steps = k_scale[..., None, None].expand(k8.shape)
    got = (k8 * steps).flatten(2, 3)[:, :, :75]
    assert ((got - want).abs() <= 0.501 * steps.flatten(2, 3)[:, :, :75]).all()
    got = (v8.float() * v_log.exp2()[..., None, None]).flatten(2, 3)[:, :, :75]
    assert ((got - want).abs() <= want.abs() / 16 + 1e-4).all()
    assert not k8.flatten(2, 3)[:, :, 75:].any()
    assert not v8.float().flatten(2, 3)[:, :, 75:].any()
    order = reference_low_bit.key_order(64)
    assert torch.equal(order, torch.arange(64).view(2, 2, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(-1))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the rule believe in a chip: gpu(90)."""
    pytest.importorskip("triton", reason="triton is not installed")
    from sla2_compile.kernels.cuda import device

    def of(capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(device, "capability", lambda device: capability)
        monkeypatch.setattr(device, "shared_limit", lambda device: 163 * 1024)

    return of


# asked, capability, dtype, (block_q, block_k), scale is positive -> what runs
TABLE = [
    ("none", 90, torch.bfloat16, (128, 64), True, "none"),
    ("int8", 80, torch.bfloat16, (128, 64), True, "int8"),
    ("int8", 90, torch.float16, (128, 64), True, "int8"),
    ("int8", 90, torch.bfloat16, (32, 16), True, "int8"),
    ("int8_fp8", 80, torch.bfloat16, (128, 64), True, "int8"),
    ("int8_fp8", 86, torch.bfloat16, (128, 64), True, "int8"),
    ("int8_fp8", 89, torch.bfloat16, (128, 64), True, "int8_fp8"),
    ("int8_fp8", 90, torch.float16, (64, 32), True, "int8_fp8"),
    ("int8_fp8", 100, torch.bfloat16, (128, 128), True, "int8_fp8"),
    ("int8_fp8", 90, torch.bfloat16, (32, 16), True, "int8"),
    ("int8_fp8", 75, torch.float16, (128, 64), True, "none"),
    ("int8_fp8", 90, torch.float32, (128, 64), True, "none"),
    ("int8_fp8", 90, torch.bfloat16, (128, 256), True, "none"),
    ("int8_fp8", 90, torch.bfloat16, (128, 64), False, "none"),
]


@pytest.mark.parametrize(("asked", "arch", "dtype", "blocks", "positive", "runs"), TABLE)
def test_what_runs(
    asked: str, arch: int, dtype: torch.dtype, blocks: tuple[int, int], positive: bool, runs: str, gpu: Any
) -> None:
    gpu(arch)
    rest: Any = (asked, positive, True, True, True)
    assert low_bit_on(torch.device("cuda"), dtype, 64, 64, *blocks, *rest) == runs
    assert low_bit_on(torch.device("cpu"), dtype, 64, 64, *blocks, *rest) == "none"
    with FakeTensorMode():
        q = torch.empty(1, 2, 300, 64, device="cuda", dtype=dtype)
    scale = 0.125 if positive else -0.125
    assert low_bit_of(asked, q, 64, *blocks, scale, 32, 0.05, True) == runs


# capability, D, Dv, (block_q, block_k), key blocks, share kept, plain -> what auto runs
AUTO = [
    (90, 128, 128, (128, 64), 1024, 0.03125, True, "int8"),
    (90, 128, 128, (128, 64), 1023, 0.03125, True, "none"),
    (90, 128, 128, (128, 64), 1024, 0.0313, True, "none"),
    (90, 128, 128, (128, 64), 1334, 0.15, True, "none"),
    (90, 128, 128, (128, 64), 1200, 0.03, False, "none"),
    (90, 64, 64, (128, 64), 1200, 0.03, True, "none"),
    (90, 96, 96, (128, 64), 1200, 0.03, True, "none"),
    (90, 128, 64, (128, 64), 1200, 0.03, True, "none"),
    (90, 128, 128, (64, 64), 1200, 0.03, True, "none"),
    (80, 128, 128, (128, 64), 1200, 0.03, True, "none"),
    (100, 128, 128, (128, 64), 1200, 0.03, True, "none"),
]


@pytest.mark.parametrize(("arch", "D", "Dv", "blocks", "tn", "share", "plain", "runs"), AUTO)
def test_auto_runs_what_is_faster_and_close_enough(
    arch: int, D: int, Dv: int, blocks: tuple[int, int], tn: int, share: float, plain: bool, runs: str, gpu: Any
) -> None:
    gpu(arch)
    with FakeTensorMode():
        q = torch.empty(1, 2, 300, D, device="cuda", dtype=torch.bfloat16)
        cpu = q.to("cpu")
    call = (Dv, *blocks, D**-0.5, tn, share, plain)
    assert low_bit_of("auto", q, *call) == runs
    assert low_bit_of("auto", q.float(), *call) == "none"
    assert low_bit_of("auto", cpu, *call) == "none"


def test_auto_keeps_the_rule_where_it_was_measured() -> None:
    """Every row measured at its limit of the key blocks is within 3 times bf16's error."""
    rows = json.loads(low_bit_benchmark.RESULTS.read_text())["rows"]
    at_limit = [row for row in rows if row["topk_ratio"] == MOST_KEPT and row["D"] == 128]
    assert {row["topk"] for row in at_limit} == {1, 2, 4, 8}
    assert all(row["topk"] / row["tn"] == MOST_KEPT for row in at_limit)
    assert all("int8 whole" in low_bit_benchmark.within_limit(row) for row in at_limit)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"key_mask": torch.ones(1, 300, dtype=torch.bool)}])
def test_a_call_says_how_many_blocks_and_whether_it_is_plain(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def decide(*args: Any, plain: bool) -> str:
        seen.append((*args[6:8], plain))
        return "none"

    monkeypatch.setattr(kinds, "low_bit_of", decide)
    q = torch.randn(1, 1, 300, 16)
    sla2_attention(q, q, q, AttentionOptions(0.5, 8, 32, 16, low_bit="auto"), **options)
    assert seen == [(19, 0.5, not options)]


def test_without_cuda_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked: Any = ("int8", True, True, True, True)
    assert low_bit_on(torch.device("cuda"), torch.bfloat16, 64, 64, 128, 64, *asked) == "none"


class OnGpu:
    """What the rule reads of a tensor, as if it were on a GPU."""

    def __init__(self, q: Tensor) -> None:
        self.shape, self.dtype, self.device = q.shape, q.dtype, torch.device("cuda")


@pytest.mark.parametrize(
    ("low_bit", "topk_ratio", "answers", "frames"),
    [
        ("int8_fp8", 0.05, ["int8_fp8"] * 4, 1),
        ("int8", 0.15, ["int8"] * 4, 1),
        # the share is a constant, the number of blocks parts two graphs
        ("auto", 0.15, ["none"] * 4, 1),
        ("auto", 0.03, ["none", "none", "int8", "int8"], 2),
    ],
)  # fmt: skip
def test_lengths_that_share_a_graph(
    low_bit: str, topk_ratio: float, answers: list[str], frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamic shapes: only `auto`, and only where the length decides, makes a second graph."""
    from torch._dynamo.testing import CompileCounter

    from sla2_compile.kernels.blocks import num_blocks

    def decide(*args: Any) -> str:
        """What sm_90 runs; Dynamo itself would look for the chip that is not there."""
        low_bit, _, _, few, many = args[6:]
        return ("int8" if few and many else "none") if low_bit == "auto" else low_bit

    decide._dynamo_marked_constant = True  # type: ignore[attr-defined]
    monkeypatch.setattr(precision, "low_bit_on", decide)
    words: list[str] = []

    def call(q: Tensor) -> Tensor:
        on_gpu: Any = OnGpu(q)
        tn = num_blocks(q.shape[2], 64)
        word = low_bit_of(low_bit, on_gpu, 128, 128, 64, 1.0, tn, topk_ratio, True)
        return q + ("none", "int8", "int8_fp8").index(word)

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(call, backend=counter, dynamic=True, fullgraph=True)
    for n in (4096, 8192, 70000, 75600):
        found = compiled(torch.zeros(1, 1, n, 128, dtype=torch.bfloat16))
        words.append(("none", "int8", "int8_fp8")[int(found[0, 0, 0, 0])])
    assert words == answers
    assert counter.frame_count == frames


def test_the_decision_is_a_constant_of_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where head dims and scale are symbolic, and with no recompilation for another length."""
    asked = []

    def decide(*args: Any) -> str:
        asked.append(args)
        return "int8"

    decide._dynamo_marked_constant = True  # type: ignore[attr-defined]
    assert precision.low_bit_on._dynamo_marked_constant  # type: ignore[attr-defined]
    monkeypatch.setattr(precision, "low_bit_on", decide)

    def call(q: Tensor, v: Tensor) -> Tensor:
        gpu: Any = OnGpu(q)
        low_bit = low_bit_of("int8_fp8", gpu, v.shape[3], 64, 32, q.shape[3] ** -0.5, 32, 0.5, True)
        return q + len(low_bit)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (75, 130, 33):
            q = torch.randn(2, 3, n, 40)
            assert torch.equal(compiled(q, q), q + 4)
    known = (torch.device("cuda"), torch.float32, 64, 64, 64, 32)
    assert asked == [(*known, "int8_fp8", True, True, False, True)]


def test_a_word_that_is_none() -> None:
    q = torch.randn(1, 1, 64, 16)
    with pytest.raises(ValueError, match="low_bit must be one of none, auto, int8, int8_fp8, got 'fp4'"):
        sla2_attention(q, q, q, AttentionOptions(low_bit="fp4"))


class Asked(Exception):
    """Raised in the op's place, with the low_bit that it was asked for."""


@levels
def test_a_call_asks_for_what_runs(low_bit: str, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*args: Any) -> None:
        raise Asked(args[16])

    gpu(90)
    monkeypatch.setattr(functional, "forward", ask)
    options = AttentionOptions(block_q=64, block_k=32, low_bit=low_bit)
    cases = [
        ("cuda", torch.bfloat16, low_bit),
        ("cuda", torch.float32, "none"),
        ("cpu", torch.bfloat16, "none"),
    ]
    for device, dtype, runs in cases:
        with FakeTensorMode():
            q = torch.empty(1, 2, 300, 64, device=device, dtype=dtype)
            with pytest.raises(Asked, match=f"^{runs}$"):
                sla2_attention(q, q, q, options)


def test_the_mode_of_a_call_decides_its_format_and_autograd_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def decide(*args: Any, **rest: Any) -> str:
        seen.append(args[0])
        return "none"

    monkeypatch.setattr(kinds, "low_bit_of", decide)
    for grad in (True, False):
        for training in (True, False):
            q = torch.randn(1, 1, 64, 16, requires_grad=True)
            kinds.kind_of.cache_clear()
            with torch.set_grad_enabled(grad):
                sla2_attention(q, q, q, AttentionOptions(low_bit="int8"), training=training)
    assert seen == ["none", "int8"] * 2


@levels
def test_traces_where_it_does_not_run(low_bit: str) -> None:
    """On a CPU a recipe's low_bit changes nothing: eager, compiled and exported."""
    q, k, v = (torch.randn(1, 2, n, 16) for n in (75, 107, 107))
    options = AttentionOptions(block_q=32, block_k=16, topk_ratio=0.3, low_bit=low_bit)

    class Call(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sla2_attention(q, k, v, options)

    want = sla2_attention(q, k, v, replace(options, low_bit="none"))
    torch._dynamo.reset()
    for run in (Call(), torch.compile(Call(), fullgraph=True, backend="aot_eager", dynamic=True)):
        assert torch.equal(run(q, k, v), want)
    for strict in (False, True):
        assert torch.equal(torch.export.export(Call(), (q, k, v), strict=strict).module()(q, k, v), want)
