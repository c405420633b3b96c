"""Which kernels run a call, in which format, and why not better ones: one table of rules and their reasons.

    found = support(facts)
    found.kernel, found.low_bit, found.why.triton, found.why.low_bit

Dispatch, the choice of a call's format, reports and documentation all read the rows below: each is a rule, what it
needs (for documentation) and why a call fails it (for reports). `sla2 support` prints them.
Nothing here needs a GPU or Triton unless a call is on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from sla2_compile.kernels.checks import fail

LOW_BIT_CHOICES = ("none", "auto", "int8", "int8_fp8")
"""What a recipe may ask for."""

MOST_KEPT = 1 / 32
"""Largest share of key blocks kept at which the whole op in INT8 is within three times bf16's own error."""
LEAST_KEPT = 32
"""Fewest key blocks kept per query block with which INT8 is faster."""
GLUON_TRITONS = ((3, 6), (3, 7))
"""Triton versions with which the fused kernel, which is in Gluon, was tested; that language may still change."""


class Chip(NamedTuple):
    """The device that a call runs on.

    Attributes:
        kind: type of device.
        arch: compute capability, 90 for sm_90; 0 if it is no GPU, or one that is not here.
        shared: bytes of shared memory that one program may use.
        nvidia: whether the GPU is NVIDIA's; triton: version of Triton, (3, 7).
    """

    kind: str
    arch: int = 0
    shared: int = 0
    nvidia: bool = True
    triton: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, device: torch.device) -> Chip:
        if device.type != "cuda" or not torch.cuda.is_available():
            return cls(device.type)
        from sla2_compile.kernels.cuda.device import chip_of

        return chip_of(device)


class Facts(NamedTuple):
    """The properties of a call that decide which kernels run it.

    Attributes:
        D, Dv: head dims of q and k, and of v. block_q, block_k: rows of a block.
        low_bit: format asked for, one of `LOW_BIT_CHOICES`; of a backward, the one that its forward ran in.
        positive: whether the scale of the scores is above 0.
        plain: whether every query sees every key: no key_mask, not causal; of `sla2::sparse_attention` not causal.
        few: whether at most `MOST_KEPT` of the key blocks are asked for; many: whether a query block then keeps at
            least `LEAST_KEPT` of them.
        copyable: whether the copy engine can read q, k and v, and k_mean is as the router returns it; of a backward
            also o, dO and what there is one number of for each row.
        invertible: whether gradients divided by the scale stay well within float32's range.
        direction: forward, or backward.
        sparse: whether it is `sla2::sparse_attention`, the op of the methods other than sla2.
    """

    chip: Chip
    dtype: torch.dtype
    D: int
    Dv: int
    block_q: int
    block_k: int
    low_bit: str = "none"
    positive: bool = True
    plain: bool = True
    few: bool = False
    many: bool = False
    copyable: bool = True
    invertible: bool = True
    direction: Literal["forward", "backward"] = "forward"
    sparse: bool = False


class Why(NamedTuple):
    """Why a call gets less than the best: one reason per field, empty where it gets the best.

    Attributes:
        fused, triton: why these kernels do not run it.
        low_bit: why it is computed in less than the format asked for.
    """

    fused: str
    triton: str
    low_bit: str


class Support(NamedTuple):
    """What runs a call.

    Attributes:
        kernel: fused (one kernel for both branches and the mix), triton, or portable (blocked PyTorch).
        low_bit: format of the sparse branch: none (the input's dtype), int8 or int8_fp8.
    """

    kernel: Literal["fused", "triton", "portable"]
    low_bit: str
    why: Why


class Rule(NamedTuple):
    """One row: which calls it admits, what they need, and the reason given for other calls."""

    admits: Callable[[Facts], bool]
    needs: str
    why: Callable[[Facts], str]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fits_shared_memory(f: Facts) -> bool:
    from sla2_compile.kernels.cuda.device import padded
    from sla2_compile.kernels.cuda.tiles import ShapeClass, attend_tile

    shape = ShapeClass(f.chip.arch, padded(f.D), padded(f.Dv), f.block_q, f.block_k)
    return attend_tile(shape, f.chip.shared)[0]["STAGES"] >= 1


