"""`Rewrite`: what a symbolic size leaves open, and what it does not."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim
from torch.nn import functional as F

import sla2_compile

N, D = 4096, 128


class Call(torch.nn.Module):
    def forward(self, q, k):
        return F.scaled_dot_product_attention(q, k, k)


def row(**sizes):
    """The rewrite of an exported call with these sizes of q and k dynamic."""
    q, k = (torch.empty(2, 2, N, D, dtype=torch.bfloat16, device="meta") for _ in range(2))
    dims = {
        name: Dim(name, min=1024, max=8192) if name.startswith("n") else Dim(name, min=2, max=8) for name in sizes
    }
    shapes = [{place: dims[name] for name, where in sizes.items() for i, place in where if i == x} for x in (0, 1)]
    program = torch.export.export(Call(), (q, k), dynamic_shapes=tuple(shapes))
    report = sla2_compile.report(sla2_compile.transform(program, min_seq_len=0))
    (rewrite,) = report.rewrites
    return rewrite, report


@pytest.mark.parametrize("sizes", [{"b": [(0, 0), (1, 0)]}, {"h": [(0, 1), (1, 1)]}])
def test_a_symbolic_batch_or_head_leaves_the_blocks_known(sizes):
    known, _ = row()
    assert known.flops
    rewrite, report = row(**sizes)
    assert not isinstance(rewrite.where.q_shape[sizes.popitem()[1][0][1]], int)
    blocks = ("block_q", "block_k", "topk", "tm", "tn")
    assert [getattr(rewrite, name) for name in blocks] == [getattr(known, name) for name in blocks]
    assert (rewrite.topk, rewrite.tn) == (9, 64)
    assert (rewrite.flops, rewrite.full_flops) == (0, 0)
    assert "9 of 64" in str(report)


@pytest.mark.parametrize("sizes", [{"nq": [(0, 2)]}, {"nk": [(1, 2)]}])
def test_a_symbolic_length_leaves_them_open(sizes):
    rewrite, _ = row(**sizes)
    assert (rewrite.topk, rewrite.tm, rewrite.tn, rewrite.flops, rewrite.full_flops) == (0, 0, 0, 0, 0)
    assert rewrite.sparsity == pytest.approx(0.85)
