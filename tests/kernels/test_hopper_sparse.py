"""Hopper's kernels of `sla2::sparse_attention`: which calls they take, and on a GPU what they compute.

`test_aot.py` compiles them without one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from sla2_compile.kernels.arguments import SparseArgs, SparseBackwardArgs, SparseSaved
from sla2_compile.kernels.cuda.sparse import sm90
from sla2_compile.kernels.cuda.sparse.cuts_sm90 import forward_cut, queries_cut, terms_cut
from sla2_compile.kernels.cuda.sparse.launches import facts_of_sparse
from sla2_compile.kernels.layout import Layout
from sla2_compile.kernels.records import of, split
from sla2_compile.kernels.reference import methods as reference
from sla2_compile.kernels.support import Chip, support
from tests.kernels.methods_case import SparseCase
from tests.kernels.schedules import forget_schedules
from tests.kernels.test_triton_backward_edges import Fenced
from tests.kernels.test_triton_sparse import WILD, among_nan, check_forward, on_device
from tests.kernels.test_triton_sparse_backward import backward_of, by_autograd, check_backward
from tests.kernels.triton_case import INTERPRETED, poison_outputs, scheduled_sparse, scheduled_sparse_backward

PLAIN = SparseCase(B=1, heads=2, groups=2, Nq=300, Nk=459, D=64, Dv=64, block_q=128, block_k=64, topk_ratio=0.3)
WIDE = replace(PLAIN, D=128, Dv=128)
SHAPES = {
    "plain": PLAIN,
    "wide": WIDE,
    "blocks of 64": replace(PLAIN, block_q=64),
    "wide, blocks of 64": replace(WIDE, block_q=64, B=2),
    "three keys": replace(PLAIN, Nk=3, Nq=5),
    "one block": replace(WIDE, Nk=64, Nq=128),
    "more than a tile of pooled terms": replace(WIDE, Nk=64 * 150 + 7, topk_ratio=0.04, heads=1),
    "many query blocks": replace(PLAIN, Nq=128 * 300, groups=1),
    "every block selected": replace(WIDE, topk_ratio=1.0),
    "masked": replace(PLAIN, masked=True, B=2),
    "wide, masked": replace(WIDE, masked=True, B=2, Nk=1003),
    "masked, blocks of 64": replace(WIDE, masked=True, block_q=64, groups=1),
    "D 72, masked": replace(PLAIN, D=72, Dv=72, masked=True),
    "D 40": replace(PLAIN, D=40, Dv=40),
    "D 80": replace(PLAIN, D=80, Dv=80, block_q=64),
    "D 96": replace(PLAIN, D=96, Dv=96, B=2),
}
TAILS = {"no tail": ("none", 1), "first order": ("proxy", 1), "second order": ("proxy", 2)}
H100 = Chip("cuda", 90, 227 * 1024, triton=(3, 7))


def takes(call: SparseArgs[Tensor], **changes: Any) -> bool:
    """Whether an H100's fused kernel would run a call."""
    tensors, rest = split(call._replace(k_mean=call.k_mean.float()))
    layouts: SparseArgs[Layout] = of(SparseArgs, (*Layout.of_all(*tensors), *rest))
    facts = facts_of_sparse(layouts)._replace(**({"chip": H100} | changes))
    return support(facts).kernel == "fused"


def ending_early(case: SparseCase) -> SparseArgs[Tensor]:
    """A call whose rows of the table have as few entries as none, and as many as all."""
    call = case.call()
    lengths = torch.arange(call.lut.shape[:3].numel()).view(call.lut.shape[:3]) % (call.lut.shape[3] + 1)
    return call._replace(lut=call.lut.masked_fill(torch.arange(call.lut.shape[3]) >= lengths[..., None], -1))


def with_much_in_common(case: SparseCase) -> SparseArgs[Tensor]:
    """A call whose keys differ little, from a vector that is long."""
    call = case.call()
    far = (call.k + 100 * torch.randn(1, 1, 1, case.D)).bfloat16().double()
    return call._replace(k=far, k_mean=far.mean(dim=2))


