"""The ops obey PyTorch's contract: schema, fake, autograd, ahead-of-time dispatch; and work where they are traced."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sla2_compile.kernels.arguments import AttentionArgs, BackwardArgs, Saved
from sla2_compile.kernels.functional import attend, sla2_attention
from sla2_compile.kernels.ops import attention, attention_backward, forward, route
from sla2_compile.kernels.options import AttentionOptions
from sla2_compile.kernels.records import flat, of
from sla2_compile.kernels.reference import sla2 as reference

STATIC = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
DYNAMIC = ("test_aot_dispatch_dynamic",)
BLOCK_Q, BLOCK_K, SCALE = 32, 16, 0.25


def qkv(layout: str, grad: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped heads, ragged lengths, Nq != Nk, Dv != D; transposed means a view of (B, N, H, D)."""
    torch.manual_seed(0)
    shapes = ((2, 4, 75, 16), (2, 2, 107, 16), (2, 2, 107, 24))
    if layout == "contiguous":
        made = [torch.randn(s, dtype=dtype) for s in shapes]
    else:
        made = [torch.randn(b, n, h, d, dtype=dtype).transpose(1, 2) for b, h, n, d in shapes]
    q, k, v = (x.requires_grad_(grad) for x in made)
    return q, k, v


def learned(q: Tensor, grad: bool) -> dict[str, Any]:
    heads, D = q.shape[1], q.shape[3]
    made: dict[str, Tensor] = {
        "proj_q": torch.randn(D, D),
        "proj_k": torch.randn(D, D),
        "alpha_gain": torch.rand(heads) + 0.5,
        "alpha_bias": torch.randn(heads, 1),
    }
    return {name: x.requires_grad_(grad) for name, x in made.items()}


def mask_for(k: Tensor) -> Tensor:
    return torch.arange(k.shape[2]).expand(k.shape[0], -1) < torch.tensor([[k.shape[2] - 9], [40]])


layouts = pytest.mark.parametrize("layout", ["contiguous", "transposed"])
grads = pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
tracing = pytest.mark.parametrize("utils", [STATIC, DYNAMIC], ids=["static", "dynamic"])
variants = pytest.mark.parametrize("variant", ["plain", "masked", "causal"])


def route_args(variant: str, q: Tensor, k: Tensor, params: dict[str, Tensor]) -> tuple[Any, ...]:
    mask = mask_for(k) if variant == "masked" else None
    proj = (None, None) if variant == "plain" else (params["proj_q"], params["proj_k"])
    return q, k, *proj, mask, 0.3, 8, BLOCK_Q, BLOCK_K, SCALE, variant == "causal"


def attention_args(variant: str, q: Tensor, k: Tensor, v: Tensor, params: dict[str, Tensor]) -> tuple[Any, ...]:
    with torch.no_grad():
        lut, log_rest, _, k_mean = route(*route_args(variant, q, k, params))
    alpha = (None, None) if variant == "plain" else (params["alpha_gain"], params["alpha_bias"])
    mask = mask_for(k) if variant == "masked" else None
    scope = "complement" if variant == "causal" else "all"
    tail = (mask, BLOCK_Q, BLOCK_K, SCALE, "elu", scope, variant == "causal")
    return q, k, v, k_mean, lut, log_rest, *alpha, *tail


@layouts
@grads
@tracing
@variants
def test_route_passes_opcheck(layout: str, grad: bool, utils: tuple[str, ...], variant: str) -> None:
    q, k, _ = qkv(layout, grad)
    if grad:
        # opcheck's dispatch test sums all outputs, which PyTorch refuses for an integer one; see the next test
        utils = tuple(name for name in utils if not name.startswith("test_aot"))
    torch.library.opcheck(route.dispatched, route_args(variant, q, k, learned(q, grad)), test_utils=utils)


