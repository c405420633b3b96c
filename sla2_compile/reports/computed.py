"""How a replaced call is computed: by which method, in which format, by which kernels, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import fx, nn

from sla2_compile.kernels.arguments import AttentionArgs, ForwardArgs
from sla2_compile.kernels.blocks import num_blocks, num_kept
from sla2_compile.kernels.options import METHODS, AttentionOptions
from sla2_compile.kernels.support import LEAST_KEPT, MOST_KEPT, Chip, Facts, support
from sla2_compile.passes.sites.outcome import Miss, Rewrite

WORDS = {"int8_fp8": "INT8 QK and FP8 PV", "int8": "INT8 QK", "none": "the input's dtype"}
OPEN = "depends on the length"
NOT_PREPARED = "fake quantisation (qat): prepare(model) starts it; until then training is in the input's dtype"
NOTHING: Mapping[str, str] = MappingProxyType({})
# one length for each automatic choice of blocks; the last stands for any long one
LENGTHS = (1, 512, 2**30)


@dataclass(frozen=True)
class How:
    """How a replaced call is computed in inference, on the report's device or else on the one it was seen on.

    Attributes:
        asked, runs: low_bit of its recipe, and what that resolves to; runs is empty where it depends on the length.
        why: why runs is less than asked, or empty.
        portable: why blocked PyTorch and not the Triton kernels runs it on a GPU, or empty.
        fixed: whether an exported graph fixes this for all lengths.
    """

    asked: str
    runs: str
    why: str
    portable: str
    fixed: bool = False

    @classmethod
    def of(cls, r: Rewrite, device: str) -> How:
        on = device or r.where.device
        if r.low_bit and not _other(r):
            return cls._exported(r)
        found = [cls._with(r, on, *blocks) for blocks in _blocks(r, on)]
        if len({(how.runs, how.portable) for how in found}) == 1:
            # reasons may differ: take that of the longest
            return found[-1]
        portable = found[-1].portable if len({how.portable for how in found}) == 1 else OPEN
        runs = found[-1].runs if len({how.runs for how in found}) == 1 else ""
        return cls(found[-1].asked, runs, OPEN, portable)

    @classmethod
    def _exported(cls, r: Rewrite) -> How:
        # the export counted an unknown length as long
        *_, blocks = _blocks(r, r.where.device)
        how = cls._with(r, r.where.device, *blocks)
        if r.low_bit == how.runs:
            return replace(how, fixed=True)
        return replace(how, runs=r.low_bit, why="decided by the export" if r.low_bit == "none" else "", fixed=True)

    @classmethod
    def _with(cls, r: Rewrite, on: str, block_q: int, block_k: int, tn: int) -> How:
        options, chip = r.settings.options, Chip.of(torch.device(on))
        D, Dv = (int(shape[-1]) for shape in (r.where.q_shape, r.where.v_shape))
        kept = num_kept(tn, options.topk_ratio, block_q, block_k, False)
        asked = "none" if _other(r) else options.low_bit
        facts = Facts(
            chip, getattr(torch, r.where.dtype), D, Dv, block_q, block_k, asked, r.positive, r.plain,
            few=options.topk_ratio <= MOST_KEPT, many=kept >= LEAST_KEPT, sparse=_other(r),
        )  # fmt: skip
        found = support(facts)
        return cls(asked, found.low_bit, found.why.low_bit, found.why.triton if chip.arch else "")


def _other(r: Rewrite) -> bool:
    """Whether another method than sla2 computes a call: it has no low bit."""
    return r.settings.options.method != "sla2"


def _blocks(r: Rewrite, on: str) -> list[tuple[int, int, int]]:
    """Return (block_q, block_k, key blocks) of the call, or if a length is symbolic, all that are possible."""
    if isinstance(r.block_q, int) and isinstance(r.block_k, int) and r.tn:
        return [(r.block_q, r.block_k, r.tn)]
    found = []
    for n in LENGTHS:
        n = max(n, r.settings.least(on, training=False).tokens)
        block_q, block_k = r.settings.options.block_sizes(n, n)
        found.append((block_q, block_k, num_blocks(n, block_k)))
    return found


def as_exported(root: nn.Module, outcomes: Sequence[Rewrite | Miss]) -> list[Rewrite | Miss]:
    """Return outcomes with the low_bit of their ops in root's graph, if it holds ops: an exported graph does.

    The ops are in the order of the calls.
    """
    ops = list(attention_ops(root)) if isinstance(root, fx.GraphModule) else []
    rewrites = sum(isinstance(x, Rewrite) for x in outcomes)
    if len(ops) != rewrites and len(set(ops)) == 1:
        # calls that kept full attention have no op
        ops = ops[:1] * rewrites
    if len(ops) != rewrites:
        return list(outcomes)
    each, found = iter(ops), list[Rewrite | Miss]()
    for x in outcomes:
        if isinstance(x, Rewrite):
            x = replace(x, low_bit=next(each))
        found.append(x)
    return found


def attention_ops(root: nn.Module) -> Iterator[str]:
    """Yield the low_bit of each op that answers a call, in all graphs inside root; graphs with sites have none."""
    for gm in root.modules():
        for node in gm.graph.nodes if isinstance(gm, fx.GraphModule) else ():
            if node.target is torch.ops.sla2.attention.default:
                yield AttentionArgs(*node.args, **node.kwargs).low_bit
            elif node.target is torch.ops.sla2.forward.default:
                yield ForwardArgs(*node.args, **node.kwargs).low_bit
            elif node.target is torch.ops.sla2.sparse_attention.default:
                yield "none"


def how_lines(
    rewrites: list[Rewrite], device: str, imitated: Mapping[str, str] = NOTHING, converted: bool = False
) -> list[str]:
    """Say which calls blocked PyTorch runs on a GPU, and what each low_bit that was asked for resolves to.

    imitated, converted: of `Report`.
    """
    hows = Counter[How]()
    for r in rewrites:
        hows[How.of(r, device)] += r.where.times
    portable = Counter[str]()
    for how, n in hows.items():
        portable[how.portable] += n
    lines = [f"blocked PyTorch on cuda in {calls(n)}: {why}" for why, n in portable.items() if why]
    for low_bit in dict.fromkeys(how.asked for how in hows if how.asked != "none"):
        mine = {how: n for how, n in hows.items() if how.asked == low_bit}
        if all(how.runs == "none" for how in mine):
            reasons = dict.fromkeys("not run in blocked PyTorch" if how.portable else how.why for how in mine)
            lines.append(f"low bit {low_bit}: {', '.join(reasons)}; computed in the input's dtype")
            continue
        words = Counter[str]()
        for how, n in mine.items():
            words[_word(how)] += n
        each = [word + (f" in {calls(n)}" if len(words) > 1 else "") for word, n in words.items()]
        fixed = all(how.fixed for how in mine)
        rest = "fixed by the export" if fixed else "training computes in the input's dtype"
        lines.append(f"low bit {low_bit}: {', '.join(each)}; {rest}")
    return [
        *_method_lines(rewrites),
        *_place_lines(rewrites),
        *lines,
        *_imitated_lines(rewrites, imitated, converted),
    ]


def _method_lines(rewrites: list[Rewrite]) -> list[str]:
    """Say which calls another method than sla2 computes, how, and which fields of a recipe it does not read."""
    counts = Counter[str]()
    for r in rewrites:
        counts[r.settings.options.method] += r.where.times
    return [
        f"method {name} in {calls(n)}: computed in the input's dtype; without effect: "
        f"{', '.join((*METHODS[name].unused, 'low_bit', 'qat'))}"
        for name, n in counts.items()
        if name != "sla2"
    ]


def _place_lines(rewrites: list[Rewrite]) -> list[str]:
    """Say how calls choose and order their blocks, where that is not the router's best as the tokens come."""
    counts = Counter[str]()
    for r in rewrites:
        if words := _places(r.settings.options):
            counts[words] += r.where.times
    return [f"{words} in {calls(n)}" for words, n in counts.items()]