def test_takes_what_the_table_says() -> None:
    call = PLAIN.call(torch.bfloat16)
    assert takes(call)
    assert takes(replace(PLAIN, block_q=64).call(torch.bfloat16))
    assert not takes(call, chip=H100._replace(arch=100))
    assert takes(replace(PLAIN, masked=True).call(torch.bfloat16))
    for change in ({"block_q": 32}, {"block_k": 32}, {"is_causal": True}, {"Dv": 128}, {"D": 32}):
        assert not takes(replace(PLAIN, **change).call(torch.bfloat16)), change
    # the logarithm of a block's keys is divided by it
    assert not takes(call._replace(scale=1e-30))


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_two_steps_fit(width: int, block_q: int, order: int) -> None:
    """One is being used while the next one comes, and a pooled step of the second order takes two tiles of k."""
    assert forward_cut(width, block_q, order).k_tiles >= 2
    cut = queries_cut(width, block_q, order)
    assert cut.k_tiles >= 2 * max(order, 1)
    assert cut.v_tiles >= 2
    assert terms_cut(width, order).k_tiles >= 2


if not INTERPRETED:
    HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)

    only_hopper = pytest.mark.skipif(not HOPPER, reason="not a Hopper GPU")

    @pytest.fixture
    def took(monkeypatch: pytest.MonkeyPatch) -> list[None]:
        """Grows whenever the fused forward is scheduled."""
        poison_outputs(monkeypatch)
        seen: list[None] = []
        attend = sm90.Call.attend
        monkeypatch.setattr(sm90.Call, "attend", lambda *a: seen.append(attend(*a)))
        forget_schedules()
        return seen

    @pytest.fixture
    def took_backward(monkeypatch: pytest.MonkeyPatch) -> list[None]:
        """Grows whenever the fused backward is scheduled."""
        poison_outputs(monkeypatch)
        seen: list[None] = []
        add = sm90.Backward.add_keys
        monkeypatch.setattr(sm90.Backward, "add_keys", lambda *a: seen.append(add(*a)))
        forget_schedules()
        return seen

    @pytest.mark.gpu
    @only_hopper
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("tail", TAILS)
    @pytest.mark.parametrize("name", SHAPES)
    def test_forward(name: str, tail: str, dtype: torch.dtype, took: list[None]) -> None:
        kind, order = TAILS[tail]
        check_forward(replace(SHAPES[name], tail=kind, proxy_order=order).call(), dtype)
        assert took

    @pytest.mark.gpu
    @only_hopper
    @pytest.mark.parametrize("tail", TAILS)
    def test_rows_that_end_early(tail: str, took: list[None]) -> None:
        """A row may have fewer entries than the table is wide, or none."""
        kind, order = TAILS[tail]
        check_forward(ending_early(replace(WIDE, tail=kind, proxy_order=order, topk_ratio=0.9)), torch.bfloat16)
        assert took

    @pytest.mark.gpu
    @only_hopper
    @pytest.mark.parametrize("order", [1, 2])
    def test_what_all_keys_share_costs_no_digits(order: int, took: list[None]) -> None:
        call = with_much_in_common(replace(WIDE, proxy_order=order))
        want = reference.sparse_attention(*call)
        for ours, exactly in zip(scheduled_sparse(on_device(call, torch.bfloat16)), want, strict=True):
            assert (ours.cpu().double() - exactly).norm() < 5e-3 * exactly.norm()
        assert took

    @pytest.mark.gpu
    @only_hopper
    def test_tensors_as_projections_make_them(took: list[None]) -> None:
        """(B, N, H, D) in memory."""
        call = replace(WIDE, B=2, proxy_order=2).call()
        mixed = {name: getattr(call, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "k", "v")}
        check_forward(call._replace(**mixed), torch.bfloat16)
        assert took

    @pytest.mark.gpu
    @only_hopper
    @pytest.mark.parametrize("tail", TAILS)
    @pytest.mark.parametrize("name", SHAPES)
    def test_gradients(name: str, tail: str, took_backward: list[None]) -> None:
        kind, order = TAILS[tail]
        case = replace(SHAPES[name], tail=kind, proxy_order=order)
        check_backward(case.call(), torch.bfloat16)
        assert bool(took_backward) == (case.Nq % 4 == 0)

    @pytest.mark.gpu
    @only_hopper
    @pytest.mark.parametrize("tail", TAILS)
    def test_gradients_of_rows_that_end_early(tail: str, took_backward: list[None]) -> None:
        kind, order = TAILS[tail]
        check_backward(ending_early(replace(WIDE, tail=kind, proxy_order=order, topk_ratio=0.9)), torch.bfloat16)
        assert took_backward

    @pytest.mark.gpu
    @only_hopper
    @pytest.mark.parametrize("order", [1, 2])
    def test_gradients_of_keys_with_much_in_common(order: int, took_backward: list[None]) -> None:
        call = with_much_in_common(replace(WIDE, proxy_order=order))
        args = backward_of(call, torch.bfloat16)
        for ours, exactly in zip(scheduled_sparse_backward(args), by_autograd(call, args.do), strict=True):
            assert (ours.cpu().double() - exactly).norm() < 1e-2 * exactly.norm()
        assert took_backward

    @pytest.mark.gpu
    @only_hopper
    @pytest.mark.parametrize("tail", TAILS)
    def test_two_runs_are_bit_equal(tail: str, took_backward: list[None]) -> None:
        kind, order = TAILS[tail]
        args = backward_of(replace(WIDE, tail=kind, proxy_order=order, Nq=2048, Nk=4096).call(), torch.bfloat16)
        first, second = scheduled_sparse_backward(args), scheduled_sparse_backward(args)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert took_backward

    @pytest.mark.gpu
    @only_hopper
    @pytest.mark.parametrize("tail", TAILS)
    def test_what_is_not_seen_leads_nowhere(tail: str, took: list[None], took_backward: list[None]) -> None:
        """Hidden keys may hold NaN and get no gradient; without any key there is nothing."""
        kind, order = TAILS[tail]
        args = backward_of(replace(WIDE, tail=kind, masked=True, proxy_order=order).call(), torch.bfloat16)
        call, want = args.saved.call, scheduled_sparse_backward(args)
        assert call.key_mask is not None
        hidden = ~call.key_mask[:, None, :, None]
        wild: Any = {name: getattr(call, name).masked_fill(hidden, float("nan")) for name in ("k", "v")}
        for a, b in zip(scheduled_sparse(call._replace(**wild)), scheduled_sparse(call), strict=True):
            assert torch.equal(a, b)
        got = scheduled_sparse_backward(args._replace(saved=args.saved._replace(call=call._replace(**wild))))
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        assert not got.dk.masked_select(hidden).any()
        blind = call._replace(key_mask=torch.zeros_like(call.key_mask))
        o, lse, alpha = scheduled_sparse(blind)
        assert not o.any()
        assert not alpha.any()
        assert (lse == float("-inf")).all()
        for a in scheduled_sparse_backward(SparseBackwardArgs(args.do, SparseSaved(o, lse, blind))):
            assert not a.any()
        assert took
        assert took_backward

    @pytest.mark.gpu
    @only_hopper
    @pytest.mark.parametrize("wild", WILD)
    @pytest.mark.parametrize("tail", TAILS)
    def test_a_wild_table_touches_nothing_outside(
        tail: str, wild: str, monkeypatch: pytest.MonkeyPatch, took_backward: list[None]
    ) -> None:
        """What such a call gives means nothing, but is numbers, and no memory but the kernels' own is written."""
        kind, order = TAILS[tail]
        args = backward_of(replace(WIDE, tail=kind, proxy_order=order).call(), torch.bfloat16)
        saved, call = args.saved, args.saved.call
        q, k, v = (among_nan(x) for x in call[:3])
        call = call._replace(q=q, k=k, v=v, lut=torch.full_like(call.lut, WILD[wild]))
        fenced = Fenced(monkeypatch)
        assert all(x.isfinite().all() for x in scheduled_sparse(call)[::2])
        changed = saved._replace(o=among_nan(saved.o), call=call)
        got = scheduled_sparse_backward(SparseBackwardArgs(among_nan(args.do), changed))
        fenced.assert_whole()
        assert all(x.isfinite().all() for x in got)
        assert took_backward
