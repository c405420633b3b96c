"""Floating-point operations of the ops `sla2::*`, and their registration with PyTorch's FLOP counter.

Multiply-adds count twice, as PyTorch counts them; softmax, feature maps and pooling do not count. Per head of q, with
K key blocks of block_k keys selected for each of Tm query blocks:
    route:     2 Tq Tk D, over the router's tokens, and 2 T D^2 for each projection of T tokens; select: the same
    attention: 2 Nq K block_k (D + Dv)  +  2 D Dv (Nq + Tm Tn), and 2 D Dv Nk per head of k
    backward:  2 Nq K block_k (3 D + 2 Dv)  +  4 D Dv (Nq + Tm Tn), and 6 D Dv Nk per head of k
    sparse_attention: 2 Nq K block_k (D + Dv)  +  2 Nq Tn (F + Dv) for the tail, with F = D or, at order 2, 2 D;
                      backward: 2 Nq K block_k (3 D + 2 Dv)  +  2 Nq Tn (3 F + 2 Dv)
With every block selected the complement is empty, and the linear branch and the tail count nothing.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from sla2_compile.kernels.arguments import (
    AttentionArgs,
    BackwardArgs,
    ForwardArgs,
    RouteArgs,
    RouteResult,
    SelectArgs,
    SparseArgs,
    SparseBackwardArgs,
)
from sla2_compile.kernels.blocks import num_blocks, num_kept, router_tokens
from sla2_compile.kernels.options import METHODS, AttentionOptions
from sla2_compile.kernels.records import of

Shape = Sequence[int]


def route_flops(args: RouteArgs[Shape]) -> int:
    """FLOPs of `sla2::route`, given shapes in place of tensors."""
    (B, Hq, Nq, D), (_, heads, Nk, _) = args.q, args.k
    rows_q, rows_k = (router_tokens(block, args.compression_ratio)[0] for block in (args.block_q, args.block_k))
    tq, tk = num_blocks(Nq, rows_q), num_blocks(Nk, rows_k)
    projections = (0 if args.proj_q is None else Hq * tq) + (0 if args.proj_k is None else heads * tk)
    return 2 * B * (Hq * tq * tk * D + projections * D * D)


def attention_flops(args: AttentionArgs[Shape]) -> int:
    """FLOPs of `sla2::attention`, also given shapes."""
    return _flops(args, sparse=(1, 1), per_row=1, per_key=1)


def backward_flops(args: BackwardArgs[Shape]) -> int:
    """FLOPs of `sla2::attention_backward`, also given shapes."""
    return _flops(args.saved.call, sparse=(3, 2), per_row=2, per_key=3)


def _flops(args: AttentionArgs[Shape], sparse: tuple[int, int], per_row: int, per_key: int) -> int:
    """FLOPs of an op that makes so many products.

    sparse: of the sparse branch, D and Dv wide; per_row, per_key: of the linear branch, D x Dv.
    """
    (B, Hq, Nq, D), (_, heads, Nk, Dv), (tm, kept) = args.q, args.v, args.lut[2:]
    tn = num_blocks(Nk, args.block_k)
    selected = Hq * Nq * min(Nk, kept * args.block_k) * (sparse[0] * D + sparse[1] * Dv)
    if kept == tn and args.linear_scope == "complement":
        return 2 * B * selected
    return 2 * B * (selected + D * Dv * (per_row * Hq * (Nq + tm * tn) + per_key * heads * Nk))


def sparse_flops(args: SparseArgs[Shape], products: tuple[int, int] = (1, 1)) -> int:
    """FLOPs of `sla2::sparse_attention`, also given shapes, or of an op that makes so many products D and Dv wide."""
    (B, Hq, Nq, D), (_, _, Nk, Dv), kept = args.q, args.v, args.lut[3]
    tn = num_blocks(Nk, args.block_k)
    terms = min(Nk, kept * args.block_k) * (products[0] * D + products[1] * Dv)
    if args.tail == "proxy" and kept < tn:
        terms += tn * (products[0] * D * args.proxy_order + products[1] * Dv)
    return 2 * B * Hq * Nq * terms


def sparse_backward_flops(args: SparseBackwardArgs[Shape]) -> int:
    """FLOPs of `sla2::sparse_attention_backward`, also given shapes."""
    return sparse_flops(args.saved.call, (3, 2))


def _otherwise(args: ForwardArgs[Shape], routed: RouteResult[Shape], options: AttentionOptions) -> int:
    """FLOPs of a call by another method than sla2."""
    method = METHODS[options.method]
    if method.selects_by_means:
        args = args._replace(compression_ratio=max(args.block_q, args.block_k))
    call: SparseArgs[Shape] = SparseArgs(
        args.q, args.k, args.v, routed.k_mean, routed.lut, None, args.block_q, args.block_k, 1.0, method.tail,
        options.proxy_order, is_causal=False,
    )  # fmt: skip
    (B, Hq, Nq, D), (_, heads, Nk, Dv) = args.q, args.v
    if method.own_table:
        # a product between means, of blocks or of chunks; vsa's gate, and its coarse branch
        tm, tn = num_blocks(Nq, args.block_q), num_blocks(Nk, args.block_k)
        beside = tm * tn * (D + Dv) + Nq * D * Dv if options.method == "vsa" else tm * tn * D
        return 2 * B * Hq * beside + sparse_flops(call)
    linear = 2 * B * D * Dv * (Hq * Nq + heads * Nk) + 2 * B * Hq * Nq * Dv * Dv if options.method == "sla" else 0
    return route_flops(args.route()) + sparse_flops(call) + linear


def call_flops(q: Shape, k: Shape, v: Shape, options: AttentionOptions, kept: int) -> int:
    """FLOPs of one call with these options, without the router's projections; kept: key blocks per query block."""
    block_q, block_k = options.block_sizes(q[2], k[2])
    ratio, tm = options.router_ratio(block_q, block_k), num_blocks(q[2], block_q)
    args: ForwardArgs[Shape] = ForwardArgs(
        q, k, v, None, None, None, None, None, options.topk_ratio, ratio, block_q, block_k, 1.0,
        options.feature_map, options.linear_scope, is_causal=False, low_bit="none",
    )  # fmt: skip
    rows = (*q[:2], tm)
    routed: RouteResult[Shape] = RouteResult((*rows, kept), rows, rows, (*k[:2], k[3]))
    if options.method != "sla2":
        return _otherwise(args, routed, options)
    return route_flops(args.route()) + attention_flops(args.attention(routed))


