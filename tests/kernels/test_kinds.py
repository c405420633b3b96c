"""Eager calls past the op, on a CPU that passes for a GPU: what a kind remembers, and what is asked at each call."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from sla2_compile.kernels import AttentionOptions, functional, kinds, sla2_attention
from sla2_compile.kernels.arguments import ForwardArgs
from sla2_compile.kernels.cuda import dispatch
from sla2_compile.kernels.kinds import kind_of
from sla2_compile.kernels.layout import Layout, read

OPTIONS = AttentionOptions(0.3, 8, 32, 16)


class Straight:
    """Stands in for the launches of kinds of calls, each of which answers with its own number."""

    def __init__(self) -> None:
        self.asked: list[ForwardArgs[Tensor]] = []
        self.runs: list[tuple[int, list[int]]] = []

    def __call__(self, args: ForwardArgs[Tensor]) -> Any:
        values: Any = (*[None] * 8, *args[8:])
        self.asked.append(ForwardArgs(*values))
        at = len(self.asked) - 1

        def run(tensors: tuple[Tensor, ...], addresses: list[int]) -> Tensor:
            self.runs.append((at, list(addresses)))
            return torch.full((1,), at)

        return run


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Straight:
    straight = Straight()
    monkeypatch.setattr(kinds, "DEVICES", {"cpu"})
    monkeypatch.setattr(dispatch, "straight", straight)
    return straight


def heads(N: int = 70, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(1, 2, N, 16, dtype=dtype) for _ in range(3)]


def call(*tensors: Any, options: AttentionOptions = OPTIONS, **given: Any) -> Tensor:
    with torch.no_grad():
        q, k, v = tensors
        return sla2_attention(q, k, v, options, **given)


def test_a_kind_is_prepared_once_and_each_call_brings_its_addresses(launched: Straight) -> None:
    one, two = heads(), heads()
    for tensors in (one, two, one):
        assert call(*tensors).tolist() == [0]
    assert len(launched.asked) == 1
    wanted = [[x.data_ptr() for x in tensors] + [tensors[0].data_ptr()] * 5 for tensors in (one, two, one)]
    assert launched.runs == [(0, addresses) for addresses in wanted]


def test_whatever_decides_launches_makes_another_kind(launched: Straight) -> None:
    q, k, v = heads()
    mask, proj, bias = torch.ones(1, 70, dtype=torch.bool), torch.eye(16), torch.zeros(2, 1)
    gain = torch.ones(2)
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    off = torch.randn(q.numel() + 1)[1:].view(q.shape)
    calls: dict[str, Any] = {
        "plain": lambda: call(q, k, v),
        "strides": lambda: call(*swapped),
        "length": lambda: call(*[x[:, :, :69] for x in (q, k, v)]),
        "keys": lambda: call(q, k[:, :, :69], v[:, :, :69]),
        "dtype": lambda: call(*heads(dtype=torch.bfloat16)),
        "address": lambda: call(q, k, off),
        "mask": lambda: call(q, k, v, key_mask=mask),
        "projections": lambda: call(q, k, v, proj_q=proj, proj_k=proj),
        "one projection": lambda: call(q, k, v, proj_k=proj),
        "bias": lambda: call(q, k, v, alpha_bias=bias),
        "gain": lambda: call(q, k, v, alpha_gain=gain, alpha_bias=bias),
        "scale": lambda: call(q, k, v, scale=0.5),
        "causal": lambda: call(q, k, v, is_causal=True),
        "ratio": lambda: call(q, k, v, options=AttentionOptions(0.4, 8, 32, 16)),
    }
    for _ in range(2):
        assert [made().item() for made in calls.values()] == list(range(len(calls)))
    assert len(launched.asked) == len(calls)


def test_equal_options_of_other_types_are_one_kind_of_plain_numbers(launched: Straight) -> None:
    np = pytest.importorskip("numpy", reason="numpy is not installed")
    q, k, v = heads()
    odd: Any = AttentionOptions(np.float64(0.25), np.int64(8), np.int64(32), np.int64(16))
    for options, scale, causal in ((odd, np.float64(0.5), 1), (AttentionOptions(0.25, 8, 32, 16), 0.5, True)):
        assert call(q, k, v, options=options, scale=scale, is_causal=causal).item() == 0
    (args,) = launched.asked
    options = args[8:]
    assert [type(x) for x in options] == [float, int, int, int, float, str, str, bool, str]


def test_a_scale_that_is_a_tensor_is_read_at_each_call(launched: Straight) -> None:
    q, k, v = heads()
    scale: Any = torch.tensor(0.5)
    call(q, k, v, scale=scale)
    scale.fill_(0.25)
    call(q, k, v, scale=scale)
    assert [args.scale for args in launched.asked] == [0.5, 0.25]


def test_a_share_that_is_a_tensor_is_refused() -> None:
    share: Any = torch.tensor(0.5)
    with pytest.raises(ValueError, match=r"topk_ratio must be a number, got tensor\(0.5000\); call .item\(\)"):
        AttentionOptions(topk_ratio=share)


def test_a_kind_keeps_no_tensor_alive(launched: Straight) -> None:
    tensors = heads()
    call(*tensors)
    alive = [weakref.ref(x) for x in tensors]
    del tensors
    assert [ref() for ref in alive] == [None] * 3


def test_gradients_go_by_the_op(launched: Straight) -> None:
    """Whatever came before: a kind does not know of autograd."""
    q, k, v = heads()
    call(q, k, v)
    q.requires_grad_()
    for training in (False, True):
        o = sla2_attention(q, k, v, OPTIONS, training=training)
        assert o.grad_fn is not None
        assert o.shape == q.shape
    bias = torch.zeros(2, 1, requires_grad=True)
    assert sla2_attention(q.detach(), k, v, OPTIONS, alpha_bias=bias).requires_grad
    assert len(launched.runs) == 1
    with torch.no_grad():
        assert sla2_attention(q, k, v, OPTIONS).item() == 0
    with torch.inference_mode():
        q, k, v = heads()
        assert sla2_attention(q, k, v, OPTIONS).item() == 0


def test_autocast_is_asked_at_each_call(launched: Straight) -> None:
    q, k, v = heads()
    for on, kind in ((False, 0), (True, 1), (False, 0)):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            assert call(q, k, v).item() == kind
    with torch.autocast("cpu", torch.bfloat16):
        assert call(*heads(dtype=torch.bfloat16)).item() == 1
        # a double stays one, as in PyTorch's own attention
        assert call(*heads(dtype=torch.float64)).item() == 2
    addresses = launched.runs[1][1]
    assert not {x.data_ptr() for x in (q, k, v)} & set(addresses)


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the names of ops."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class SeenFunctions(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Seen, SeenFunctions])
def test_a_mode_sees_the_op(launched: Straight, mode: Any) -> None:
    q, k, v = heads()
    call(q, k, v)
    with mode() as seen:
        assert call(q, k, v).shape == q.shape
    assert "sla2.forward.default" in seen.names
    assert len(launched.runs) == 1


class Tagged(Tensor):
    """A subclass that looks at functions alone."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_subclass_sees_the_op(launched: Straight) -> None:
    q, k, v = heads()
    call(q, k, v)
    assert call(q, k, v.as_subclass(Tagged)).shape == q.shape
    assert call(q, k, v, alpha_bias=torch.zeros(2, 1).as_subclass(Tagged)).shape == q.shape
    assert len(launched.runs) == 1
    assert call(q, k, v, alpha_bias=torch.nn.Parameter(torch.zeros(2, 1))).item() == 1


