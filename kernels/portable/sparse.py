"""`sla2::sparse_attention` and its backward in blocked PyTorch, for any device: never an N x N map.

The selected key blocks are those of SLA2's sparse branch (`portable/attention.py`), and the tail is `pooled.py`. With
lse over all terms of a row, D = rowsum(dO * O), and S the scores of selected keys:
    P = exp(S - lse);  dV += P^T dO;  dS = P * (dO V^T - D);  dQ += scale dS K;  dK += scale dS^T Q
So the forward saves o and lse. The rows of dS add up to 0 over all terms, so that k_mean, which is taken from all
keys, has no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sla2_compile.kernels.arguments import (
    SparseArgs,
    SparseBackwardArgs,
    SparseBackwardResult,
    SparseResult,
    accumulation_dtype,
    output,
)
from sla2_compile.kernels.portable.attention import sparse_branch
from sla2_compile.kernels.portable.backward import SparseGradients, add_sparse_backward
from sla2_compile.kernels.portable.pooled import Pooled, add_tail, add_tail_backward, finite
from sla2_compile.kernels.portable.tiling import (
    NEG_INF,
    Tiles,
    block_rows,
    call_memory,
    copy_to_blocks,
    cut,
    from_blocks,
    head_groups,
    is_moderate,
    to_blocks,
)


def sparse_forward(args: SparseArgs[Tensor]) -> SparseResult[Tensor]:
    """Compute what `reference.methods.sparse_attention` defines, in blocks."""
    q, k, v, block_q = args.q, args.k, args.v, args.block_q
    (B, Hq, Nq, _), tm, groups = q.shape, args.lut.shape[2], q.shape[1] // k.shape[1]
    acc = accumulation_dtype(q.dtype)
    lse, alpha = (q.new_empty(B, Hq, tm * block_q, 1, dtype=acc) for _ in range(2))
    # keeps 1 / sum finite in rows that see no key
    tiny = torch.finfo(acc).tiny

    with call_memory(q.device) as scratch:
        # whole blocks, so that every group writes its rows in place
        o = scratch("o", (B, Hq, tm * block_q, v.shape[3]), q.dtype)
        for bs, hs in head_groups(B, k.shape[1], max(k.shape[2], groups * Nq), q.device):
            hq = slice(hs.start * groups, hs.stop * groups)
            tiles = cut(args, bs, hs, hq, scratch)
            o_rows, lse_rows, alpha_rows = (block_rows(x, bs, hq, block_q) for x in (o, lse, alpha))
            # the output's own memory where its dtype can hold the products
            sparse = o_rows if o_rows.dtype == tiles.acc else scratch("sparse", tuple(o_rows.shape), tiles.q.dtype)
            total, row_lse = sparse_branch(tiles, sparse)
            if args.tail == "proxy":
                row_lse, share = add_tail(tiles, Pooled.of(tiles, args), sparse, o_rows, total, row_lse)
            else:
                share = (row_lse > NEG_INF).to(acc)
                o_rows.copy_(sparse.to(acc).mul_(1.0 / total[..., None].clamp(min=tiny)))
            lse_rows.copy_(row_lse[..., None])
            alpha_rows.copy_(share[..., None])
        made = output(q, v.shape[3]).copy_(o[:, :, :Nq])

    return SparseResult(made, *(x[:, :, :Nq, 0].contiguous() for x in (lse, alpha)))


def sparse_backward(args: SparseBackwardArgs[Tensor]) -> SparseBackwardResult[Tensor]:
    """Gradients of `sparse_forward`."""
    call, saved = args.saved.call, args.saved
    q, k, v, block_q = call.q, call.k, call.v, call.block_q
    (B, _, Nq, _), groups = q.shape, q.shape[1] // k.shape[1]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))

    with call_memory(q.device) as scratch:
        # the backward takes about twice the forward's memory per token
        for bs, hs in head_groups(B, k.shape[1], 2 * max(k.shape[2], groups * Nq), q.device):
            hq = slice(hs.start * groups, hs.stop * groups)
            tiles = cut(call, bs, hs, hq, scratch)
            g, o = (
                copy_to_blocks(x[bs, hq], block_q, tiles.acc, scratch, name)
                for name, x in (("do", args.do), ("o", saved.o))
            )
            lse = to_blocks(saved.lse[bs, hq, :, None], block_q).squeeze(-1)
            along = (g * o).sum(dim=-1)
            rows = _rows(tiles, g, along, lse)
            dk_rows, dv_rows = (torch.zeros_like(x, dtype=tiles.acc) for x in (tiles.k, tiles.v))
            add_sparse_backward(tiles, rows, lse, dk_rows, dv_rows)
            if call.tail == "proxy":
                add_tail_backward(tiles, Pooled.of(tiles, call), g, along, lse, rows.dq, dk_rows, dv_rows)
            dq[bs, hq] = from_blocks(rows.dq, dq[bs, hq].shape)
            dk[bs, hs] = from_blocks(dk_rows, dk[bs, hs].shape)
            dv[bs, hs] = from_blocks(dv_rows, dv[bs, hs].shape)

    return SparseBackwardResult(dq, dk, dv)


def _rows(tiles: Tiles, do: Tensor, along: Tensor, lse: Tensor) -> SparseGradients:
    """What the gradients of the selected blocks are made from; do (R, block_q, Dv), along and lse (R, block_q)."""
    factor = finite(lse).neg().exp()
    plain = is_moderate(factor)
    if not plain:
        factor = torch.ones_like(factor)
    return SparseGradients(
        do_sparse=(do * factor[..., None]).to(tiles.v.dtype),
        shift=-(along * factor)[:, None],
        plain=plain,
        exact=False,
        dq=torch.zeros_like(tiles.q, dtype=tiles.acc),
    )
