"""Orders, selections and protected tokens of a recipe, in a whole model: planned, reported, copied, restored."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import sla2_compile
from sla2_compile.passes.sites.rules import Reason
from tests import models

ANY: dict[str, Any] = {"min_seq_len": 0, "block_q": 32, "block_k": 16, "topk_ratio": 0.3}
"""The inputs of these tests have 200 tokens."""
GRID = (5, 4, 10)
FIELDS: dict[str, dict[str, Any]] = {
    "brick": {"order": "brick", "grid": GRID},
    "hilbert": {"order": "hilbert", "grid": GRID},
    "threshold": {"selection": "threshold"},
    "heads": {"head_ratios": (0.2, 0.6)},
    "protect": {"protect": ((0, 20),)},
}
SAID = {
    "brick": "order brick on grid (5, 4, 10) in 2 calls",
    "hilbert": "order hilbert on grid (5, 4, 10) in 2 calls",
    "threshold": "selection by threshold, of the topk_ratio best in 2 calls",
    "heads": "a topk_ratio for each of 2 heads in 2 calls",
    "protect": "tokens 0:20 protected in 2 calls",
}
each = pytest.mark.parametrize("name", FIELDS)


def transformed(x: torch.Tensor, **fields: Any) -> Any:
    torch.manual_seed(0)
    return sla2_compile.transform(models.Net(depth=2), example_inputs=(x,), **{**ANY, **fields})


@each
def test_from_plan_to_restore(name, x):
    torch.manual_seed(0)
    whole = models.Net(depth=2).eval()
    before = whole(x)
    model = sla2_compile.transform(whole, example_inputs=(x,), **ANY, **FIELDS[name])
    want = model(x)
    assert not torch.allclose(want, before, atol=1e-4)
    assert SAID[name] in " ".join(str(sla2_compile.report(model)).split())
    assert torch.equal(copy.deepcopy(model)(x), want)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), want)
    with sla2_compile.record_statistics(model):
        model(x)
    stats = sla2_compile.get_sla2_statistics(model)
    assert 0 < stats["mean/sparsity"] < 1
    assert 0 < stats["mean/alpha_mean"] < 1
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert torch.equal(sla2_compile.restore(model).eval()(x), before)


@each
def test_by_torch_compile_and_in_qat(name, x):
    torch.manual_seed(0)
    net = models.Net(depth=2).eval()
    options = {"inner_backend": "aot_eager", **ANY, **FIELDS[name]}
    got = torch.compile(copy.deepcopy(net), backend="sla2", options=options)(x)
    torch.testing.assert_close(got, transformed(x, **FIELDS[name]).eval()(x))
    # low bit is SLA2's own, whatever the order
    prepared = sla2_compile.prepare(transformed(x, **FIELDS[name], low_bit="int8"))
    plain = transformed(x, **FIELDS[name])
    off = (prepared(x) - plain(x)).norm() / plain(x).norm()
    assert 0 < off < 0.02


@pytest.mark.parametrize(
    ("name", "field"), [("threshold", "selection"), ("heads", "head_ratios"), ("protect", "protect")]
)
def test_what_needs_the_routers_best_is_refused(name, field, x, tmp_path):
    model = transformed(x, **FIELDS[name])
    with pytest.raises(ValueError, match=f"{field} must be .* to be calibrated"):
        sla2_compile.calibrate(model, [x], steps=0, progress=False)
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    with pytest.raises(ValueError, match=f"{field} must be .* to be exported to ONNX"):
        sla2_compile.export_onnx(model, (x,), tmp_path / "model.onnx")


@pytest.mark.parametrize("name", ["brick", "hilbert"])
@pytest.mark.parametrize("target", ["portable", "inlined"])
def test_files_hold_the_order(name, target, x, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = transformed(x, **FIELDS[name]).eval()
    found = sla2_compile.export_onnx(model, (x,), tmp_path / "model.onnx", target=target)
    assert "2 SLA2 calls" in str(found)
    checked = sla2_compile.verify_onnx(tmp_path / "model.onnx", model, (x,))
    assert all(run.error < 1e-5 for run in checked.runs)


class Ordered(models.Attention):
    """Attention whose tokens a permutation has put into another order."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = sla2_compile.token_order(GRID)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x[:, self.tokens.index])[:, self.tokens.back]


@pytest.mark.parametrize("masked", [False, True])
def test_sites_are_calibrated_in_their_order(x, masked):
    """As if the model had put its tokens into that order itself."""
    learned, errors = [], []
    for owner, fields in ((models.Attention, FIELDS["brick"]), (Ordered, {})):
        torch.manual_seed(0)
        model = owner()
        if masked:
            model = Masked(model)
        model = sla2_compile.transform(model, example_inputs=(x,), **ANY, **fields)
        batches = [(x + step,) for step in range(3)]
        found = sla2_compile.calibrate(model, batches, steps=4, ratios=(0.3,), patience=0, progress=False)
        (site,) = found.sites
        learned.append([p.detach() for p in model.parameters()])
        errors.append((site.before.error, site.now.error, site.now.recall))
        with torch.no_grad():
            errors[-1] += (float(model(x).norm()),)
    torch.testing.assert_close(learned[0], learned[1], rtol=1e-3, atol=1e-4)
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