def test_a_lazily_negated_tensor_is_negated(launched: Straight) -> None:
    q, k, _ = heads()
    v = torch.complex(torch.randn(q.shape), torch.randn(q.shape)).conj().imag
    assert v.is_neg()
    with Seen():
        wanted = call(q, k, v.resolve_neg())
    assert torch.equal(call(q, k, v), wanted)
    assert launched.runs == []


def test_transforms_go_by_the_op(launched: Straight) -> None:
    q, k, v = heads()
    call(q, k, v)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: sla2_attention(q, k, v, OPTIONS), (q,), (q,))
    assert len(launched.runs) == 1


def test_symbolic_lengths_have_no_kind(launched: Straight) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    q, k, v = heads()
    call(q, k, v)
    graph = make_fx(lambda q, k, v: call(q, k, v), tracing_mode="symbolic")(q, k, v)
    assert any(node.target is torch.ops.sla2.forward.default for node in graph.graph.nodes)
    assert len(launched.runs) == 1


def test_tensors_without_memory_have_no_kind(launched: Straight) -> None:
    known = kind_of.cache_info().currsize
    assert call(*[x.to("meta") for x in heads()]).shape == (1, 2, 70, 16)
    with torch._subclasses.FakeTensorMode():
        assert call(*heads()).shape == (1, 2, 70, 16)
    assert kind_of.cache_info().currsize == known