@layouts
@variants
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_routes_gradient_survives_tracing(layout: str, variant: str, dynamic: bool) -> None:
    q, k, _ = qkv(layout, True)
    params = learned(q, True)

    def call(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return route(*route_args(variant, q, k, params))

    torch._dynamo.reset()
    traced = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    wanted = []
    for run in (call, traced):
        lut, log_rest, entropy, k_mean = run(q, k)
        assert not any(x.requires_grad for x in (lut, log_rest, entropy))
        (dk,) = torch.autograd.grad(k_mean.square().sum(), [k])
        wanted.append((lut, log_rest, entropy, k_mean, dk))
    for eager, compiled in zip(*wanted, strict=True):
        assert torch.equal(eager, compiled)


@layouts
@grads
@tracing
@variants
def test_attention_passes_opcheck(layout: str, grad: bool, utils: tuple[str, ...], variant: str) -> None:
    q, k, v = qkv(layout, grad)
    args = attention_args(variant, q, k, v, learned(q, grad))
    torch.library.opcheck(attention.dispatched, args, test_utils=utils)


def forward_args(variant: str, q: Tensor, k: Tensor, v: Tensor, params: dict[str, Tensor]) -> tuple[Any, ...]:
    names = ("proj_q", "proj_k", "alpha_gain", "alpha_bias")
    learnt = (None if variant == "plain" else params[name] for name in names)
    mask, causal = mask_for(k) if variant == "masked" else None, variant == "causal"
    scope = "complement" if causal else "all"
    return q, k, v, *learnt, mask, 0.3, 8, BLOCK_Q, BLOCK_K, SCALE, "elu", scope, causal, "none"


@layouts
@tracing
@variants
def test_forward_passes_opcheck(layout: str, utils: tuple[str, ...], variant: str) -> None:
    q, k, v = qkv(layout, False)
    torch.library.opcheck(forward.dispatched, forward_args(variant, q, k, v, learned(q, False)), test_utils=utils)


@layouts
@variants
def test_forward_is_route_and_attention(layout: str, variant: str) -> None:
    q, k, v = qkv(layout, False)
    params = learned(q, False)
    o = attention(*attention_args(variant, q, k, v, params))[0]
    assert torch.equal(forward(*forward_args(variant, q, k, v, params)), o)


@layouts
@variants
def test_forward_passes_opcheck_where_a_gradient_is_wanted(layout: str, variant: str) -> None:
    q, k, v = qkv(layout, True)
    utils = (*STATIC, *DYNAMIC)
    torch.library.opcheck(forward.dispatched, forward_args(variant, q, k, v, learned(q, True)), test_utils=utils)


def gradients(run: Any, variant: str, layout: str, **options: Any) -> list[Tensor]:
    """o, and the gradients of q, k, v, alpha_gain and alpha_bias, of a call of `sla2_attention`."""
    q, k, v = qkv(layout, True)
    params = learned(q, True) if variant != "plain" else {}
    causal, mask = variant == "causal", mask_for(k) if variant == "masked" else None
    call = AttentionOptions(0.3, 8, BLOCK_Q, BLOCK_K, "elu", "complement" if causal else "all", **options)
    o = run(q, k, v, call, key_mask=mask, is_causal=causal, **params)
    wanted = [q, k, v, *(params[name] for name in ("alpha_gain", "alpha_bias") if params)]
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1))
    return [o, *torch.autograd.grad(o, wanted, do)]


@layouts
@variants
@pytest.mark.parametrize("dynamic", [None, False, True], ids=["eager", "static", "dynamic"])
def test_an_inferences_gradient_is_the_trainings(layout: str, variant: str, dynamic: bool | None) -> None:
    """Bit for bit: the backward routes and attends again."""
    torch._dynamo.reset()
    run: Any = sla2_attention
    if dynamic is not None:
        run = torch.compile(sla2_attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    got = gradients(run, variant, layout)
    want = gradients(partial(sla2_attention, training=True), variant, layout)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_what_is_kept_for_a_backward() -> None:
    """Beside q, k and v, a training step keeps one tensor of o's size, o itself, and an inference none."""
    kept = {}
    for training in (False, True):
        q, k, v = qkv("contiguous", True)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):  # type: ignore[misc]
            o = sla2_attention(q, k, v, AttentionOptions(0.3, 8, BLOCK_Q, BLOCK_K), training=training)
        kept[training] = [x for x in saved if x.shape == o.shape]
    assert (len(kept[False]), len(kept[True])) == (0, 1)