class Masked(torch.nn.Module):
    """Hides some tokens from the attention inside, wherever that has put them."""

    def __init__(self, inner: models.Attention) -> None:
        super().__init__()
        self.inner, keys = inner, torch.arange(200) % 7 > 0
        self.keys = keys[inner.tokens.index] if isinstance(inner, Ordered) else keys

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sdpa = F.scaled_dot_product_attention
        o = self.inner
        h = x[:, o.tokens.index] if isinstance(o, Ordered) else x
        q, k, v = o.qkv(h).view(*h.shape[:2], 3, o.heads, -1).permute(2, 0, 3, 1, 4)
        y = o.out(sdpa(q, k, v, self.keys[None, None, None]).transpose(1, 2).reshape(h.shape))
        return y[:, o.tokens.back] if isinstance(o, Ordered) else y


def test_protected_blocks_count_as_kept(x):
    (plain, _), (protected, _) = (
        sla2_compile.report(transformed(x, **fields)).rewrites for fields in ({}, FIELDS["protect"])
    )
    # 20 tokens are two blocks of 16
    assert (plain.topk, protected.topk) == (3, 5)
    (near, _) = sla2_compile.report(transformed(x, protect=((0, 5), (8, 12)))).rewrites
    # two ranges in one block
    assert near.topk == 4


def test_several_bricks_take_turns(x):
    model = transformed(x, order="brick", grid=GRID, brick=((1, 4, 4), (5, 1, -1)))
    assert [block.sla2[0].settings.options.brick for block in model.blocks] == [(1, 4, 4), (5, 1, -1)]


def test_calls_off_the_grid_keep_full_attention(x):
    with pytest.raises(ValueError, match=r"grid must have the sequence's 200 tokens, got \(1, 9, 9\), which are 81"):
        transformed(x, order="brick", grid=(1, 9, 9))
    model = transformed(x, order="brick", grid=GRID).eval()
    torch.manual_seed(0)
    whole = models.Net(depth=2).eval()
    longer = torch.cat([x, x], dim=1)
    torch.testing.assert_close(model(longer), whole(longer))
    assert f"1 x {Reason.PLACES.value}" in " ".join(str(sla2_compile.report(model)).split())


def test_causal_calls_have_no_order(x):
    with pytest.raises(ValueError, match=Reason.CAUSAL_ORDER.value):
        sla2_compile.transform(models.Causal(), example_inputs=(x,), **ANY, order="brick", grid=GRID)
    with pytest.raises(ValueError, match="causal calls take order='raster'"):
        sla2_compile.transform(models.Causal(), example_inputs=(x,), **ANY, order="hilbert", grid=GRID)
    for name in ("threshold", "heads", "protect"):
        model = sla2_compile.transform(models.Causal(), example_inputs=(x,), method="topk", **ANY, **FIELDS[name])
        later = x.clone()
        # a whole number of query blocks: a block's queries choose its keys together
        later[:, 96:] += 1.0
        torch.testing.assert_close(model(later)[:, :96], model(x)[:, :96])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"order": "brick"}, "grid must be given with order 'brick', got None"),
        ({"grid": (0, 2, 2)}, r"grid must be 'auto' or \(T, H, W\), each at least 1, got \(0, 2, 2\)"),
        ({"grid": "square"}, "grid must be 'auto' or"),
        ({"brick": (1, 2)}, r"brick must be 'auto', or \(T, H, W\) or several of these, got \(1, 2\)"),
        ({"brick": (1, 0, 2)}, "brick must have sides of at least 1, or -1"),
        ({"protect": (0, 32)}, r"protect must be ranges \(start, stop\) of tokens, got \(0, 32\)"),
        ({"protect": ((4, 2),)}, r"protect must hold ranges with start < stop, got \(4, 2\)"),
        ({"head_ratios": (2.0,)}, "head_ratios must be less than or equal to 1.0, got 2.0"),
        ({"method": "vsa", "brick": (3, 3, 3)}, "brick must have a power of two from 8 to 256 tokens"),
        ({"method": "vsa", "selection": "threshold"}, "selection must be 'topk' with method 'vsa'"),
        ({"method": "vmoba", "head_ratios": (0.2,)}, "head_ratios must be empty with method 'vmoba'"),
        ({"method": "vmoba", "order": "hilbert", "grid": GRID}, "order must be 'raster' with method 'vmoba'"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    with pytest.raises(sla2_compile.RecipeError, match=message):
        sla2_compile.Recipe(**fields)


def test_a_file_brings_every_field_back(tmp_path):
    recipe = sla2_compile.Recipe(
        protect=((0, 4), (-3, None)), grid=GRID, order="brick", brick=((1, 4, 4), (5, -1, -1)), head_ratios=(0.1, 0.2)
    )
    recipe.save(tmp_path / "mine.yaml")
    assert sla2_compile.Recipe.load(tmp_path / "mine.yaml") == recipe.model_copy()