def forward_flops(args: ForwardArgs[Shape]) -> int:
    """FLOPs of `sla2::forward`, also given shapes."""
    (B, Hq, Nq, D), (_, heads, Nk, _) = args.q, args.k
    kept = num_kept(num_blocks(Nk, args.block_k), args.topk_ratio, args.block_q, args.block_k, args.is_causal)
    rows = (B, Hq, num_blocks(Nq, args.block_q))
    routed: RouteResult[Shape] = RouteResult((*rows, kept), rows, rows, (B, heads, D))
    return route_flops(args.route()) + attention_flops(args.attention(routed))


def _register() -> None:
    """Register the formulas with PyTorch's FLOP counter, which must be imported."""
    from torch.utils.flop_counter import register_flop_formula

    formulas: dict[str, tuple[Any, Callable[[Any, Any], int]]] = {
        "route": (RouteArgs, lambda args, out: route_flops(args)),
        "select": (SelectArgs, lambda args, out: route_flops(args.route())),
        "attention": (AttentionArgs, lambda args, out: attention_flops(args)),
        "attention_backward": (BackwardArgs, lambda args, out: backward_flops(args)),
        "forward": (ForwardArgs, lambda args, out: forward_flops(args)),
        "sparse_attention": (SparseArgs, lambda args, out: sparse_flops(args)),
        "sparse_attention_backward": (SparseBackwardArgs, lambda args, out: sparse_backward_flops(args)),
    }
    for name, (record, count) in formulas.items():

        def formula(*values: Any, out_shape: Any = None, record: Any = record, count: Any = count, **_: Any) -> int:
            return count(of(record, values), out_shape)

        register_flop_formula(getattr(torch.ops.sla2, name))(formula)


COUNTER = "torch.utils.flop_counter"


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the formulas when the FLOP counter is first imported, and then removes itself."""

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            try:
                execute(module)
            except BaseException:
                # the import may be tried again
                sys.meta_path.insert(0, self)
                raise
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


@functools.cache
def register() -> None:
    """Register the ops with PyTorch's FLOP counter, once, because it refuses a second registration.

    `kernels/__init__.py` may run twice. A library that looks for a package named "kernels" (transformers does) finds
    ours where the working tree is the current folder.

    A counter copies the registry when it is created, so the formulas must be there first. But importing the counter
    imports Triton, which takes several times as long as `import sla2_compile`. So registration waits for that import.
    """
    if COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WhenImported())
