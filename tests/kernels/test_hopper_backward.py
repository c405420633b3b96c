"""The backward's Hopper kernels: which calls they take, and on a GPU what they compute.

`test_aot.py` compiles them without a GPU; `test_triton_backward_edges.py` has cases with their blocks, too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from sla2_compile.kernels.arguments import BackwardArgs, BackwardResult, Saved
from sla2_compile.kernels.cuda.backward import sm90
from sla2_compile.kernels.cuda.backward.launches import facts_of_backward
from sla2_compile.kernels.cuda.forward import states_launches
from sla2_compile.kernels.functional import sla2_attention
from sla2_compile.kernels.kinds import Kind
from sla2_compile.kernels.layout import Layout
from sla2_compile.kernels.options import AttentionOptions
from sla2_compile.kernels.support import support
from tests.kernels.backward_case import check_gradients, gradient_of, saved_call
from tests.kernels.schedules import forget_schedules, remember_tensors, state_bytes, without_fused
from tests.kernels.test_hopper import H100, call_of, tensors
from tests.kernels.test_triton_backward_edges import WHOLE, Fenced, among_nan
from tests.kernels.triton_case import INTERPRETED, Case, poison_outputs, scheduled_backward

PLAIN = Case(D=64, Dv=64, block_q=128, block_k=64, Nq=300, Nk=459)
WIDE = replace(PLAIN, D=128, Dv=128)
CASES = {
    "plain": PLAIN,
    "D 128": WIDE,
    "D 128, relu": replace(WIDE, feature_map="relu", groups=1),
    "D 128, elu, many heads a key head": replace(WIDE, feature_map="elu", groups=4),
    # zeros behind a head dim must not count, nor what lies behind the rows of a state
    "D 40, relu": replace(PLAIN, D=40, Dv=40, feature_map="relu"),
    "D 48, elu, one alpha a head": replace(PLAIN, D=48, Dv=48, feature_map="elu", alpha="head"),
    "D 72, batch, heads": replace(PLAIN, D=72, Dv=72, B=2, heads=2),
    "D 80, elu, (B, N, H, D)": replace(PLAIN, D=80, Dv=80, feature_map="elu", transposed=True, B=2),
    "D 96, alpha of blocks": replace(PLAIN, D=96, Dv=96, alpha="block"),
    "D 120, all keys": replace(PLAIN, D=120, Dv=120, linear_scope="all"),
    # fewer steps than stages, and halves of a query block without a row
    "three keys": replace(PLAIN, Nk=3, Nq=4, groups=1),
    "three keys, D 128": replace(WIDE, Nk=3, Nq=4, groups=1),
    "one block": replace(WIDE, Nk=64, Nq=128, groups=1),
    "half a block more": replace(PLAIN, Nq=128 + 64, Nk=128),
    "empty complement": replace(WIDE, topk_ratio=1.0, alpha="none"),
    "long lists": replace(PLAIN, Nq=128 * 12 + 4, Nk=64 * 20, topk_ratio=0.5),
    "long lists, D 128": replace(WIDE, Nq=128 * 12 + 4, Nk=64 * 20, topk_ratio=0.5, alpha="none"),
    "large values": replace(PLAIN, scale_of_values=30.0, compression_ratio=4),
}


def fused(call: Any, do: Tensor | None = None, o: Tensor | None = None) -> bool:
    """Whether an H100 runs a backward by kernels of its own; do, o: contiguous if None."""
    B, Hq, Nq, _ = call.q.shape
    plain = torch.empty(B, Hq, Nq, call.v.shape[3], dtype=call.q.dtype)
    given: Any = Layout.of_all(*(plain if x is None else x for x in (do, o)), torch.empty(B, Hq, Nq))
    args: BackwardArgs[Layout] = BackwardArgs(given[0], Saved(given[1], given[2], call))
    return support(facts_of_backward(args)._replace(chip=H100)).kernel == "fused"


def test_takes_what_the_table_says() -> None:
    q, k, v = tensors()
    assert fused(call_of(q, k, v))
    # as PyTorch's attention and `arguments.output` lay them out
    assert fused(call_of(q, k, v), *(q.transpose(1, 2).contiguous().transpose(1, 2) for _ in range(2)))
    for D in (40, 64, 72, 96, 120):
        assert fused(call_of(*tensors(D=D)))
    for D in (32, 36, 136):
        assert not fused(call_of(*tensors(D=D)))
    # as `sum` has it for o, or a mean over the sequence
    assert not fused(call_of(q, k, v), torch.ones((), dtype=q.dtype).expand(q.shape))
    assert not fused(call_of(q, k, v), q[:, :, :1].expand(q.shape))
    assert not fused(call_of(q, k, v), o=torch.empty(2, 4, 256, 130, dtype=q.dtype)[..., :128])
    # rows of float32 begin at multiples of 16 bytes
    assert fused(call_of(q[:, :, :252], k, v))
    assert not fused(call_of(q[:, :, :254], k, v))
    assert not fused(call_of(*(x.half() for x in (q, k, v))))
    assert fused(call_of(q, k, v, low_bit="int8"))
    for changes in ({"low_bit": "int8_fp8"}, {"is_causal": True}, {"block_q": 64}):
        assert not fused(call_of(q, k, v, **changes))
    # linear gradients are divided by it
    for scale, taken in ((1e-17, True), (1e-20, False), (1e17, True), (1e20, False)):
        assert fused(call_of(q, k, v, scale=scale)) is taken


@pytest.mark.parametrize("case", [*CASES.values(), WHOLE], ids=[*CASES, "whole"])
def test_cases_are_of_these_kernels(case: Case) -> None:
    """Those below, and those of the edges."""
    B, H, N, D = case.B, case.heads, case.Nk, case.D
    q = torch.empty(B, H * case.groups, case.Nq, D, dtype=case.dtype)
    k, v = torch.empty(B, H, N, D, dtype=case.dtype), torch.empty(B, H, N, case.Dv, dtype=case.dtype)
    assert fused(call_of(q, k, v, block_q=case.block_q, block_k=case.block_k))


if not INTERPRETED:
    HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    skipped = pytest.mark.skipif(not HOPPER, reason="not a Hopper GPU")

    @pytest.fixture
    def took(monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The names of the fused launches that are scheduled from here on, in order."""
        seen: list[str] = []

        def noted(name: str) -> Any:
            launch = getattr(sm90, name)

            def call(*args: Any) -> None:
                seen.append(name)
                launch(*args)

            return call

        for name in ("rows", "keys", "queries"):
            monkeypatch.setattr(sm90, name, noted(name))
        return seen

    def assert_near(got: BackwardResult[Tensor], want: BackwardResult[Tensor], tolerance: float = 0.01) -> None:
        for name in ("dq", "dk", "dv"):
            a, b = getattr(got, name).double(), getattr(want, name).double()
            error = ((a - b).norm() / b.norm()).item()
            print(f"{name}: norm of difference {error:.3e}")
            assert error <= tolerance, name

    @pytest.mark.gpu
    @skipped
    @pytest.mark.parametrize("name", CASES)
    def test_gradients(name: str, took: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        poison_outputs(monkeypatch)
        check_gradients(CASES[name])
        assert took == ["rows", "keys", "queries"]

    @pytest.mark.gpu
    @skipped
    @pytest.mark.parametrize("D", [64, 80, 128])
    def test_same_as_the_kernels_that_these_replace(D: int, took: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        case = replace(WIDE, D=D, Dv=D, heads=2, Nq=128 * 40 + 68, Nk=64 * 60 - 5, topk_ratio=0.2)
        saved = saved_call(case, case.tensors())
        do = gradient_of(saved.o)
        got = scheduled_backward(BackwardArgs(do, saved))
        assert took
        without_fused(monkeypatch)
        forget_schedules()
        took.clear()
        assert_near(got, scheduled_backward(BackwardArgs(do, saved)))
        assert not took

    @pytest.mark.gpu
    @skipped
    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("D", [48, 64, 96, 128])
    def test_after_int8_as_the_kernels_that_these_replace(
        D: int, groups: int, took: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """These hold the whole numbers of 8 bits in bfloat16, and those in int8."""
        case = replace(WIDE, D=D, Dv=D, groups=groups, Nq=128 * 10 + 68, Nk=64 * 20 - 5, topk_ratio=0.2)
        saved = saved_call(case, case.tensors(), "int8")
        do = gradient_of(saved.o)
        got = [scheduled_backward(BackwardArgs(do, saved)) for _ in range(2)]
        assert took == ["rows", "keys", "queries"]
        without_fused(monkeypatch)
        forget_schedules()
        want = scheduled_backward(BackwardArgs(do, saved))
        assert len(took) == 3
        for made in got:
            assert_near(made, want)

    @pytest.mark.gpu
    @skipped
    @pytest.mark.parametrize("N", [2048, 128 * 140])
    @pytest.mark.parametrize("D", [64, 128])
    def test_a_step_that_keeps_the_sums_of_states(
        D: int, N: int, took: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of a short call, by a kernel, and of a long one, by a GEMM; the backward by the op computes them again."""
        options = AttentionOptions(topk_ratio=0.1, block_q=128, block_k=64)
        leaves = [torch.randn(1, 2, N, D, device="cuda").bfloat16().requires_grad_() for _ in range(3)]
        leaves += [torch.rand(2, device="cuda").requires_grad_(), torch.randn(2, 1, device="cuda").requires_grad_()]
        do = gradient_of(leaves[0].detach())

        def step() -> tuple[Tensor, ...]:
            q, k, v, gain, bias = leaves
            o = sla2_attention(q, k, v, options, alpha_gain=gain, alpha_bias=bias, training=True)
            return torch.autograd.grad(o, leaves, do)

        got = [step() for _ in range(3)]
        assert took == ["rows", "keys", "queries"]
        monkeypatch.setattr(Kind, "ask_step", lambda self, tensors: None)
        forget_schedules()
        want = step()
        for made in got:
            for a, b in zip(made, want, strict=True):
                assert (a - b).norm() <= 4e-3 * b.norm()

    @pytest.mark.gpu
    @skipped
    @pytest.mark.parametrize("D", [64, 128])
    def test_same_bits_every_time(D: int, took: list[str]) -> None:
        """A race would show as results that differ. Later runs go straight to the driver, at other addresses."""
        case = replace(WIDE, D=D, Dv=D, heads=4, Nq=128 * 60, Nk=64 * 100, topk_ratio=0.2)
        saved = saved_call(case, case.tensors())
        do = gradient_of(saved.o)
        args = BackwardArgs(do, saved)
        first, kept = scheduled_backward(args), []
        assert took
        for n in range(20):
            if n % 5 == 0:
                moved = {name: getattr(saved.call, name).clone() for name in ("q", "k", "v")}
                args = BackwardArgs(do.clone(), saved._replace(call=saved.call._replace(**moved)))
            # results that are kept are not where the next ones go
            kept.append(scheduled_backward(args))
            for name, a, b in zip(BackwardResult._fields, first, kept[-1], strict=True):
                assert torch.equal(a, b), (name, n)

    @pytest.mark.gpu
    @skipped
    @pytest.mark.parametrize("D", [72, 128])
    def test_heads_in_groups(D: int, took: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """Bounded memory for the states: three heads at a time, and one that is left."""
        case = replace(WIDE, D=D, Dv=D, B=2, heads=2)
        saved = saved_call(case, case.tensors())
        do = gradient_of(saved.o)
        kept = remember_tensors(monkeypatch)
        whole = scheduled_backward(BackwardArgs(do, saved))
        monkeypatch.setattr(states_launches, "STATE_BYTES", state_bytes(kept, 3, of=4))
        forget_schedules()
        took.clear()
        # by Triton, and then straight to the driver
        for _ in range(2):
            assert_near(scheduled_backward(BackwardArgs(do, saved)), whole, 1e-3)
        assert took == ["rows", "keys"] * 2 + ["queries"]

    @pytest.mark.gpu
    @skipped
    @pytest.mark.parametrize("case", [PLAIN, WIDE], ids=["D 64", "D 128"])
    def test_in_a_graph(case: Case, took: list[str]) -> None:
        saved = saved_call(case, case.tensors())
        args = BackwardArgs(gradient_of(saved.o), saved)
        want = scheduled_backward(args)
        assert took
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = scheduled_backward(args)
        for _ in range(2):
            for part in got:
                part.zero_()
            graph.replay()
            for name, a, b in zip(BackwardResult._fields, got, want, strict=True):
                assert torch.equal(a, b), name

    @pytest.mark.gpu
    @skipped
    @pytest.mark.parametrize("D", [64, 72, 128])
    @pytest.mark.parametrize("place", ["q", "do", "k", "v", "outside"])
    def test_what_is_no_number_stays_where_it_is_in_the_others(
        place: str, D: int, took: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A NaN in one row, or in all rows on either side of each head's."""
        case = replace(PLAIN, D=D, Dv=D, B=2, groups=1, alpha="none")
        saved = saved_call(case, case.tensors())
        call, do = saved.call, gradient_of(saved.o)
        if place == "outside":
            call = call._replace(q=among_nan(call.q), k=among_nan(call.k), v=among_nan(call.v))
            args = BackwardArgs(among_nan(do), saved._replace(o=among_nan(saved.o), call=call))
        else:
            x = do if place == "do" else getattr(call, place)
            x[0, 0, 70] = float("nan")
            args = BackwardArgs(do, saved)
        fenced = Fenced(monkeypatch)
        got = scheduled_backward(args)
        fenced.assert_whole()
        assert took
        without_fused(monkeypatch)
        forget_schedules()
        want = scheduled_backward(args)
        # those of the other batch are numbers
        assert all(getattr(got, name)[1].isfinite().all() for name in ("dq", "dk", "dv"))
        for name, a, b in zip(BackwardResult._fields, got, want, strict=True):
            assert torch.equal(a.isfinite(), b.isfinite()), name
        if place == "outside":
            assert all(part.isfinite().all() for part in got)
            assert_near(got, want)

    @pytest.mark.gpu
    @skipped
    def test_a_gradient_that_cannot_be_copied(took: list[str]) -> None:
        """An expanded one runs by the others."""
        saved = saved_call(PLAIN, PLAIN.tensors())
        do = gradient_of(saved.o)[:, :, :1].expand(saved.o.shape)
        got = scheduled_backward(BackwardArgs(do, saved))
        assert not took
        assert_near(got, scheduled_backward(BackwardArgs(do.contiguous(), saved)))
        assert took == ["rows", "keys", "queries"]
