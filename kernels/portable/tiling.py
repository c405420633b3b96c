"""How the portable implementation cuts its work: groups of heads, blocks, gathers.

A group is a rectangle of batch entries and key/value heads, small enough for its states to stay in cache and to bound
peak memory. Inside a group everything is flat: rows of query blocks, rows of key blocks, and a look-up table from the
first to the second. A key/value head of grouped heads owns `Hq / Hkv` times as many query blocks.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from sla2_compile.kernels.arguments import AttentionArgs, SparseArgs, accumulation_dtype
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.portable.low_bit import Operands
from sla2_compile.kernels.torch_internals import multiplies_bfloat16

NEG_INF = float("-inf")

# elements of one score tile, and tokens of one group of heads: CPUs want tiles that stay in the L2 cache,
# GPUs want enough work for one launch
TILE_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
GROUP_TOKENS = {"cpu": 2**14, "cuda": 2**18}

# most memory that a thread keeps between calls
KEPT_BYTES = 2**26

# exp(40) times any sensible value, summed over any sensible length, is far below float32's maximum
SMALL_SCORE = 40.0

# a sum of exponentials from 1 / MODERATE to MODERATE is precise, and its product with any sensible value is finite
MODERATE = 1e20


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype to multiply in: x's own, or float32 where a CPU would only emulate it."""
    if x.device.type != "cpu" or x.dtype in (torch.float32, torch.float64):
        return x.dtype
    native = x.dtype == torch.bfloat16 and multiplies_bfloat16()
    return x.dtype if native else torch.float32


def products_are_small(q: Tensor, k: Tensor, scale: float) -> bool:
    """Whether exp(scale * q . k) can neither overflow nor vanish, by |q . k| <= |q| |k|; False on a GPU."""
    if q.device.type != "cpu" or q.numel() == 0 or k.numel() == 0:
        return False
    longest = [torch.linalg.vector_norm(x, dim=-1).max().item() for x in (q, k)]
    return abs(scale) * longest[0] * longest[1] < SMALL_SCORE


def is_moderate(x: Tensor) -> bool:
    """Whether all of x is positive and far from both limits of float32; False on a GPU."""
    if x.device.type != "cpu" or x.numel() == 0:
        return False
    least, most = x.aminmax()
    return least.item() > 1.0 / MODERATE and most.item() < MODERATE


