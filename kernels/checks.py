"""What the ops accept, checked on metadata so that real ops and fakes raise alike; on values only when debugging."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from sla2_compile.kernels.arguments import (
    AttentionArgs,
    BackwardArgs,
    RouteArgs,
    SelectArgs,
    SparseArgs,
    SparseBackwardArgs,
    accumulation_dtype,
)
from sla2_compile.kernels.switches import debugging

FEATURE_MAPS = ("softmax", "elu", "relu")
LINEAR_SCOPES = ("complement", "all")
TAILS = ("none", "proxy")
LOW_BITS = ("none", "int8", "int8_fp8")
"""Formats that an op computes; `precision.py` resolves what a recipe asks for to one of them."""
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


class Described(Protocol):
    """What checks read of a tensor; a `layout.Layout` has it too."""

    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


def fail(name: str, rule: str, value: object, fix: str) -> ValueError:
    """Build the one error of this project: `<name> must <rule>, got <value>; <fix>`."""
    return ValueError(f"{name} must {rule}, got {value}; {fix}")


def check_qkv(q: Described, k: Described, v: Described | None) -> None:
    """Refuse q, k, v that do not form one attention call.

    Args:
        q: (B, Hq, Nq, D).
        k: (B, Hkv, Nk, D); Hkv divides Hq.
        v: (B, Hkv, Nk, Dv), or None where only scores are wanted.

    Raises:
        ValueError: rank, batch, heads, lengths, head dim, dtype or device do not fit together.
    """
    # each attribute is read once: these checks are a noticeable part of a short GPU call's host time
    q_shape, dtype, device = q.shape, q.dtype, q.device
    shapes = []
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is None:
            continue
        shape = x.shape
        shapes.append(shape)
        if len(shape) != 4:
            raise fail(name, "have shape (batch, heads, tokens, head_dim)", tuple(shape), "reshape it to 4-D")
        if x.dtype not in DTYPES:
            raise fail(name, "be float64, float32, bfloat16 or float16", x.dtype, "cast it first")
        if x.dtype != dtype:
            raise fail(name, f"have q's dtype {dtype}", x.dtype, "cast q, k and v to one dtype")
        if x.device != device:
            raise fail(name, f"be on q's device {device}", x.device, "move q, k and v to one device")
        batch, heads, tokens, width = shape
        if batch != q_shape[0]:
            raise fail(name, f"have q's batch size {q_shape[0]}", batch, "expand it first")
        if batch == 0:
            raise fail(name, "have at least one sequence", tuple(shape), "skip attention over empty batches")
        if tokens == 0:
            raise fail(name, "have at least one token", tuple(shape), "skip attention over empty sequences")
        if heads == 0:
            raise fail(name, "have at least one head", tuple(shape), "skip attention without heads")
        if width > MAX_HEAD_DIM or width == 0:
            raise fail(name, f"have a head dim from 1 to {MAX_HEAD_DIM}", width, "use full attention here")
    k_shape = shapes[1]
    if k_shape[3] != q_shape[3]:
        raise fail("k", f"have q's head dim {q_shape[3]}", k_shape[3], "project both to one width")
    if v is not None and shapes[2][1:3] != k_shape[1:3]:
        raise fail("v", f"have k's heads and tokens {tuple(k_shape[1:3])}", tuple(shapes[2][1:3]), "match k and v")
    if q_shape[1] % k_shape[1] != 0:
        raise fail("q", f"have a multiple of k's {k_shape[1]} heads", q_shape[1], "repeat or drop heads")


def check_key_mask(key_mask: Described | None, k: Described) -> None:
    """Refuse a key mask that is not (B, Nk) bool, True where a key takes part."""
    if key_mask is None:
        return
    if key_mask.dtype != torch.bool:
        raise fail("key_mask", "be boolean, True where the key takes part", key_mask.dtype, "compare first")
    if len(key_mask.shape) != 2 or key_mask.shape[0] != k.shape[0] or key_mask.shape[1] != k.shape[2]:
        raise fail(
            "key_mask",
            f"have shape ({k.shape[0]}, {k.shape[2]})",
            tuple(key_mask.shape),
            "expand it over the batch",
        )
    if key_mask.device != k.device:
        raise fail("key_mask", f"be on k's device {k.device}", key_mask.device, "move it")


def check_blocks(block_q: int, block_k: int) -> None:
    """Refuse block sizes that are not powers of two in 8..256."""
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if size < 8 or size > 256 or size & (size - 1):
            raise fail(name, "be a power of two from 8 to 256", size, "use 128 and 64 for long sequences")


def check_route(args: RouteArgs[Described]) -> None:
    """All checks of `sla2::route`."""
    q, k = args.q, args.k
    check_qkv(q, k, None)
    check_key_mask(args.key_mask, k)
    check_blocks(args.block_q, args.block_k)
    r = args.compression_ratio
    if r < 1 or r & (r - 1):
        raise fail("compression_ratio", "be a power of two", r, "use 4, 8 or 16")
    if not 0.0 < args.topk_ratio <= 1.0:
        raise fail("topk_ratio", "lie in (0, 1]", args.topk_ratio, "0.15 keeps 15 % of the key blocks")
    for name, proj in (("proj_q", args.proj_q), ("proj_k", args.proj_k)):
        if proj is None:
            continue
        if len(proj.shape) != 2 or proj.shape[0] != q.shape[3] or proj.shape[1] != q.shape[3]:
            want = f"have shape ({q.shape[3]}, {q.shape[3]})"
            raise fail(name, want, tuple(proj.shape), "one head_dim x head_dim matrix per site")
        if proj.device != q.device:
            raise fail(name, f"be on q's device {q.device}", proj.device, "move the model and its inputs together")


def check_select(args: SelectArgs[Described]) -> None:
    """All checks of `sla2::select`."""
    check_route(args.route())
    heads, tn = args.q.shape[1], (args.k.shape[2] + args.block_k - 1) // args.block_k
    if args.head_ratios and len(args.head_ratios) != heads:
        raise fail(
            "head_ratios", f"have a ratio for each of q's {heads} heads", len(args.head_ratios), "or leave it out"
        )
    for ratio in args.head_ratios:
        if not 0.0 < ratio <= 1.0:
            raise fail("head_ratios", "lie in (0, 1]", ratio, "0.15 keeps 15 % of the key blocks")
    ends = args.protect
    if len(ends) % 2 or list(ends) != sorted(ends) or (ends and not 0 <= ends[0] <= ends[-1] <= tn):
        raise fail(
            "protect",
            f"be ascending pairs of key blocks from 0 to {tn}",
            tuple(ends),
            "a range is its first block and its end",
        )


def _check_routed(q: Described, k: Described, k_mean: Described, lut: Described, tm: int) -> None:
    """Refuse a mean of keys or a table that a route of this call cannot have returned; tm: query blocks."""
    B, Hq, _, D = q.shape
    if k_mean.shape != (B, k.shape[1], D):
        raise fail("k_mean", f"have shape {(B, k.shape[1], D)}", tuple(k_mean.shape), "take it from sla2::route")
    if len(lut.shape) != 4 or lut.shape[:3] != (B, Hq, tm) or lut.dtype != torch.int32:
        rule = f"be int32 of shape ({B}, {Hq}, {tm}, topk)"
        raise fail("lut", rule, f"{lut.dtype} {tuple(lut.shape)}", "route with the same block_q")
    if lut.shape[3] == 0:
        raise fail("lut", "keep at least one key block", tuple(lut.shape), "take it from sla2::route")


def check_attention(args: AttentionArgs[Described]) -> None:
    """All checks of `sla2::attention`."""
    q, k, lut, log_rest, k_mean = args.q, args.k, args.lut, args.log_rest, args.k_mean
    alpha_gain, alpha_bias = args.alpha_gain, args.alpha_bias
    check_qkv(q, k, args.v)
    check_key_mask(args.key_mask, k)
    check_blocks(args.block_q, args.block_k)
    B, Hq, Nq, _ = q.shape
    tm = (Nq + args.block_q - 1) // args.block_q
    others = {"k_mean": k_mean, "lut": lut, "log_rest": log_rest, "alpha_gain": alpha_gain, "alpha_bias": alpha_bias}
    for name, x in others.items():
        if x is not None and x.device != q.device:
            raise fail(name, f"be on q's device {q.device}", x.device, "move the model and its inputs together")
    _check_routed(q, k, k_mean, lut, tm)
    if log_rest.shape != (B, Hq, tm):
        raise fail("log_rest", f"have shape {(B, Hq, tm)}", tuple(log_rest.shape), "take it from sla2::route")
    if alpha_gain is not None and (alpha_gain.shape != (Hq,) or alpha_bias is None):
        shape = tuple(alpha_gain.shape)
        raise fail("alpha_gain", f"have shape ({Hq},) and come with alpha_bias", shape, "give one value per head")
    if alpha_bias is not None and (
        len(alpha_bias.shape) != 2 or alpha_bias.shape[0] not in (1, Hq) or alpha_bias.shape[1] not in (1, tm)
    ):
        shape = tuple(alpha_bias.shape)
        raise fail("alpha_bias", f"broadcast to ({Hq}, {tm})", shape, "alpha='block' fits one sequence length only")
    feature_map, linear_scope, low_bit = args.feature_map, args.linear_scope, args.low_bit
    if feature_map not in FEATURE_MAPS:
        raise fail("feature_map", f"be one of {', '.join(FEATURE_MAPS)}", repr(feature_map), "softmax is the paper's")
    if linear_scope not in LINEAR_SCOPES:
        raise fail("linear_scope", f"be one of {', '.join(LINEAR_SCOPES)}", repr(linear_scope), "use complement")
    if args.is_causal and linear_scope == "all":
        raise fail("linear_scope", "be 'complement' when is_causal", "'all'", "all keys would include future ones")
    if low_bit not in LOW_BITS:
        raise fail("low_bit", f"be one of {', '.join(LOW_BITS)}", repr(low_bit), "int8_fp8 is the paper's")


def check_backward(args: BackwardArgs[Described]) -> None:
    """All checks of `sla2::attention_backward`."""
    saved, call = args.saved, args.saved.call
    check_attention(call)
    _check_saved(args.do, saved.o, saved.lse, call.q, call.v, "sla2::attention")


def _check_saved(do: Described, o: Described, lse: Described, q: Described, v: Described, op: str) -> None:
    """Refuse a gradient and results that do not fit the op's arguments."""
    o_shape = (*q.shape[:3], v.shape[3])
    for name, x, shape, dtype in (
        ("do", do, o_shape, q.dtype),
        ("lse", lse, o_shape[:3], accumulation_dtype(q.dtype)),
        ("o", o, o_shape, q.dtype),
    ):
        if x.shape != shape or x.dtype != dtype or x.device != q.device:
            rule = f"be {dtype} of shape {shape} on {q.device}"
            raise fail(name, rule, f"{x.dtype} {tuple(x.shape)} on {x.device}", f"take it as {op} gave it")