@pytest.mark.parametrize("strict", [False, True])
def test_a_program_exported_for_inference_gives_a_gradient(strict: bool) -> None:
    class Site(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sla2_attention(q, k, v, AttentionOptions(block_q=32, block_k=16, topk_ratio=0.3))

    results = []
    program = torch.export.export(Site(), qkv("contiguous", False), strict=strict).module()
    for run in (program, Site()):
        q, k, v = qkv("contiguous", True)
        o = run(q, k, v)
        results.append((o, *torch.autograd.grad(o.square().sum(), [q, k, v])))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wanted", ["q", "proj_q", "alpha_bias", None])
def test_a_training_step_takes_the_two_ops_and_nothing_else_does(wanted: str | None) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "sla2":
                names.append(func._opname)
            return func(*args, **(kwargs or {}))

    q, k, v = qkv("contiguous", False)
    tensors: dict[str, Any] = {"q": q, "k": k, "v": v, **learned(q, False)}
    if wanted:
        tensors[wanted].requires_grad_()
    options = AttentionOptions(block_q=32, block_k=16, topk_ratio=0.3)
    names: list[str] = []
    results = []
    for training, grad in ((True, True), (True, False), (False, True), (False, False)):
        names.clear()
        with Names(), torch.set_grad_enabled(grad):
            results.append(sla2_attention(options=options, training=training, **tensors))
        assert names == (["route", "attention"] if wanted and training and grad else ["forward"])
        assert torch.equal(results[0], results[-1])


@layouts
@tracing
@variants
def test_attention_backward_passes_opcheck(layout: str, utils: tuple[str, ...], variant: str) -> None:
    q, k, v = qkv(layout, False)
    args = attention_args(variant, q, k, v, learned(q, False))
    call: AttentionArgs[Tensor] = of(AttentionArgs, args)
    o, lse = attention(*call)
    do = torch.randn_like(o) if layout == "contiguous" else torch.randn_like(o.transpose(1, 2)).transpose(1, 2)
    backward = BackwardArgs(do, Saved(o, lse, call))
    torch.library.opcheck(attention_backward.dispatched, flat(backward), test_utils=utils)


@layouts
@variants
def test_result_does_not_depend_on_layout(layout: str, variant: str) -> None:
    q, k, v = qkv(layout, False)
    params = learned(q, False)
    got = attention(*attention_args(variant, q, k, v, params))
    q, k, v = (x.contiguous() for x in (q, k, v))
    want = attention(*attention_args(variant, q, k, v, params))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_inputs_stay_as_they_are() -> None:
    q, k, v = qkv("contiguous", True)
    before = [x.detach().clone() for x in (q, k, v)]
    do = torch.randn(*q.shape[:3], v.shape[3])
    kept = do.clone()
    sla2_attention(q, k, v, AttentionOptions(block_q=32, block_k=16, topk_ratio=0.3)).backward(do)
    for x, y in zip((q, k, v, do), (*before, kept), strict=True):
        assert torch.equal(x.detach(), y)


def test_only_the_routers_parameters_want_a_gradient() -> None:
    # hard top-k gives them none, but asking must not fail: a frozen model with a trainable router
    q, k, v = qkv("contiguous", False)
    params = learned(q, True)
    o = sla2_attention(q, k, v, proj_q=params["proj_q"], proj_k=params["proj_k"])
    assert torch.isfinite(o).all()


@pytest.mark.parametrize("wanted", ["q", "k", "v", "alpha_gain", "alpha_bias"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_one_gradient_alone(wanted: str, training: bool) -> None:
    options = AttentionOptions(block_q=32, block_k=16, topk_ratio=0.3)
    full: dict[str, Tensor] = {}
    for names in ([wanted], ["q", "k", "v", "alpha_gain", "alpha_bias"]):
        q, k, v = qkv("contiguous", False)
        tensors: dict[str, Any] = {"q": q, "k": k, "v": v, **learned(q, False)}
        for name in names:
            tensors[name].requires_grad_()
        sla2_attention(options=options, training=training, **tensors).square().sum().backward()
        grad = tensors[wanted].grad
        assert grad is not None
        if full:
            torch.testing.assert_close(grad, full["grad"])
        full["grad"] = grad


def test_the_gradient_may_come_in_another_dtype() -> None:
    """As a loss outside of autocast makes it: PyTorch casts it to o's dtype."""
    q, k, v = qkv("contiguous", True, torch.bfloat16)
    o = sla2_attention(q, k, v, AttentionOptions(block_q=32, block_k=16, topk_ratio=0.3), training=True)
    do = torch.randn(o.shape).bfloat16()
    got, want = (torch.autograd.grad(o, (q, k, v), g, retain_graph=True) for g in (do.float(), do))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_gives_bfloat16_as_sdpa_does(dtype: torch.dtype) -> None:
    q, k, v = qkv("contiguous", True, dtype)
    params = learned(q, True)
    options = AttentionOptions(block_q=32, block_k=16, topk_ratio=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = sla2_attention(q, k, v, options, **params)
        sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert o.dtype == sdpa.dtype == torch.bfloat16
    o.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == dtype
    want = sla2_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), options, **params)
    assert torch.equal(o, want)


def test_autocast_inside_does_not_change_the_ops() -> None:
    # the router accumulates in float32 whatever autocast would do to its matmuls
    q, k, _ = qkv("contiguous", False)
    args = route_args("masked", q, k, learned(q, False))
    want = route(*args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = route(*args)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_compiles_as_one_graph_with_dynamic_shapes(is_causal: bool) -> None:
    params = learned(qkv("contiguous", False)[0], True)
    options = AttentionOptions(block_q=32, block_k=16, topk_ratio=0.3)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sla2_attention(q, k, v, options, is_causal=is_causal, training=True, **params)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for B, Nq, Nk in ((3, 75, 107), (5, 130, 99), (7, 33, 260)):
        results = []
        for run in (call, compiled):
            torch.manual_seed(B)
            q, k, v = (torch.randn(B, h, n, 16, requires_grad=True) for h, n in ((4, Nq), (2, Nk), (2, Nk)))
            for p in params.values():
                p.grad = None
            o = run(q, k, v)
            o.square().sum().backward()
            alpha_grads = [params[name].grad for name in ("alpha_gain", "alpha_bias")]
            results.append((o, q.grad, k.grad, v.grad, *alpha_grads))
        for eager, traced in zip(*results, strict=True):
            assert torch.equal(eager, traced)


def test_exports_with_dynamic_lengths() -> None:
    class Site(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sla2_attention(q, k, v, AttentionOptions(block_q=32, block_k=16, topk_ratio=0.3))

    # more than one query block and more than one kept block: PyTorch specialises sizes of one
    auto = torch.export.Dim.DYNAMIC
    shapes = ({0: auto, 2: auto},) * 3
    program = torch.export.export(Site(), qkv("contiguous", False), dynamic_shapes=shapes)
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert [name for name in targets if name.startswith("sla2")] == ["sla2.forward.default"]
    q, k, v = torch.randn(5, 4, 201, 16), torch.randn(5, 2, 555, 16), torch.randn(5, 2, 555, 24)
    assert torch.equal(program.module()(q, k, v), Site()(q, k, v))


def test_routing_tells_what_was_chosen() -> None:
    q, k, v = qkv("contiguous", False, torch.float64)
    options = AttentionOptions(block_q=32, block_k=16, topk_ratio=0.3)
    o, routing = attend(q, k, v, options)
    lut, log_rest, entropy, k_mean = reference.route(q, k, None, None, None, 0.3, 8, 32, 16, 0.25, False)
    assert routing is not None
    assert (routing.block_q, routing.block_k, routing.Tn) == (32, 16, 7)
    assert torch.equal(routing.lut, lut)
    torch.testing.assert_close(routing.log_rest, log_rest)
    torch.testing.assert_close(routing.entropy, entropy)
    want = reference.attention(
        q, k, v, k_mean, lut, log_rest,
        None, None, None, 32, 16, 0.25, "softmax", "complement", False,
    )  # fmt: skip
    torch.testing.assert_close(routing.lse, want[1][..., ::32])
    torch.testing.assert_close(o, want[0])


def test_memory_kept_between_calls_is_never_handed_out() -> None:
    """A thread's next call, of another size, dtype or mode, leaves the results of the last one alone."""
    options = AttentionOptions(block_q=32, block_k=16, topk_ratio=0.3)
    results = []
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            q, k, v = qkv("transposed", False, dtype)
            q.requires_grad_(mode is torch.enable_grad)
            with mode():
                o = sla2_attention(q, k, v, options)
            kept = [o]
            if mode is torch.enable_grad:
                kept.extend(torch.autograd.grad(o.sum(), [q]))
            results += [(x, x.detach().clone()) for x in kept]
            sla2_attention(torch.ones(1, 2, 200, 16), torch.ones(1, 2, 300, 16), torch.ones(1, 2, 300, 8), options)
    for now, then in results:
        assert torch.equal(now, then)


def test_a_second_derivative_is_refused_with_the_fix() -> None:
    x = torch.randn(1, 1, 64, 16, requires_grad=True)
    for training in (False, True):
        o, _ = attend(x, x, x, AttentionOptions(), training=training)
        (gradient,) = torch.autograd.grad(o.square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"SLA2 must be differentiated once.*exclude the module"):
            gradient.sum().backward()
