"""`get_sla2_statistics`: its keys, compiled models, and what its errors count."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import sla2_compile
from sla2_compile.passes.sites.rules import Reason
from tests import models


def test_the_error_counts_sites_that_kept_full_attention():
    x = torch.randn(1, 256, 32)
    model = sla2_compile.transform(models.Net(depth=3), example_inputs=(x,), min_seq_len=0)
    sites = [block.sla2[0] for block in model.blocks]
    for site, calls, said in ((sites[0], 1, "1 of 3 sites: 1 x"), (sites[2], 2, "2 of 3 sites: 3 x")):
        for _ in range(calls):
            site.count(Reason.DROPOUT)
        with pytest.raises(ValueError, match=f"got full attention at {said} {Reason.DROPOUT.value}"):
            sla2_compile.get_sla2_statistics(model)


def test_flat_keys():
    x = torch.randn(1, 256, 32)
    model = sla2_compile.transform(models.Net(depth=2), example_inputs=(x,), min_seq_len=0, topk_ratio=0.5)
    both = sla2_compile.transform(models.SelfAndCross(), example_inputs=(x, x), min_seq_len=0)
    with sla2_compile.record_statistics(model), sla2_compile.record_statistics(both):
        model(x)
        both(x, x)
    stats = sla2_compile.get_sla2_statistics(model, style="flat")
    keys = ("alpha_mean", "alpha_std", "sparsity", "router_params")
    assert set(stats) == {f"sla2_blocks_{i}/{key}" for i in range(2) for key in keys}
    assert stats["sla2_blocks_1/router_params"] == 2 * 16 * 16
    named = sla2_compile.get_sla2_statistics(model)
    for key in keys[:3]:
        assert stats[f"sla2_blocks_1/{key}"] == named[f"blocks.1.sla2.0/{key}"]
    assert {key.split("/")[0] for key in sla2_compile.get_sla2_statistics(both, style="flat")} == {"sla2", "sla2_1"}
    with pytest.raises(ValueError, match="style must be 'sites' or 'flat', got 'dots'"):
        sla2_compile.get_sla2_statistics(model, style="dots")


def test_a_compiled_model_is_recorded_and_goes_on_compiled():
    x = torch.randn(1, 256, 32)
    model = sla2_compile.transform(models.Net(depth=2), example_inputs=(x,), min_seq_len=0)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    expected = compiled(x)
    with sla2_compile.record_statistics(compiled):
        torch.testing.assert_close(compiled(x), expected)
        with sla2_compile.record_statistics(model.blocks[0]):
            pass
        compiled(x)
    assert sla2_compile.report(model).ran == {f"blocks.{i}.sla2.0": 2 for i in range(2)}
    compiled(x)
    assert sla2_compile.report(model).ran == {f"blocks.{i}.sla2.0": 2 for i in range(2)}
    assert counter.frame_count == 1
    assert "mean/alpha_mean" in sla2_compile.get_sla2_statistics(compiled)