def _block(name: Literal["block_q", "block_k"]) -> Rule:
    return Rule(
        lambda f: 16 <= getattr(f, name) <= 128,
        f"{name} of 16 to 128",
        lambda f: f"the Triton kernels take {name} of 16 to 128, not {getattr(f, name)}",
    )


TRITON: tuple[Rule, ...] = (
    Rule(
        lambda f: f.chip.kind == "cuda" and f.chip.arch > 0,
        "a GPU",
        lambda f: f"not run on {f.chip.kind}" + (", which is not here" if f.chip.kind == "cuda" else ""),
    ),
    Rule(lambda f: f.chip.nvidia, "made by NVIDIA", lambda f: "the Triton kernels are for NVIDIA, not ROCm"),
    Rule(
        lambda f: f.chip.arch >= 80,
        "sm_80 or later",
        lambda f: f"the Triton kernels need sm_80, not sm_{f.chip.arch}",
    ),
    Rule(
        lambda f: f.dtype in (torch.bfloat16, torch.float16),
        "bfloat16 or float16, by itself or by autocast",
        lambda f: (
            f"the Triton kernels take bfloat16 and float16, not {_name(f.dtype)}"
            + (" outside autocast" if f.dtype == torch.float32 else "")
        ),
    ),
    # the running maximum is taken before scaling
    Rule(lambda f: f.positive, "a scale above 0", lambda f: "the Triton kernels take a scale above 0 only"),
    # tensor cores need 16 rows
    _block("block_q"),
    _block("block_k"),
    Rule(
        _fits_shared_memory,
        "one tile of k and v in shared memory (not block_k 128 at head dim 256 on sm_86, 89 and 120)",
        lambda f: (
            f"block_k {f.block_k} at head dim {max(f.D, f.Dv)} does not fit the shared memory of sm_{f.chip.arch}"
        ),
    ),
)
"""What `cuda/{route,forward,backward,sparse}/` compute; blocked PyTorch takes the rest."""

FUSED: tuple[Rule, ...] = (
    Rule(
        lambda f: f.direction == "forward" or (f.dtype == torch.bfloat16 and f.low_bit != "int8_fp8"),
        "a forward, or a backward in bfloat16 of one that was not in FP8",
        lambda f: "the fused kernels of the backward take bfloat16 alone, and no FP8",
    ),
    # dq and dk of the linear branch are counted in units of the scale, and the logarithms of pooled terms
    Rule(
        lambda f: f.invertible,
        "a scale of 1e-18 to 1e18 in a backward, and in other methods than sla2",
        lambda f: "the fused kernels need a scale of 1e-18 to 1e18 here",
    ),
    Rule(lambda f: f.chip.arch == 90, "sm_90", lambda f: f"the fused kernel needs sm_90, not sm_{f.chip.arch}"),
    Rule(
        lambda f: f.chip.triton in GLUON_TRITONS,
        "Triton 3.6 or 3.7",
        lambda f: f"the fused kernel needs Triton 3.6 or 3.7, not {'.'.join(map(str, f.chip.triton))}",
    ),
    Rule(
        lambda f: f.plain,
        "not causal, and in method sla2 no key mask",
        lambda f: f"the fused kernel takes no {'' if f.sparse else 'mask and no '}causality",
    ),
    Rule(
        lambda f: f.block_k == 64 and (f.block_q == 128 or (f.sparse and f.block_q == 64)),
        "blocks of 128 x 64 (other methods than sla2: also of 64 x 64)",
        lambda f: f"the fused kernel does not take blocks of {f.block_q} x {f.block_k}",
    ),
    # rows of k8 must begin at multiples of 16 bytes
    Rule(
        lambda f: f.Dv == f.D and 40 <= f.D <= 128 and f.D % (8 if f.low_bit == "none" else 16) == 0,
        "head dims 40 to 128 in steps of 8 (low bit: 48 to 128 in steps of 16), v's the same",
        lambda f: f"the fused kernel does not take head dims {f.D} and {f.Dv}",
    ),
    Rule(
        lambda f: f.copyable,
        "strides and addresses of q, k and v in whole 16 bytes (backward: also of o and its gradient, which is not "
        "expanded, and a number of queries divisible by 4)",
        lambda f: (
            "the fused kernel needs strides and addresses of q, k and v in whole 16 bytes"
            if f.direction == "forward"
            else "the fused kernels of the backward need strides and addresses of q, k, v, o and its gradient in "
            "whole 16 bytes, and a number of queries divisible by 4"
        ),
    ),
)
"""What `cuda/forward/attend_sm90.py` computes, of the forwards that the Triton kernels take."""