def head_groups(B: int, heads: int, tokens: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Yield (batch slice, key/value head slice) rectangles that cover (B, heads)."""
    room = max(1, GROUP_TOKENS.get(device.type, 2**18) // max(1, tokens))
    step_h = min(heads, room)
    step_b = max(1, room // heads) if step_h == heads else 1
    for b in range(0, B, step_b):
        for h in range(0, heads, step_h):
            yield slice(b, min(B, b + step_b)), slice(h, min(heads, h + step_h))


class Scratch:
    """Memory that a call reuses from chunk to chunk and from group to group.

    Fresh pages cost a CPU several times as much as the arithmetic done in them (benchmarks/NOTES_CPU.md).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.held: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the memory of this name as an uninitialised tensor; its earlier contents are lost."""
        last = self.last.get(name)
        if last is not None and last.shape == shape and last.dtype == dtype:
            return last
        size, held = math.prod(shape), self.held.get(name)
        if held is None or held.numel() < size or held.dtype != dtype:
            # memory made in inference mode could not be written outside it
            with torch.inference_mode(False):
                held = self.held[name] = torch.empty(size, dtype=dtype, device=self.device)
        last = self.last[name] = held[:size].view(shape)
        return last


_of_thread = threading.local()


@contextmanager
def call_memory(device: torch.device) -> Iterator[Scratch]:
    """Lend one call its `Scratch`. On a CPU it is the thread's own, kept for the next call while it is small."""
    kept = _of_thread.__dict__.pop("scratch", None) if device.type == "cpu" else None
    scratch = kept or Scratch(device)
    yield scratch
    if device.type == "cpu" and sum(x.nbytes for x in scratch.held.values()) <= KEPT_BYTES:
        _of_thread.scratch = scratch


def to_blocks(x: Tensor, block: int) -> Tensor:
    """(b, h, N, D) -> (b * h * ceil(N / block), block, D), zero padded; a view where strides allow."""
    pad = -x.shape[2] % block
    x = F.pad(x, (0, 0, 0, pad)) if pad else x
    return x.reshape(-1, block, x.shape[3])


def padded(x: Tensor, block: int, dtype: torch.dtype, scratch: Scratch, name: str) -> Tensor:
    """Return (b, h, ceil(N / block) * block, D) memory for x: uninitialised, but zero after its N tokens."""
    b, h, N, D = x.shape
    memory = scratch(name, (b, h, num_blocks(N, block) * block, D), dtype)
    memory[:, :, N:] = 0
    return memory


def copy_to_blocks(x: Tensor, block: int, dtype: torch.dtype, scratch: Scratch, name: str) -> Tensor:
    """`to_blocks` in the given dtype: a view where one will do, else a copy in scratch memory."""
    if x.dtype == dtype and x.is_contiguous() and x.shape[2] % block == 0:
        return x.view(-1, block, x.shape[3])
    memory = padded(x, block, dtype, scratch, name)
    memory[:, :, : x.shape[2]] = x
    return memory.view(-1, block, x.shape[3])


def block_rows(x: Tensor, bs: slice, hs: slice, block: int) -> Tensor:
    """View (B, H, T * block, E) as the flat block rows (R, block, E) of one group of heads, to be written."""
    return x[bs, hs].view(-1, block, x.shape[3])


def from_blocks(x: Tensor, shape: torch.Size) -> Tensor:
    """Undo `to_blocks`: cut the padding and give back (b, h, N, D)."""
    return x.view(shape[0], shape[1], -1, shape[3])[:, :, : shape[2]]


@dataclass
class Tiles:
    """One group of heads, flat. R query-block rows, C key-block rows; `Tn` key blocks per head.

    Attributes:
        q: (R, block_q, D); k: (C, block_k, D), smoothed, zero where padded; v: (C, block_k, Dv).
        sparse: what the sparse branch takes in place of q, k and v: the same, unless it computes in low bit.
        rows: (R, K) int64 into the key-block rows, clamped to a real row where the table holds -1.
        k_valid: (C, block_k) bool, or None where every key of every block is real.
        row_valid: (R, K) bool, False where the table holds -1, or None where it never does.
        q_start: (R,) first token of each query block, for causal masks (None when not causal).
        k_start: (C,) first token of each key block (None when not causal).
        scale: multiplies q k^T.
        scratch: memory of the call.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sparse: Operands
    rows: Tensor
    k_valid: Tensor | None
    row_valid: Tensor | None
    q_start: Tensor | None
    k_start: Tensor | None
    scale: float
    Tn: int
    scratch: Scratch

    @cached_property
    def keys(self) -> int:
        """Keys that one query block gathers."""
        return self.rows.shape[1] * self.k.shape[1]

    @property
    def masked(self) -> bool:
        """Whether any gathered key may be hidden from any query."""
        return self.k_valid is not None or self.row_valid is not None or self.q_start is not None

    @cached_property
    def acc(self) -> torch.dtype:
        return accumulation_dtype(self.q.dtype)

    def rows_at_once(self, width: int) -> int:
        """How many query-block rows have a tile, of `width` columns per query, that fits the cache."""
        rows = max(1, TILE_ELEMENTS.get(self.q.device.type, 2**26) // (self.q.shape[1] * width))
        # each core has its own cache, and a product's rows are divided among the cores
        return rows * torch.get_num_threads() if self.q.device.type == "cpu" else rows

    def chunks(self, width: int) -> Iterator[slice]:
        """Slices of query-block rows, `rows_at_once` each."""
        step = self.rows_at_once(width)
        for start in range(0, self.q.shape[0], step):
            yield slice(start, min(self.q.shape[0], start + step))

    def gather(self, blocks: Tensor, picked: Tensor, name: str) -> Tensor:
        """Return blocks of k or v side by side, (n, K * block_k, D or Dv); picked is n rows of `rows`, flat."""
        memory = self.scratch(name, (picked.shape[0], *blocks.shape[1:]), blocks.dtype)
        torch.index_select(blocks, 0, picked, out=memory)
        return memory.view(-1, self.keys, blocks.shape[2])

    def scores(self, part: slice, q: Tensor, keys: Tensor, scales: Tensor | None = None) -> Tensor:
        """Scaled and masked scores of the rows `part`, (n, K * block_k, block_q), in the accumulation dtype.

        A row of the tile is a key, so that BLAS reads the gathered keys in memory order.

        Args:
            scales: what q and keys in low bit leave out, (n, K, 1, block_q).
        """
        s = self.scratch("scores", (q.shape[0], keys.shape[1], q.shape[1]), q.dtype)
        s = torch.baddbmm(s, keys, q.mT, beta=0.0, alpha=self.scale, out=s).to(self.acc)
        if scales is not None:
            s.view(*scales.shape[:2], -1, s.shape[2]).mul_(scales)
        hidden = self._hidden(part)
        return s if hidden is None else s.masked_fill_(hidden, NEG_INF)

    def _hidden(self, part: slice) -> Tensor | None:
        """(n, K * block_k, 1 or block_q) bool, True where a score must not count; None where all count."""
        if not self.masked:
            return None
        rows = self.rows[part]
        n, block_k = rows.shape[0], self.k.shape[1]
        hidden = None
        if self.k_valid is not None:
            hidden = ~self.k_valid.index_select(0, rows.flatten()).view(n, -1, 1)
        if self.row_valid is not None:
            absent = (~self.row_valid[part]).repeat_interleave(block_k, dim=1)[..., None]
            hidden = absent if hidden is None else hidden | absent
        if self.q_start is not None and self.k_start is not None:
            steps_q = torch.arange(self.q.shape[1], device=rows.device)
            steps_k = torch.arange(block_k, device=rows.device)
            at_k = (self.k_start[rows][..., None] + steps_k).view(n, -1, 1)
            future = at_k > (self.q_start[part, None] + steps_q)[:, None]
            hidden = future if hidden is None else hidden | future
        return hidden

    def complement(self, linear_scope: str) -> Tensor:
        """(h, R / h, Tn): 1 for each key block that the linear branch of a query row covers, per kv head."""
        heads = self.k.shape[0] // self.Tn
        tm_all = self.q.shape[0] // heads
        keep = self.q.new_ones(self.q.shape[0], self.Tn)
        if self.q_start is not None and self.k_start is not None:
            # blocks that only some rows see are always selected, so all rows see those that are left
            keep = keep * (self.k_start[None, : self.Tn] <= self.q_start[:, None])
        if linear_scope == "complement":
            first = torch.arange(heads, device=self.rows.device).repeat_interleave(tm_all) * self.Tn
            local = self.rows - first[:, None]
            if self.row_valid is None:
                keep.scatter_(1, local, 0.0)
            else:
                keep = keep * (1.0 - torch.zeros_like(keep).scatter_add_(1, local, self.row_valid.to(keep.dtype)))
        return keep.view(heads, tm_all, self.Tn)


def cut(args: AttentionArgs[Tensor] | SparseArgs[Tensor], bs: slice, hs: slice, hq: slice, scratch: Scratch) -> Tiles:
    """Cut one group of heads into `Tiles`: batch entries bs, key/value heads hs, and their query heads hq."""
    q, k, v, lut, k_mean = args.q[bs, hq], args.k[bs, hs], args.v[bs, hs], args.lut[bs, hq], args.k_mean[bs, hs]
    key_mask = None if args.key_mask is None else args.key_mask[bs]
    block_q, block_k, is_causal = args.block_q, args.block_k, args.is_causal
    dtype = compute_dtype(q)
    b, heads, Nk, _ = k.shape
    tn, tm = num_blocks(Nk, block_k), lut.shape[2]
    smooth = padded(k, block_k, dtype, scratch, "k")
    torch.sub(k, k_mean[:, :, None], out=smooth[:, :, :Nk])
    ragged = Nk % block_k != 0
    k_valid = None
    if ragged or key_mask is not None:
        real = torch.ones(b, Nk, dtype=torch.bool, device=k.device) if key_mask is None else key_mask
        real = F.pad(real, (0, -Nk % block_k))
        k_valid = real[:, None].expand(b, heads, -1).reshape(-1, block_k)
    # the group's table indexes its own key-block rows; query heads that share a kv head are adjacent
    groups = lut.shape[1] // heads
    first = torch.arange(b * heads, device=lut.device).repeat_interleave(groups * tm) * tn
    rows = lut.reshape(-1, lut.shape[3]).long()
    # only a mask can leave fewer allowed blocks than the table is wide
    row_valid = rows >= 0 if (is_causal or key_mask is not None) else None
    rows = rows.clamp(min=0) + first[:, None]
    q_start = k_start = None
    if is_causal:
        q_start = (torch.arange(tm, device=q.device) * block_q).repeat(q.shape[0] * q.shape[1])
        k_start = (torch.arange(tn, device=q.device) * block_k).repeat(b * heads)
    tiles_q = copy_to_blocks(q, block_q, dtype, scratch, "q")
    tiles_k = smooth.view(-1, block_k, k.shape[3])
    tiles_v = copy_to_blocks(v, block_k, dtype, scratch, "v")
    sparse, acc = Operands(tiles_q, tiles_k, tiles_v), accumulation_dtype(q.dtype)
    if args.low_bit != "none":
        # rounded once: smoothed keys may have been rounded to 16 bits
        exact = tiles_k if dtype == acc else to_blocks(k.to(acc) - k_mean[:, :, None], block_k)
        sparse = Operands.rounded(tiles_q, exact, tiles_v, k_valid, args.low_bit)
    return Tiles(
        tiles_q, tiles_k, tiles_v, sparse, rows, k_valid, row_valid, q_start, k_start, args.scale, tn, scratch,
    )  # fmt: skip
