"""`sla2::select` written plainly, row by row: its specification. Shapes as in `reference/sla2.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from sla2_compile.kernels.blocks import num_blocks, num_kept
from sla2_compile.kernels.reference.sla2 import NEG_INF, block_scores, causal_blocks, masked_mean


def select(
    q: Tensor, k: Tensor, proj_q: Tensor | None, proj_k: Tensor | None, key_mask: Tensor | None,
    topk_ratio: float, compression_ratio: int, block_q: int, block_k: int, scale: float, is_causal: bool,
    by_threshold: bool, threshold: float, head_ratios: tuple[float, ...], protect: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Choose key blocks for each query block by the router's scores.

    Of the visible blocks of a row, that is those with a real key that some query of the block sees, are kept
        every protected one, and every one on a causal diagonal;
        then the best, until a head's count, num_kept of its ratio, is reached beside the protected ones;
        by_threshold: of these only scores of at least mean + threshold * standard deviation over the visible blocks,
        and the best block.

    Returns:
        lut, log_rest, entropy and k_mean as `reference.route`; rows have -1 where they keep fewer blocks.
    """
    k_mean = masked_mean(k, key_mask)
    args = (proj_q, proj_k, key_mask, compression_ratio, block_q, block_k, scale)
    peak, typical = block_scores(q, k - k_mean[:, :, None], *args)
    (B, Hq, tm, tn), Nq, Nk = peak.shape, q.shape[2], k.shape[2]
    allowed, forced = torch.ones(tm, tn, dtype=torch.bool), torch.zeros(tm, tn, dtype=torch.bool)
    if is_causal:
        allowed, forced = causal_blocks(Nq, Nk, block_q, block_k, q.device)
    always = {j for first, end in zip(protect[::2], protect[1::2], strict=True) for j in range(first, end)}
    counts = [
        num_kept(num_blocks(Nk, block_k), r, block_q, block_k, is_causal) for r in head_ratios or [topk_ratio] * Hq
    ]
    width = min(tn, max(counts) + len(always))
    lut = torch.full((B, Hq, tm, width), -1, dtype=torch.int32)
    log_rest, entropy = peak.new_empty(B, Hq, tm), peak.new_empty(B, Hq, tm)
    for b in range(B):
        for h in range(Hq):
            for i in range(tm):
                row = peak[b, h, i].masked_fill(~allowed[i], NEG_INF)
                seen = [j for j in range(tn) if row[j] > NEG_INF]
                first = [j for j in seen if j in always or forced[i, j]]
                others = sorted((j for j in seen if j not in first), key=lambda j: -float(row[j]))
                kept = (first + others)[: counts[h] + len(always)]
                if by_threshold and seen:
                    scores = row[seen]
                    least = scores.mean() + threshold * scores.std(correction=0)
                    kept = first + [j for j in kept if j not in first and row[j] >= least]
                    kept = kept or others[:1]
                lut[b, h, i, : len(kept)] = torch.tensor(sorted(kept), dtype=torch.int32)
                rest = [j for j in seen if j not in kept]
                log_rest[b, h, i] = typical[b, h, i, rest].logsumexp(0) if rest else NEG_INF
                p = row[seen].softmax(0)
                entropy[b, h, i] = -(p * p.log()).sum()
    return lut, log_rest, entropy, k_mean