FP8: tuple[Rule, ...] = (
    Rule(lambda f: f.chip.arch >= 89, "sm_89 or later", lambda f: f"no FP8 on sm_{f.chip.arch}"),
    # an FP8 product sums over 32 keys at a time
    Rule(lambda f: f.block_k >= 32, "block_k of 32 or more", lambda f: "FP8 needs block_k of 32"),
)
"""Where int8_fp8 runs as asked, and not as int8."""


def _not_faster(f: Facts) -> str:
    return "does not pay on cuda (sm_90), as far as measured"


# Faster (benchmarks/NOTES.md): at head dim 128 with 35 key blocks or more per query block. With 15 it gains nothing,
# and at head dim 64 it is slower throughout. FP8 PV on top gains 3 to 6 %, at three times the error.
# Close enough (benchmarks/results/low_bit.md): at most three times bf16's own error in the whole op on normal data,
# both by the fused kernel.
AUTO: tuple[Rule, ...] = (
    Rule(lambda f: f.chip.arch == 90, "sm_90", lambda f: f"not measured on sm_{f.chip.arch}"),
    Rule(lambda f: f.plain, "no key mask, not causal", _not_faster),
    Rule(lambda f: f.D == f.Dv == 128, "head dim 128", _not_faster),
    Rule(lambda f: (f.block_q, f.block_k) == (128, 64), "blocks of 128 x 64", _not_faster),
    Rule(
        lambda f: f.few,
        "at most a thirty-second of the key blocks",
        lambda f: "over 3 times bf16's own error above a thirty-second of the key blocks",
    ),
    Rule(lambda f: f.many, "32 key blocks or more for each query block", _not_faster),
)
"""Where auto resolves to int8: measured to be faster than 16 bits, and close enough."""


def refusal(rules: tuple[Rule, ...], facts: Facts) -> str:
    """Return the reason of the first rule that does not admit a call; empty if all admit it."""
    return next((rule.why(facts) for rule in rules if not rule.admits(facts)), "")


def _format(facts: Facts, triton: str) -> tuple[str, str]:
    """Return the format that a forward runs in, and why it is less than the one asked for.

    triton: why the Triton kernels do not run it.
    """
    asked = facts.low_bit
    if asked != "none" and triton:
        return "none", triton
    if asked == "auto":
        less = refusal(AUTO, facts)
        return ("none" if less else "int8"), less
    if asked == "int8_fp8":
        less = refusal(FP8, facts)
        return ("int8" if less else asked), less
    return asked, ""


@functools.lru_cache(maxsize=1024)
def support(facts: Facts) -> Support:
    """Return what runs a call.

    Raises:
        ValueError: low_bit is none of `LOW_BIT_CHOICES`.
    """
    asked = facts.low_bit
    if asked not in LOW_BIT_CHOICES:
        raise fail("low_bit", f"be one of {', '.join(LOW_BIT_CHOICES)}", repr(asked), "auto runs what pays")
    triton = refusal(TRITON, facts)
    # a backward computes scores again in the format of its forward, whatever runs
    runs, less = (asked, "") if facts.direction == "backward" else _format(facts, triton)
    fused = triton or refusal(FUSED, facts._replace(low_bit=runs))
    kernel: Literal["fused", "triton", "portable"] = "portable" if triton else "triton" if fused else "fused"
    return Support(kernel, runs, Why(fused, triton, less))