def _places(options: AttentionOptions) -> str:
    words = []
    if options.grid is not None:
        brick = "" if options.brick == "auto" else f" of {options.brick}"
        what = {"vsa": "cubes", "vmoba": "chunks"}.get(options.method, f"order {options.order}")
        words.append(f"{what}{brick} on grid {options.grid}")
    if options.selection == "threshold":
        least = "" if options.threshold is None else f" {options.threshold:g}"
        words.append(f"selection by threshold{least}, of the topk_ratio best")
    if options.head_ratios:
        words.append(f"a topk_ratio for each of {len(options.head_ratios)} heads")
    if options.protect:
        ranges = ", ".join(f"{start}:{'' if stop is None else stop}" for start, stop in options.protect)
        words.append(f"tokens {ranges} protected")
    return ", ".join(words)


def _imitated_lines(rewrites: list[Rewrite], imitated: Mapping[str, str], converted: bool) -> list[str]:
    """Say which sites imitate low bit, or were converted to it."""
    if imitated:
        counts = Counter(imitated.values())
        state = "converted" if converted else "prepared"
        sites = ", ".join(f"{WORDS[word]} in {n} of {len(imitated)} {state} sites" for word, n in counts.items())
        return [
            f"inference alone: {sites}" if converted else f"fake quantisation, in training and in inference: {sites}"
        ]
    return [NOT_PREPARED] if any(r.settings.fake_quant != "none" for r in rewrites) else []


def _word(how: How) -> str:
    if not how.runs:
        return how.why
    # for blocked PyTorch a line above gives the reason
    return WORDS[how.runs] + (f" ({how.why})" if how.why and not how.portable else "")


def calls(n: int) -> str:
    return "1 call" if n == 1 else f"{n} calls"
