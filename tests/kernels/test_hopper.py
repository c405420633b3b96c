"""The Hopper kernel: which calls it takes, and on a GPU what it computes (`test_aot.py` compiles it without one)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from sla2_compile.kernels.arguments import AttentionArgs
from sla2_compile.kernels.cuda.forward import sm90 as hopper
from sla2_compile.kernels.cuda.forward import states_launches as states_schedule
from sla2_compile.kernels.cuda.forward.launches import facts_of
from sla2_compile.kernels.cuda.tiles import ShapeClass, hopper_tile
from sla2_compile.kernels.layout import Layout
from sla2_compile.kernels.records import of
from sla2_compile.kernels.support import Chip, Facts, support
from tests.kernels.schedules import as_long_calls, forget_schedules, remember_tensors, state_bytes, without_fused
from tests.kernels.test_triton_low_bit import check, routed
from tests.kernels.triton_case import DEVICE, INTERPRETED, Case, poison_outputs, scheduled_attention, scheduled_route

PLAIN = Case(D=64, Dv=64, block_q=128, block_k=64, Nq=300, Nk=459)
WIDE = replace(PLAIN, D=128, Dv=128)
CASES = {
    "plain": PLAIN,
    "D 128, fp16": replace(WIDE, dtype=torch.float16),
    "batch, heads, no group": replace(WIDE, B=2, heads=3, groups=1, alpha="head"),
    "one head": replace(WIDE, groups=1),
    "(B, N, H, D)": replace(WIDE, transposed=True, B=2),
    "even table": replace(WIDE, topk_ratio=0.5, Nk=512),
    "one block": replace(WIDE, Nk=64, Nq=128),
    "three keys": replace(PLAIN, Nk=3, Nq=5),
    "empty complement": replace(WIDE, topk_ratio=1.0, alpha="none"),
    "many query blocks": replace(WIDE, Nq=128 * 300, topk_ratio=0.2, alpha="block"),
    "elu": replace(WIDE, feature_map="elu"),
    "relu": replace(PLAIN, feature_map="relu"),
    # zeros behind a head dim must not count: not in phi's sum, not in its maximum
    "D 96": replace(PLAIN, D=96, Dv=96, B=2),
    "D 80, elu": replace(PLAIN, D=80, Dv=80, feature_map="elu", transposed=True),
    "D 48": replace(PLAIN, D=48, Dv=48, alpha="head"),
    # numbers behind the rows of a state and behind its z
    "D 72": replace(PLAIN, D=72, Dv=72, B=2, heads=2),
    "D 40": replace(PLAIN, D=40, Dv=40, feature_map="relu"),
    "all keys": replace(PLAIN, linear_scope="all"),
}
LEVELS = ("none", "int8", "int8_fp8")


def call_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **changes: Any) -> AttentionArgs[Layout]:
    """A plain call over these tensors."""
    B, heads, _, D = k.shape
    lut, rest = torch.zeros(B, q.shape[1], 2, 2, dtype=torch.int32), torch.zeros(B, q.shape[1], 2)
    mean = changes.pop("k_mean", torch.zeros(B, heads, D))
    tensors = Layout.of_all(q, k, v, mean, lut, rest, None, None, changes.pop("key_mask", None))
    options = (128, 64, D**-0.5, "softmax", "complement", False)
    call: AttentionArgs[Layout] = of(AttentionArgs, (*tensors, *options))
    return call._replace(**changes)


def facts(*x: torch.Tensor, **changes: Any) -> Facts:
    """What of such a call decides its kernels, on an H100."""
    return facts_of(call_of(*x, **changes))._replace(chip=H100)


H100 = Chip("cuda", 90, 227 * 1024, triton=(3, 7))


def tensors(D: int = 128) -> list[torch.Tensor]:
    return [torch.empty(2, 4, 256, D, dtype=torch.bfloat16) for _ in range(3)]


def fused(x: list[torch.Tensor], **changes: Any) -> bool:
    return support(facts(*x, **changes)).kernel == "fused"


def test_takes_what_the_table_says() -> None:
    q, k, v = tensors()
    assert fused([q, k, v])
    assert fused(tensors(D=64))
    assert fused([x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)])
    plain = facts(q, k, v)
    for arch in (80, 89, 100):
        assert support(plain._replace(chip=H100._replace(arch=arch))).kernel == "triton"
    for triton in ((3, 5), (3, 8), (4, 0)):
        assert support(plain._replace(chip=H100._replace(triton=triton))).kernel == "triton"
    mask = torch.ones(2, 256, dtype=torch.bool)
    for change in (
        {"block_q": 64},
        {"block_k": 128},
        {"is_causal": True},
        {"key_mask": mask},
    ):
        assert not fused([q, k, v], **change)
    for D in (40, 72, 96, 120):
        assert fused(tensors(D=D))
        # rows of k8 begin at multiples of 16 bytes
        assert fused(tensors(D=D), low_bit="int8") == (D % 16 == 0)
    for D in (32, 36, 100, 136, 256):
        assert not fused(tensors(D=D))
    assert not fused([q, k, v[..., :64]])
    # rows of 130 numbers do not begin at multiples of 16 bytes
    odd = torch.empty(2, 4, 256, 130, dtype=torch.bfloat16)[..., :128]
    assert not fused([odd, k, v])
    assert not fused([q, k[:1].expand(2, -1, -1, -1), v])
    assert not fused([q, k, v], k_mean=torch.empty(2, 4, 128, dtype=torch.float64))
    assert not fused([q, k, v], k_mean=torch.empty(2 * 4 * 128 + 1)[1:].view(2, 4, 128))


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(("low_bit", "bytes_k", "bytes_v"), [(0, 2, 2), (1, 1, 2), (2, 1, 1)])
def test_two_steps_fit(D: int, low_bit: int, bytes_k: int, bytes_v: int) -> None:
    """One is being used while the next one comes."""
    tile = hopper_tile(ShapeClass(90, D, D, 128, 64, low_bit))
    assert hopper.steps_that_fit(D, bytes_k, bytes_v, tile) >= 2


if not INTERPRETED:
    HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)

    @pytest.mark.gpu
    @pytest.mark.skipif(not HOPPER, reason="not a Hopper GPU")
    @pytest.mark.parametrize("low_bit", LEVELS)
    @pytest.mark.parametrize("name", CASES)
    def test_attention(name: str, low_bit: str, monkeypatch: pytest.MonkeyPatch) -> None:
        poison_outputs(monkeypatch)
        took: list[None] = []
        attend = hopper.attend
        monkeypatch.setattr(hopper, "attend", lambda *a, **k: took.append(attend(*a, **k)))
        # scores and sums are not those of the emulation to the last bit, so that a weight may be rounded to FP8's
        # other neighbour, 1/16 of it away: fp16's own rounding is too fine a measure for that
        check(CASES[name], low_bit, eps=torch.finfo(torch.bfloat16).eps if low_bit == "int8_fp8" else 0.0)
        # rows of k8 begin at multiples of 16 bytes, or the portable kernels run
        assert bool(took) == (low_bit == "none" or CASES[name].D % 16 == 0)

    @pytest.mark.gpu
    @pytest.mark.skipif(not HOPPER, reason="not a Hopper GPU")
    @pytest.mark.parametrize("low_bit", LEVELS)
    def test_heads_in_groups(low_bit: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Bounded memory for the states: many launches give what one gives."""
        as_long_calls(monkeypatch)
        case, kept = replace(WIDE, B=2, heads=2), remember_tensors(monkeypatch)
        x = routed(case, case.tensors())
        whole = case.attention(x, scheduled_attention, low_bit)
        monkeypatch.setattr(states_schedule, "STATE_BYTES", state_bytes(kept, 3, of=4))
        forget_schedules()
        parts = case.attention(x, scheduled_attention, low_bit)
        assert torch.equal(whole[0], parts[0])
        assert torch.equal(whole[1], parts[1])

    @pytest.mark.gpu
    @pytest.mark.skipif(not HOPPER, reason="not a Hopper GPU")
    @pytest.mark.parametrize("low_bit", LEVELS)
    def test_same_bits_every_time(low_bit: str) -> None:
        """A race would show as results that differ."""
        case = replace(WIDE, Nq=128 * 300, Nk=64 * 100, topk_ratio=0.2)
        x = routed_cheaply(case)
        first = case.attention(x, scheduled_attention, low_bit)
        for _ in range(20):
            again = case.attention(x, scheduled_attention, low_bit)
            assert all(torch.equal(a, b) for a, b in zip(first[:2], again[:2], strict=True))

    @pytest.mark.gpu
    @pytest.mark.skipif(not HOPPER, reason="not a Hopper GPU")
    @pytest.mark.parametrize("low_bit", LEVELS)
    @pytest.mark.parametrize("topk_ratio", [0.2, 0.21, 0.75])
    def test_long_tables(topk_ratio: float, low_bit: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Many steps of many blocks a program compute what the kernels do that this one replaces."""
        case = replace(WIDE, B=2, Nq=128 * 150 + 7, Nk=64 * 100 - 5, topk_ratio=topk_ratio, alpha="none")
        x = routed_cheaply(case)
        got = case.attention(x, scheduled_attention, low_bit)
        without_fused(monkeypatch)
        forget_schedules()
        want = case.attention(x, scheduled_attention, low_bit)
        for a, b in zip(got[:2], want[:2], strict=True):
            error = ((a.double() - b.double()).norm() / b.double().norm()).item()
            print(f"norm of difference {error:.3e}")
            assert error <= 0.01

    @pytest.mark.gpu
    @pytest.mark.skipif(not HOPPER, reason="not a Hopper GPU")
    @pytest.mark.parametrize("low_bit", LEVELS)
    def test_wild_table_reads_nothing_outside(low_bit: str) -> None:
        case = replace(WIDE, topk_ratio=1.0)
        x = routed_cheaply(case)
        for wild in (-7, 2**24):
            x["lut"] = torch.full_like(x["lut"], wild)
            case.attention(x, scheduled_attention, low_bit)
            torch.cuda.synchronize(DEVICE)


def routed_cheaply(case: Case) -> dict[str, Any]:
    """A case's tensors with what the kernels' own router says of them."""
    x = case.tensors()
    x["lut"], x["log_rest"], _, x["k_mean"] = case.route(x, scheduled_route)
    return x
