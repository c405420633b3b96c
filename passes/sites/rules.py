"""Which attention calls SLA2 takes, and the fixed list of reasons why it leaves one alone.

The same function decides at planning time (fake tensors), in graphs (example values) and at run time
(real tensors, SymInts under torch.compile). It looks at metadata only (`masks.py` reads masks).
"""

from __future__ import annotations

from enum import Enum

import torch

from sla2_compile.kernels.checks import DTYPES, MAX_HEAD_DIM
from sla2_compile.kernels.options import METHODS
from sla2_compile.kernels.places import why_no_places
from sla2_compile.kernels.torch_internals import surely
from sla2_compile.kernels.tracing import autocasts, shorter
from sla2_compile.passes.sites.call import AttentionCall
from sla2_compile.passes.sites.crossover import Least
from sla2_compile.passes.sites.masks import MaskView
from sla2_compile.passes.sites.settings import SiteSettings


class Reason(str, Enum):
    """Why a call keeps full attention. The value is what reports print."""

    SHORT_SEQUENCE = "short sequence"
    LITTLE_WORK = "too little work to gain"
    SHORT_KEYS = "cross-attention with short keys"
    FEW_QUERIES = "few queries over many keys, as in decoding"
    BIAS = "additive bias"
    QUERY_MASK = "mask differs between heads or queries"
    DROPOUT = "dropout in training"
    HEAD_DIM = "head dim beyond the kernels'"
    RANK = "not 4-D"
    BROADCAST = "heads or batch broadcast"
    DTYPE = "dtype"
    CAUSAL_ALL_KEYS = "causal with linear_scope 'all'"
    CAUSAL_METHOD = "causal with a method whose means hold future keys"
    CAUSAL_ORDER = "causal with an order of its tokens"
    PLACES = "its tokens are not those of the recipe's grid"
    EXCLUDED = "excluded by the recipe"
    LAYER_RANGE = "outside start_layer..end_layer"
    WEIGHTS = "attention weights requested"
    EXTRA_KEYS = "extra keys of nn.MultiheadAttention (bias_k, bias_v, add_zero_attn, static_k, static_v)"
    MULTIHEAD = "inside nn.MultiheadAttention (graphs only; transform the nn.Module)"
    HAND_WRITTEN = "softmax written by hand, possibly attention"
    WEIGHTS_USED = "softmax weights or scores are used elsewhere"
    LOOK_ALIKE = "looks like token attention, and is not"
    CONTAINER = "owner runs its children one by one (Sequential and the like)"
    CHECKPOINT = "in a checkpoint inside the owner, or under its own no_grad; checkpoint the whole owner instead"
    BODY = "in a block of its own in the graph (checkpoint, gradient or autocast mode, control flow)"
    EMPTY = "no tokens, or an empty batch"
    NESTED = "nested tensor"
    TRANSFORMED = "under a transform of torch.func"
    EXPOSED = "queries or keys whose memory was handed out (numpy and the like) before the scores"
    OPAQUE = "an operator of attention that is not scaled_dot_product_attention"
    SCRIPTED = "in scripted code or an extension, whose calls cannot be replaced"
    THREAD = "in a thread that the forward starts, whose calls cannot be replaced"
    COMPILED = "written by hand in, or beside products in, a compiled function that the owner calls"
    UNSEEN = "call not seen when the model was planned"
    OFF = "switched off (sites_off)"


SMALL = (Reason.SHORT_SEQUENCE, Reason.SHORT_KEYS, Reason.FEW_QUERIES, Reason.LITTLE_WORK)
"""What `min_seq_len` refuses."""


def why_not(
    call: AttentionCall, mask: MaskView | None, settings: SiteSettings, training: bool = False
) -> Reason | None:
    """Return why SLA2 must not take this call, or None if it takes it.

    Args:
        mask: the result of `read_mask`.
        training: whether the call is part of a training step. Planning asks for inference, which takes whatever
            training takes (`crossover.py`), and the site then decides by the mode of each call.
    """
    q, k, v = call.q, call.k, call.v
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        return Reason.RANK
    if call.is_empty():
        return Reason.EMPTY
    mixed = k.dtype != q.dtype or v.dtype != q.dtype
    if not {q.dtype, k.dtype, v.dtype} <= set(DTYPES) or (mixed and not autocasts(q)):
        return Reason.DTYPE
    if q.shape[3] > MAX_HEAD_DIM or v.shape[3] > MAX_HEAD_DIM:
        return Reason.HEAD_DIM
    if k.shape[0] != q.shape[0] or v.shape[0] != q.shape[0] or v.shape[1] != k.shape[1]:
        return Reason.BROADCAST
    if k.shape[1] != q.shape[1] and not call.enable_gqa:
        return Reason.BROADCAST
    if call.dropout_p > 0.0:
        return Reason.DROPOUT
    if mask is None:
        assert call.attn_mask is not None
        return Reason.QUERY_MASK if call.attn_mask.dtype == torch.bool else Reason.BIAS
    if mask.is_causal:
        if not METHODS[settings.options.method].causal:
            return Reason.CAUSAL_METHOD
        if settings.options.order != "raster":
            return Reason.CAUSAL_ORDER
        if settings.options.method == "sla2" and settings.options.linear_scope == "all":
            return Reason.CAUSAL_ALL_KEYS
    small = too_small(q.shape, k.shape, settings.least(q.device.type, training))
    if small is None and settings.options.composed and why_no_places(q.shape[2], k.shape[2], settings.options):
        return Reason.PLACES
    return small


def work_of(q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> int:
    """B Hq Nq Nk D, the multiplications of QK^T by full attention."""
    B, Hq, Nq, D = q_shape
    return B * Hq * Nq * k_shape[2] * D


def too_small(q_shape: tuple[int, ...], k_shape: tuple[int, ...], least: Least) -> Reason | None:
    """Return why a call of these shapes is too small to gain, or None."""
    nq, nk = q_shape[2], k_shape[2]
    if least.tokens > 0:
        if shorter(nq, least.tokens):
            return Reason.SHORT_SEQUENCE if shorter(nk, least.tokens) else Reason.FEW_QUERIES
        if shorter(nk, least.tokens):
            return Reason.SHORT_KEYS
    # without a guard on the product: where sizes are symbols, work that may be on either side counts as enough
    return Reason.LITTLE_WORK if least.work > 0 and surely(work_of(q_shape, k_shape) < least.work) else None


def small_because(
    reason: Reason, q_shape: tuple[int, ...], k_shape: tuple[int, ...], least: Least, auto: bool
) -> str:
    """Say by which number a call is too small, for a reason of `too_small`."""
    if reason is Reason.LITTLE_WORK:
        got = work_of(q_shape, k_shape)
        return f"min_seq_len auto: B Hq Nq Nk D of at least {least.work:.2g}, got {got:.2g}"
    return f"min_seq_len auto: at least {least.tokens} tokens" if auto else f"min_seq_len {least.tokens}"
