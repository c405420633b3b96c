"""The kernel that inverts the look-up table: one set of bodies, in the interpreter and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.cuda.backward.lists import lists_kernel
from tests.kernels.triton_case import DEVICE, INTERPRETED, body

WILD = 12345


def inverted(heads: int, tn: int, lut: Tensor, rows: int = 64, kept: int = 64) -> Tensor:
    """Run the kernel on lut (B, Hq, Tm, K), in tiles of rows x kept."""
    entries = lut.numel() // heads
    # as much on either side as the lists themselves
    memory = torch.full((3, heads, entries + 2 * tn), WILD, dtype=torch.int32, device=DEVICE)
    lists_kernel[(heads * num_blocks(tn, 32),)](
        lut.to(DEVICE), memory[1], entries // lut.shape[3], lut.shape[3], tn, BLOCK_R=rows, KEPT=kept, num_warps=4
    )
    assert (memory[0] == WILD).all()
    assert (memory[2] == WILD).all()
    return memory[1].cpu()


def expected(heads: int, tn: int, lut: Tensor) -> list[list[list[int]]]:
    """For each head and key block, the rows of lut that name it, ascending."""
    tables = lut.reshape(heads, -1, lut.shape[3]).tolist()
    return [[[r for r, row in enumerate(table) if j in row] for j in range(tn)] for table in tables]


def read(heads: int, tn: int, lists: Tensor) -> list[list[list[int]]]:
    entries = lists.shape[1] - 2 * tn
    found = []
    for head in lists.tolist():
        begins, ends = head[entries : entries + tn], head[entries + tn :]
        assert all(0 <= a <= b <= entries for a, b in zip(begins, ends, strict=True))
        found.append([head[a:b] for a, b in zip(begins, ends, strict=True)])
    return found


def table(B: int, Hq: int, tm: int, tn: int, kept: int, absent: float = 0.0) -> Tensor:
    """A router's table at random: ascending rows, with -1 behind the last entry of some."""
    g = torch.Generator().manual_seed(0)
    lut = torch.rand(B, Hq, tm, tn, generator=g).topk(kept, dim=-1).indices.sort(dim=-1).values
    fewer = torch.rand(B, Hq, tm, 1, generator=g) < absent
    length = torch.where(fewer, torch.randint(0, kept, (B, Hq, tm, 1), generator=g), kept)
    return lut.masked_fill(torch.arange(kept) >= length, -1).int()


TABLES: dict[str, dict[str, Any]] = {
    "one entry": {"B": 1, "Hq": 1, "tm": 1, "tn": 1, "kept": 1},
    "a key block more than a word": {"B": 2, "Hq": 2, "tm": 5, "tn": 33, "kept": 4},
    "grouped heads, absent entries": {"B": 2, "Hq": 4, "tm": 37, "tn": 71, "kept": 9, "absent": 0.5},
    "every block": {"B": 1, "Hq": 2, "tm": 20, "tn": 40, "kept": 40},
    "more entries than a tile": {"B": 1, "Hq": 2, "tm": 70, "tn": 70, "kept": 66, "absent": 0.2},
}


@body
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("groups", [1, 2])
def test_every_entry_is_in_its_list_once_and_lists_ascend(name: str, groups: int) -> None:
    about = TABLES[name]
    heads = max(1, about["B"] * about["Hq"] // groups)
    lut = table(**about)
    lists = inverted(heads, about["tn"], lut)
    assert read(heads, about["tn"], lists) == expected(heads, about["tn"], lut)


@body
def test_lists_follow_each_other_without_gaps() -> None:
    lut = table(1, 2, 30, 50, 7)
    lists = inverted(1, 50, lut)
    begins, ends = lists[0, -100:-50], lists[0, -50:]
    assert begins[0] == 0
    assert torch.equal(begins[1:], ends[:-1])
    assert ends[-1] == lut.numel()


@body
def test_a_long_call_with_grouped_heads() -> None:
    """1024 query blocks of each of two query heads, 2048 key blocks."""
    lut = table(1, 2, 1024, 2048, 12)
    # the interpreter's time goes by tiles
    lists = inverted(1, 2048, lut, *((2048, 16) if INTERPRETED else (64, 16)))[0]
    flat = lut.view(2048, 12).long()
    chosen = torch.zeros(2048, 2048, dtype=torch.bool).scatter_(1, flat, True)
    # ordered by key block, then by row
    assert torch.equal(lists[: lut.numel()].long(), chosen.T.nonzero()[:, 1])
    assert torch.equal((lists[-2048:] - lists[-4096:-2048]).long(), chosen.sum(dim=0))


@body
def test_a_bad_table_writes_nothing_outside() -> None:
    """Entries that are no key block are in no list. A row that names one twice makes no list overflow."""
    wild = [[5, -7, 2], [-1, 2**31 - 1, 5], [40, 33, -(2**31)], [34, 0, 1000]]
    found = read(1, 34, inverted(1, 34, torch.tensor(wild, dtype=torch.int32)[None, None]))[0]
    assert {j: rows for j, rows in enumerate(found) if rows} == {0: [3], 2: [0], 5: [0, 1], 33: [2]}
    repeated = torch.tensor([[31, 31, 31], [31, 31, 5], [33, 33, 5]], dtype=torch.int32).repeat(40, 1)
    lists = inverted(1, 34, repeated[None, None])
    assert sum(len(rows) for rows in read(1, 34, lists)[0]) <= repeated.numel()
    assert all(0 <= row < len(repeated) for rows in read(1, 34, lists)[0] for row in rows)
