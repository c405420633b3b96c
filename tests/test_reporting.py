"""report, inspect, statistics and the printed configuration: the numbers they show are the true ones."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import sla2_compile
from sla2_compile.api import inspect
from sla2_compile.kernels.arguments import ForwardArgs
from sla2_compile.passes.sites.outcome import Miss
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.passes.sites.site import Site
from tests import models

ANY: dict[str, Any] = {"min_seq_len": 0}


def test_report_counts_blocks_and_flops():
    x = torch.randn(1, 256, 32)
    model = sla2_compile.transform(
        models.Net(depth=1), example_inputs=(x,), block_q=32, block_k=16, topk_ratio=0.25, compression_ratio=8, **ANY
    )
    report = sla2_compile.report(model)
    (rewrite,) = report.rewrites
    assert (rewrite.tm, rewrite.tn, rewrite.topk, rewrite.sparsity) == (8, 16, 4, 0.75)
    heads, n, d = 2, 256, 16
    assert rewrite.full_flops == heads * 4 * n * n * d
    sparse, linear, router = 4 * n * 64 * d, 2 * (n + n + 8 * 16) * d * d, 2 * 32 * 32 * d
    assert rewrite.flops == heads * (sparse + linear + router)
    assert report.flops_saved == 1 - rewrite.flops / rewrite.full_flops
    with sla2_compile.record_statistics(model):
        model(x)
    assert model.blocks[0].sla2[0].last_routing.lut.shape == (1, 2, 8, 4)


def test_report_prints_and_serialises(x):
    model = sla2_compile.transform(models.Net(), example_inputs=(x,), exclude="blocks.1", **ANY)
    report = sla2_compile.report(model)
    text = str(report)
    assert "2 of 3 attention calls replaced" in text
    assert "excluded by the recipe" in text
    assert "blocks.2" in text
    data = json.loads(json.dumps(report.to_dict()))
    assert [call["replaced"] for call in data["calls"]] == [True, False, True]
    assert data["recipe"]["exclude"] == ["blocks.1"]


def test_report_of_parts_and_of_an_untouched_model(x):
    outer = torch.nn.Sequential(models.Net(depth=1), models.Net(depth=1))
    assert sla2_compile.report(outer).outcomes == ()
    sla2_compile.transform(outer[1], example_inputs=(x,), **ANY)
    (rewrite,) = sla2_compile.report(outer).rewrites
    assert rewrite.where.owner == "1.blocks.0"
    sla2_compile.restore(outer)
    assert sla2_compile.report(outer).outcomes == ()


def test_an_owner_that_returns_early(x):
    class Cached(models.Attention):
        kept = None

        def forward(self, x):
            return super().forward(x) if self.kept is None else self.kept

    model = nn.Sequential(Cached(), Cached())
    sla2_compile.transform(model, example_inputs=(x,), min_seq_len=0, topk_ratio=0.25)
    model(x)
    model[0].kept = model[0](x)
    with pytest.warns(UserWarning, match="0 ran without the attention calls .*: it returned before them"):
        model(x)
    with pytest.warns(UserWarning, match="0: 1 of 3 eager forwards made none"):
        text = str(sla2_compile.report(model))
    assert text.count("SLA2, not always") == 1
    assert "not reached" not in text
    model[0].forward = lambda x: x
    with pytest.warns(UserWarning, match="its forward was replaced"):
        text = str(sla2_compile.report(model))
    assert "not always" not in text
    assert text.count("not reached") == 1


def test_an_owner_that_is_passed_by(x):
    """Code that was patched into a parent later may compute the attention of its child without calling it."""
    model = models.Net(depth=2)
    sla2_compile.transform(model, example_inputs=(x,), min_seq_len=0, topk_ratio=0.25)
    assert "not called so far" not in str(sla2_compile.report(model))
    model(x)
    assert "not called so far" not in str(sla2_compile.report(model))
    names = [r.where.owner for r in sla2_compile.report(model).rewrites]
    passed = copy.deepcopy(model)
    for module in passed.modules():
        if isinstance(module, Site):
            module.runs = 0
    owner = passed.get_submodule(names[0])
    type(owner).forward(owner, x)
    passed.get_submodule(names[1])(x)
    assert f"not called so far, as far as eager code tells: {names[0]}" in str(sla2_compile.report(passed))


def test_inspect_changes_nothing(x):
    model = models.Net()
    before = [dict(m.__dict__) for m in model.modules()]
    report = inspect(model, "balanced", example_inputs=(x,), **ANY)
    assert len(report.rewrites) == 3
    assert [m.__dict__.keys() for m in model.modules()] == [b.keys() for b in before]
    assert inspect(torch.nn.Linear(32, 32), example_inputs=(x,)).outcomes == ()


def test_inspect_refuses_what_transform_refuses(x):
    with pytest.raises(ValueError, match=r"example_inputs must be a tuple .* write \(x,\)"):
        inspect(models.Net(), example_inputs=x)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        inspect(models.Net, example_inputs=(x,))
    model = sla2_compile.transform(models.Net(), example_inputs=(x,), **ANY)
    assert inspect(model, example_inputs=(x,), **ANY).outcomes == sla2_compile.report(model).outcomes
    with pytest.raises(ValueError, match="must not be transformed twice"):
        inspect(model, "paper", example_inputs=(x,), **ANY)


def test_inspect_of_graphs_changes_nothing(x):
    program = torch.export.export(models.Net(), (x,))
    code = str(program.graph)
    assert len(inspect(program, **ANY).rewrites) == 3
    assert str(program.graph) == code
    gm = program.module()
    code, names = str(gm.graph), [name for name, _ in gm.named_modules()]
    assert len(inspect(gm, **ANY).rewrites) == 3
    assert (str(gm.graph), [name for name, _ in gm.named_modules()]) == (code, names)
    assert sla2_compile.report(gm).outcomes == ()
    sla2_compile.transform(gm, **ANY)
    assert len(inspect(gm, **ANY).rewrites) == 3


def test_parts_with_recipes_of_their_own(x):
    parts = torch.nn.ModuleDict({"first": models.Net(depth=1), "second": models.Net(depth=2)})
    sla2_compile.transform(parts["first"], "paper", example_inputs=(x,), **ANY)
    assert sla2_compile.report(parts).recipes == {}
    sla2_compile.transform(parts["second"], "high_quality", example_inputs=(x,), **ANY)
    report = sla2_compile.report(parts)
    assert "3 of 3 attention calls replaced, recipes paper (first), high_quality (second)" in str(report)
    assert {name: recipe["name"] for name, recipe in report.to_dict()["recipes"].items()} == {
        "first": "paper",
        "second": "high_quality",
    }


def test_statistics(x):
    model = sla2_compile.transform(
        models.Net(depth=2), example_inputs=(x,), block_q=32, block_k=16, topk_ratio=0.5, **ANY
    )
    expected = model(x)
    with pytest.raises(ValueError, match=r"got 2 sites with none recorded; run one under `with sla2_compile.record"):
        sla2_compile.get_sla2_statistics(model)
    with sla2_compile.record_statistics(model):
        torch.testing.assert_close(model(x), expected)
    stats = sla2_compile.get_sla2_statistics(model)
    assert all(isinstance(v, float) and math.isfinite(v) for v in stats.values())
    # 13 key blocks of 16 for 200 tokens, 6 kept
    assert stats["blocks.1.sla2.0/sparsity"] == pytest.approx(1 - 6 / 13)
    assert 0 <= stats["mean/alpha_min"] <= stats["mean/alpha_mean"] <= stats["mean/alpha_max"] <= 1
    assert 0 < stats["mean/router_entropy"] <= math.log(13) + 1e-4
    # a forward that is not recorded changes nothing
    model(2 * x)
    assert sla2_compile.get_sla2_statistics(model) == stats
    with torch.no_grad():
        model.blocks[0].sla2[0].alpha_bias.fill_(50.0)
    with sla2_compile.record_statistics(model):
        model(x)
    assert sla2_compile.get_sla2_statistics(model)["blocks.0.sla2.0/alpha_min"] == pytest.approx(1.0)


def test_statistics_of_full_ratio_and_of_alpha_modes(x):
    for fields, low, high in (
        ({"topk_ratio": 1.0}, 1.0, 1.0),
        ({"alpha": "head"}, 0.94, 0.96),
        ({"alpha": "block"}, 0.94, 0.96),
    ):
        model = sla2_compile.transform(models.Net(depth=1), example_inputs=(x,), **{**ANY, **fields})
        with sla2_compile.record_statistics(model):
            model(x)
        stats = sla2_compile.get_sla2_statistics(model)
        assert low <= stats["mean/alpha_min"] <= stats["mean/alpha_max"] <= high


def test_a_model_without_sla2_has_no_statistics_and_no_configuration(x):
    assert sla2_compile.get_sla2_statistics(models.Net()) == {}
    pending = sla2_compile.transform(models.Net(), **ANY)
    with pytest.raises(ValueError, match="must have run its first forward"):
        sla2_compile.get_sla2_statistics(pending)
    with pytest.raises(ValueError, match="must be transformed"):
        sla2_compile.log_sla2_config(models.Net())


def test_log_config(x):
    lines: list[str] = []
    model = sla2_compile.transform(
        models.Net(depth=2), example_inputs=(x,), overrides={"blocks.1": {"topk_ratio": 0.4}}, **ANY
    )
    sla2_compile.log_sla2_config(model, lines.append)
    assert lines[0] == "SLA2 in Net: recipe balanced, 2 sites, 0 left alone"
    assert "  topk_ratio: 0.15" in lines
    assert "  override blocks.1: {'topk_ratio': 0.4}" in lines
    # two projections of 16 x 16, gain and bias of 2 heads, in each of two sites
    assert lines[-1] == f"  parameters added: {2 * (2 * 16 * 16 + 4)}"


def one_line(report):
    """What is printed, without the breaks that a narrow table makes."""
    return " ".join(str(report).split())


def test_caption_says_what_runs_in_low_bit(x, monkeypatch):
    from sla2_compile.kernels.cuda import device

    model = sla2_compile.transform(
        models.Net(depth=2),
        example_inputs=(x,),
        block_q=32,
        block_k=32,
        low_bit="int8_fp8",
        overrides={"blocks.1": {"low_bit": "int8"}},
        **ANY,
    )
    report = sla2_compile.report(model)
    assert "low bit int8_fp8: not run on cpu; computed in the input's dtype" in str(report)
    assert "low bit int8: not run on cpu; computed in the input's dtype" in str(report)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "shared_limit", lambda device: 227 * 1024)
    moved = replace(report, device="cuda")
    monkeypatch.setattr(device, "capability", lambda device: 90)
    text = one_line(moved)
    assert "blocked PyTorch on cuda in 2 calls: the Triton kernels take bfloat16 and float16, not float32" in text
    assert "low bit int8_fp8: not run in blocked PyTorch; computed in the input's dtype" in text
    outcomes = tuple(replace(r, where=replace(r.where, dtype="bfloat16")) for r in report.outcomes)
    low = replace(moved, outcomes=outcomes)
    assert "low bit int8_fp8: INT8 QK and FP8 PV; training computes in the input's dtype" in str(low)
    assert "low bit int8: INT8 QK; training computes in the input's dtype" in str(low)
    monkeypatch.setattr(device, "capability", lambda device: 80)
    assert "low bit int8_fp8: INT8 QK (no FP8 on sm_80); training computes in the input's dtype" in one_line(low)
    assert "low bit int8: INT8 QK; training computes in the input's dtype" in one_line(low)
    assert [call["low_bit"] for call in low.to_dict()["calls"]] == [
        {"asked": "int8_fp8", "runs": "int8", "why": "no FP8 on sm_80"},
        {"asked": "int8", "runs": "int8", "why": ""},
    ]
    assert {call["portable"] for call in low.to_dict()["calls"]} == {""}
    assert report.to_dict()["calls"][0]["low_bit"] == {"asked": "int8_fp8", "runs": "none", "why": "not run on cpu"}
    monkeypatch.setattr(device, "capability", lambda device: 90)
    small = replace(low, outcomes=tuple(replace(r, block_k=16) for r in outcomes))
    assert "low bit int8_fp8: INT8 QK (FP8 needs block_k of 32); training" in one_line(small)
    mixed = replace(low, outcomes=(outcomes[0], replace(outcomes[0], block_k=16)))
    assert "INT8 QK and FP8 PV in 1 call, INT8 QK (FP8 needs block_k of 32) in 1 call; training" in one_line(mixed)
    none = sla2_compile.transform(models.Net(depth=1), example_inputs=(x,), low_bit="none", **ANY)
    assert "low bit" not in str(sla2_compile.report(none))


@pytest.fixture
def gpu(monkeypatch):
    """Make the report believe in a chip: gpu(90)."""
    from sla2_compile.kernels.cuda import device

    def of(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(device, "capability", lambda device: capability)
        monkeypatch.setattr(device, "shared_limit", lambda device: 227 * 1024)

    return of


class Call(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q):
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, **self.options)


RUNS = "low bit auto: INT8 QK; training computes in the input's dtype"
NOT_FASTER = "low bit auto: does not pay on cuda (sm_90), as far as measured; computed in the input's dtype"
TOO_FAR = (
    "low bit auto: over 3 times bf16's own error above a thirty-second of the key blocks; "
    "computed in the input's dtype"
)


def test_caption_says_what_auto_comes_to(gpu, monkeypatch):
    def caption(D, topk_ratio=0.03125, device="cuda", dtype=torch.bfloat16, **options):
        model, q = Call(**options), torch.empty(1, 1, 65536, D, dtype=dtype, device="meta")
        sla2_compile.transform(model, example_inputs=(q,), topk_ratio=topk_ratio, recipe="balanced", min_seq_len=0)
        return one_line(replace(sla2_compile.report(model), device=device))

    gpu(90)
    assert RUNS in caption(128)
    assert NOT_FASTER in caption(64)
    assert NOT_FASTER in caption(128, topk_ratio=0.025)
    assert NOT_FASTER in caption(128, is_causal=True)
    assert TOO_FAR in caption(128, topk_ratio=0.15)
    # no claim about what was not measured, or does not run
    assert "low bit auto: not run in blocked PyTorch" in caption(128, dtype=torch.float32)
    assert "low bit auto: not run on meta" in caption(128, device="")
    for capability in (80, 89, 100):
        gpu(capability)
        assert f"low bit auto: not measured on sm_{capability}; computed" in caption(128)
    gpu(70)
    text = caption(128)
    assert "the Triton kernels need sm_80, not sm_70" in text
    assert "low bit auto: not run in blocked PyTorch" in text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "low bit auto: not run on cuda, which is not here" in caption(128)


def exported(grad=False, dynamic=True, **recipe):
    """A program of one call, transformed; its length is dynamic."""
    q = torch.empty(1, 1, 2048, 128, dtype=torch.bfloat16)
    shapes = ({2: torch.export.Dim("n", min=2048, max=100_000)},) if dynamic else None
    with torch.set_grad_enabled(grad):
        program = torch.export.export(Call(), (q,), dynamic_shapes=shapes)
        return sla2_compile.transform(program, min_seq_len=0, **recipe)


def on_cuda(report):
    outcomes = tuple(replace(r, where=replace(r.where, device="cuda")) for r in report.outcomes)
    return replace(report, outcomes=outcomes)


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_exported_graph_says_itself_what_it_computes(gpu, dynamic):
    gpu(90)
    # a program is an inference, whether or not it was exported with a gradient wanted
    for grad in (False, True):
        program = exported(grad, dynamic, topk_ratio=0.03)
        (node,) = [n for n in program.graph.nodes if n.target is torch.ops.sla2.forward.default]
        call = ForwardArgs(*node.args)
        assert call.low_bit == "none"
        for holder in (program, program.module()):
            report = sla2_compile.report(holder)
            assert [x.low_bit for x in report.rewrites] == ["none"]
            assert "low bit auto: not run on cpu; computed in the input's dtype" in one_line(report)
            if dynamic:
                assert "low bit auto: decided by the export; computed in" in one_line(on_cuda(report))
            else:
                assert NOT_FASTER in one_line(on_cuda(report))
        # as a GPU's export has it
        node.args = tuple(call._replace(low_bit="int8"))
        report = on_cuda(sla2_compile.report(program))
        assert "low bit auto: INT8 QK; fixed by the export" in one_line(report)
        assert report.to_dict()["calls"][0]["low_bit"] == {"asked": "auto", "runs": "int8", "why": ""}


def test_graphs_with_fewer_ops_than_calls():
    """A call may keep full attention in a graph; then only what all ops agree on is known."""
    from sla2_compile.reports.computed import as_exported

    program = exported()
    (x,) = sla2_compile.report(program).outcomes
    miss = Miss(x.where, Reason.EXCLUDED)
    assert as_exported(program.graph_module, [miss, x])[0] is miss
    blank = replace(x, low_bit="")
    assert [r.low_bit for r in as_exported(program.graph_module, [blank, miss, blank]) if r is not miss] == [
        "none"
    ] * 2
    assert as_exported(Call(), [blank]) == [blank]


def test_a_symbolic_length_leaves_low_bit_open(gpu):
    def caption(dtype=torch.bfloat16, **recipe):
        q = torch.empty(1, 1, 2048, 128, dtype=dtype)
        shapes = ({2: torch.export.Dim("n", min=2048, max=100_000)},)
        gm = torch.export.export(Call(), (q,), dynamic_shapes=shapes).module()
        report = sla2_compile.report(sla2_compile.transform(gm, **{"min_seq_len": 0, **recipe}))
        assert not report.rewrites[0].tn
        (call,) = replace(report, device="cuda").to_dict()["calls"]
        return one_line(replace(report, device="cuda")), call["low_bit"]

    gpu(90)
    text, data = caption(topk_ratio=0.03)
    assert "low bit auto: depends on the length; training computes in the input's dtype" in text
    assert data == {"asked": "auto", "runs": "", "why": "depends on the length"}
    # no length changes that
    assert TOO_FAR in caption(topk_ratio=0.15)[0]
    assert NOT_FASTER in caption(topk_ratio=0.03, block_q=64, block_k=64)[0]
    assert "low bit int8: INT8 QK; training" in caption(low_bit="int8")[0]
    # short sequences have blocks of 16 keys, of which FP8 makes nothing
    assert "low bit int8_fp8: depends on the length" in caption(low_bit="int8_fp8")[0]
    assert "low bit int8_fp8: INT8 QK and FP8 PV;" in caption(low_bit="int8_fp8", min_seq_len=1024)[0]
    assert "low bit int8_fp8: INT8 QK and FP8 PV;" in caption(low_bit="int8_fp8", block_k=64)[0]
    assert "blocked PyTorch on cuda in 1 call" in caption(dtype=torch.float32)[0]


@pytest.mark.parametrize("under", [False, True])
def test_a_call_seen_under_autocast_has_its_dtype(gpu, under):
    for dtype, known in ((torch.float32, "bfloat16" if under else "float32"), (torch.float64, "float64")):
        model, q = Call(), torch.randn(1, 1, 2048, 128, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=under):
            sla2_compile.transform(model, example_inputs=(q,), low_bit="int8", **ANY)
        report = sla2_compile.report(model)
        assert [x.where.dtype for x in report.rewrites] == [known]
        gpu(90)
        text = one_line(replace(report, device="cuda"))
        if known == "bfloat16":
            assert "low bit int8: INT8 QK; training computes" in text
        else:
            outside = " outside autocast" * (known == "float32")
            assert f"the Triton kernels take bfloat16 and float16, not {known}{outside} low bit" in text


# what of a call or of a chip the Triton kernels refuse, and what the report says of it
REFUSED = {
    "fp32": (
        {"dtype": torch.float32},
        90,
        "the Triton kernels take bfloat16 and float16, not float32 outside autocast",
    ),
    "fp64": ({"dtype": torch.float64}, 90, "the Triton kernels take bfloat16 and float16, not float64"),
    "old chip": ({}, 75, "the Triton kernels need sm_80, not sm_75"),
    "block_q": ({"block_q": 8}, 90, "the Triton kernels take block_q of 16 to 128, not 8"),
    "block_k": ({"block_k": 256}, 90, "the Triton kernels take block_k of 16 to 128, not 256"),
    "scale": ({"scale": -0.125}, 90, "the Triton kernels take a scale above 0 only"),
    "zero scale": ({"scale": 0.0}, 90, "the Triton kernels take a scale above 0 only"),
    "tiles": ({"D": 256, "block_k": 128}, 89, "block_k 128 at head dim 256 does not fit the shared memory of sm_89"),
    "nothing": ({}, 90, ""),
    "fp16": ({"dtype": torch.float16}, 80, ""),
}


@pytest.mark.parametrize("low_bit", ["none", "int8"])
@pytest.mark.parametrize("name", REFUSED)
def test_report_says_what_runs_blocked_pytorch_on_a_gpu(name, low_bit, monkeypatch):
    from sla2_compile.kernels.cuda import device

    options, arch, why = REFUSED[name]
    call = {"dtype": torch.bfloat16, "D": 64, "block_q": 128, "block_k": 64, "scale": None, **options}

    class Call(torch.nn.Module):
        def forward(self, q):
            return torch.nn.functional.scaled_dot_product_attention(q, q, q, scale=call["scale"])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "capability", lambda device: arch)
    monkeypatch.setattr(device, "shared_limit", lambda device: (99 if arch == 89 else 227) * 1024)
    q = torch.empty(1, 1, 1024, call["D"], dtype=call["dtype"], device="meta")
    blocks = {name: call[name] for name in ("block_q", "block_k")}
    report = inspect(Call(), "balanced", example_inputs=(q,), low_bit=low_bit, **blocks, **ANY)
    assert "blocked PyTorch" not in str(report)
    moved = replace(report, device="cuda")
    line = f"blocked PyTorch on cuda in 1 call: {why}"
    assert line in one_line(moved) if why else "blocked PyTorch" not in str(moved)
    (row,) = moved.to_dict()["calls"]
    assert row["portable"] == why
    assert row["low_bit"] == {"asked": low_bit, "runs": "none" if why else low_bit, "why": why * (low_bit != "none")}


def test_report_names_rocm(monkeypatch):
    from sla2_compile.kernels.cuda import device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "capability", lambda device: 94)
    monkeypatch.setattr(device, "shared_limit", lambda device: 64 * 1024)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    q = torch.empty(1, 1, 1024, 64, dtype=torch.bfloat16, device="meta")
    report = replace(inspect(Call(), "balanced", example_inputs=(q,), **ANY), device="cuda")
    assert "blocked PyTorch on cuda in 1 call: the Triton kernels are for NVIDIA, not ROCm" in one_line(report)
    assert report.to_dict()["calls"][0]["low_bit"]["why"] == "the Triton kernels are for NVIDIA, not ROCm"