@pytest.mark.parametrize("switch", ["SLA2_DEBUG", "SLA2_AUTOTUNE"])
def test_switches_are_read_at_each_call(launched: Straight, switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = heads()
    call(q, k, v)
    for value, straight in (("1", False), ("0", True), ("", True)):
        monkeypatch.setenv(switch, value)
        assert (call(q, k, v).shape == (1,)) is straight
    monkeypatch.delenv(switch)
    assert call(q, k, v).item() == 0


def test_routing_is_kept_by_the_op(launched: Straight) -> None:
    q, k, v = heads()
    call(q, k, v)
    with torch.no_grad():
        o, routing = functional.attend(q, k, v, OPTIONS)
    assert routing is not None
    assert o.shape == q.shape


def test_a_kind_that_is_wrong_stays_wrong(launched: Straight) -> None:
    q, k, v = heads()
    for _ in range(2):
        with pytest.raises(ValueError, match="k must have q's head dim 16, got 8"):
            call(q, k[..., :8], v)
    assert launched.asked == []


def test_a_call_that_the_kernels_refuse_goes_by_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of float32, and of an absent last stride of 1, that are asked once."""
    asked: list[int] = []
    monkeypatch.setattr(kinds, "DEVICES", {"cpu"})
    straight = dispatch.straight

    def count(args: ForwardArgs[Tensor]) -> Any:
        asked.append(1)
        return straight(args)

    monkeypatch.setattr(dispatch, "straight", count)
    q, k, v = heads()
    wanted = call(q, k, v)
    for _ in range(2):
        assert torch.equal(call(q, k, v), wanted)
        assert torch.equal(call(q.mT.contiguous().mT, k, v), wanted)
    assert len(asked) == 2


def test_threads_share_what_is_known(launched: Straight) -> None:
    inputs = [heads() for _ in range(32)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda tensors: call(*tensors), inputs))
    assert len(launched.runs) == 32
    assert {tuple(x[1][:3]) for x in launched.runs} == {tuple(t.data_ptr() for t in x) for x in inputs}
    # two threads may both have asked of a new kind
    assert all(0 <= x.item() < 4 for x in made)


def test_a_key_equals_the_layouts() -> None:
    q, k, v = heads()
    tensors = (q, k[:, :, 1:], None, v.bfloat16())
    layouts, addresses = read(tensors)
    assert layouts == Layout.of_all(*tensors)
    assert addresses == [q.data_ptr(), k.data_ptr() + 64, q.data_ptr(), tensors[3].data_ptr()]


def test_a_cpu_has_kinds_too() -> None:
    """Without launches: what the checks found is remembered."""
    q, k, v = heads()
    before = kind_of.cache_info()
    assert torch.equal(call(q, k, v), call(*[x.clone() for x in (q, k, v)]))
    after = kind_of.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (1, 1)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    kind_of.cache_clear()
    yield
    kind_of.cache_clear()