def check_sparse(args: SparseArgs[Described]) -> None:
    """All checks of `sla2::sparse_attention`."""
    q, k = args.q, args.k
    check_qkv(q, k, args.v)
    check_key_mask(args.key_mask, k)
    check_blocks(args.block_q, args.block_k)
    for name, x in (("k_mean", args.k_mean), ("lut", args.lut)):
        if x.device != q.device:
            raise fail(name, f"be on q's device {q.device}", x.device, "move the model and its inputs together")
    _check_routed(q, k, args.k_mean, args.lut, (q.shape[2] + args.block_q - 1) // args.block_q)
    if args.tail not in TAILS:
        raise fail(
            "tail", f"be one of {', '.join(TAILS)}", repr(args.tail), "proxy pools the blocks that are not selected"
        )
    if args.proxy_order not in (1, 2):
        raise fail("proxy_order", "be 1 or 2", args.proxy_order, "2 also counts the spread of a block's keys")


def check_sparse_backward(args: SparseBackwardArgs[Described]) -> None:
    """All checks of `sla2::sparse_attention_backward`."""
    saved, call = args.saved, args.saved.call
    check_sparse(call)
    _check_saved(args.do, saved.o, saved.lse, call.q, call.v, "sla2::sparse_attention")


def check_table(args: AttentionArgs[Tensor] | SparseArgs[Tensor]) -> None:
    """Refuse a table that no router made, if SLA2_DEBUG is set. The check reads values, so it waits for the device.

    Without it, the Triton kernels compute meaningless numbers from such a table, but read and write nothing outside
    their tensors, in the forward and in the backward. The portable path raises PyTorch's own indexing error.

    Raises:
        ValueError: an entry of lut is not a key block, comes twice or out of order, or comes after a -1.
    """
    if not debugging():
        return
    lut, tn = args.lut, -(-args.k.shape[2] // args.block_k)
    # only causality and masks forbid some blocks, so that a row may have fewer than K
    may_end_early = args.is_causal or args.key_mask is not None
    if lut.is_cuda and torch.cuda.is_current_stream_capturing():
        # values cannot be read while a CUDA graph is captured
        return
    fix = "take it from sla2::route with the same block_k, is_causal and key_mask"
    least, or_none = (-1, ", or -1 behind the last") if may_end_early else (0, "")
    wild = lut[(lut < least) | (lut >= tn)]
    if wild.numel() > 0:
        entry = wild[0].item()
        if entry == -1:
            # the Triton router never chooses a block whose score is a NaN with its sign set
            fix += ", or look for NaN in q or k if it is"
        raise fail("lut", f"hold key blocks 0 to {tn - 1}{or_none}", entry, fix)
    before, after = lut[..., :-1], lut[..., 1:]
    wrong = ~((after > before) & (before >= 0) | (after == -1)).all(dim=-1)
    if wrong.any():
        raise fail("lut", "ascend in each row, with every -1 at its end", lut[wrong][0].tolist(), fix)
