"""Repeats one launch of a compiled kernel, directly through NVIDIA's driver.

Triton's launcher reads every argument as a Python object, asks the driver about every address and describes every
tile anew, which takes a third of a call's host time. Of all this, only addresses change from call to call. So a
launch's arguments are laid out once in memory that the driver reads, with a cell for every address:

    cells = Cells(len(slots))
    again = Again(compiled, (7, 1, 1), args, cells)      # args: numbers, `Slot` and `Tiles`
    cells.fill(addresses)
    again(stream)

A kernel's parameters are read from its signature and compared with its PTX. Where a version of Triton passes anything
unknown here, `Again` raises `Unknown`, and Triton's own launcher goes on making the launches.
"""

from __future__ import annotations

import ctypes
import re
import struct
from functools import partial
from typing import Any

import torch

from sla2_compile.kernels.cuda.launch.driver import Config, after_failure, check, driver
from sla2_compile.kernels.cuda.launch.layout import Tiles

NUMBERS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
PTX_BYTES = {"u64": 8, "b64": 8, "u32": 4, "b32": 4, "f32": 4}
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)[^,()\[]*(?:\[(\d+)\])?")
DESCRIPTION_BYTES = 128
TENSOR_MAP_TYPES = {
    torch.int8: 0, torch.float8_e4m3fn: 0, torch.float16: 6, torch.float32: 7, torch.bfloat16: 9,
}  # fmt: skip
"""CUtensorMapDataType, which has one type for all bytes."""
L2_128_BYTES = 2


class Unknown(Exception):
    """A launch that only Triton's launcher knows how to make; the text says what is unknown."""


def parameter_bytes(ptx: str) -> list[int]:
    """Size of each parameter of a kernel, in order."""
    start = ptx.index(".entry")
    found = PARAMETER.findall(ptx[start : ptx.index(")", start)])
    return [int(count) if kind == "b8" else PTX_BYTES.get(kind, 0) for kind, count in found]


class Cells:
    """An address for each of a schedule's slots, where launches read them."""

    def __init__(self, count: int) -> None:
        self._memory: Any = (ctypes.c_uint64 * count)()
        self._fill = struct.Struct(f"{count}Q").pack_into

    def fill(self, addresses: list[int]) -> None:
        """Fill all cells."""
        self._fill(self._memory, 0, *addresses)

    def fill_first(self, addresses: list[int]) -> None:
        """Fill the first cells, those of a call's tensors."""
        self._memory[: len(addresses)] = addresses

    def fill_from(self, start: int, places: list[tuple[int, int]]) -> None:
        """Fill the cells of places in one piece of memory: (number of the cell, offset from start)."""
        memory = self._memory
        for at, offset in places:
            memory[at] = start + offset

    def __setitem__(self, at: int, address: int) -> None:
        self._memory[at] = address

    def __getitem__(self, at: int) -> int:
        return self._memory[at]

    def where(self, at: int) -> int:
        """The cell's own address."""
        return ctypes.addressof(self._memory) + 8 * at


class Description:
    """The copy engine's description of a slot's tiles (CUtensorMap), kept up to date with the slot's address.

    Args:
        tiles: what it describes; meta: the layout of a tile in shared memory that Triton compiled the kernel for.
    """

    def __init__(self, tiles: Tiles, meta: dict[str, Any], cells: Cells) -> None:
        dtype, rank = tiles.slot.dtype, len(tiles.shape)
        size = dtype.itemsize
        if meta["fp4_padded"] or meta["elem_size"] != size or dtype not in TENSOR_MAP_TYPES:
            raise Unknown(f"tiles of {dtype} in {meta}")
        self._cells, self._at, self._offset = cells, tiles.slot.at, tiles.offset * size
        # the driver requires an address divisible by 64
        self._memory = (ctypes.c_uint8 * (DESCRIPTION_BYTES + 64))()
        start = ctypes.addressof(self._memory)
        self.address = start + -start % 64
        self._map = ctypes.c_void_p(self.address)
        self._start = cells[self._at] + self._offset
        sizes, strides = reversed(tiles.shape), (s * size for s in tiles.strides[-2::-1])
        check(
            driver().cuTensorMapEncodeTiled(
                self._map, TENSOR_MAP_TYPES[dtype], rank, ctypes.c_void_p(self._start),
                (ctypes.c_uint64 * rank)(*sizes), (ctypes.c_uint64 * (rank - 1))(*strides),
                (ctypes.c_uint32 * rank)(*reversed(meta["block_size"])), (ctypes.c_uint32 * rank)(*[1] * rank),
                0, meta["swizzle"], L2_128_BYTES, 0,
            )
        )  # fmt: skip

    def refresh(self) -> None:
        start = self._cells[self._at] + self._offset
        if start != self._start:
            moved = partial(driver().cuTensorMapReplaceAddress, self._map, ctypes.c_void_p(start))
            code = moved()
            if code:
                after_failure(code, moved, "describing tiles: ")
            self._start = start


class Parameters:
    """A kernel's parameters in order: where the driver finds each, and its size in bytes."""

    def __init__(self, cells: Cells) -> None:
        self.addresses: list[int] = []
        self.sizes: list[int] = []
        self.descriptions: list[Description] = []
        self._cells = cells
        self._numbers: list[Any] = []

    def number(self, kind: Any, value: Any) -> None:
        self._numbers.append(kind(value))
        self._add(ctypes.addressof(self._numbers[-1]), ctypes.sizeof(kind))

    def pointer(self, at: int) -> None:
        self._add(self._cells.where(at), 8)

    def tiles(self, tiles: Tiles, meta: dict[str, Any]) -> None:
        description = Description(tiles, meta, self._cells)
        self.descriptions.append(description)
        self._add(description.address, DESCRIPTION_BYTES)
        for n in tiles.shape:
            self.number(ctypes.c_int32, n)
        for n in tiles.strides:
            self.number(ctypes.c_int64, n)

    def _add(self, address: int, size: int) -> None:
        self.addresses.append(address)
        self.sizes.append(size)


class Again:
    """One launch with its arguments laid out; calling it makes the launch, with the addresses in the cells.

    Args:
        compiled: what Triton made; grid: programs; args: the kernel's arguments up to its constants, with `Slot` and
            `Tiles` for tensors; cells: filled with the addresses of the launch that compiled it.

    Raises:
        Unknown: see the module's text.
    """

    def __init__(self, compiled: Any, grid: tuple[int, ...], args: tuple[Any, ...], cells: Cells) -> None:
        meta = compiled.metadata
        if meta.num_ctas != 1 or meta.launch_cooperative_grid or meta.launch_pdl:
            raise Unknown("clusters, cooperative or dependent launches")
        if meta.global_scratch_size or meta.profile_scratch_size:
            raise Unknown("scratch of Triton's own")
        # keeps alive what the driver reads by address, and the kernel, which Triton may unload
        self._compiled = compiled
        self._laid = laid = Parameters(cells)
        metas = iter(meta.tensordesc_meta or ())
        for kind, value in zip(compiled.src.signature.values(), args, strict=False):
            if kind == "constexpr":
                continue
            if kind in NUMBERS:
                laid.number(NUMBERS[kind], value)
            elif kind[0] == "*":
                laid.pointer(value.at)
            elif kind.startswith("tensordesc"):
                laid.tiles(value, next(metas))
            else:
                raise Unknown(f"an argument of type {kind}")
        # Triton's own scratch, of which there is none
        laid.number(ctypes.c_uint64, 0)
        laid.number(ctypes.c_uint64, 0)
        wanted = parameter_bytes(compiled.asm["ptx"])
        if laid.sizes != wanted:
            raise Unknown(f"parameters of {wanted} bytes in place of {laid.sizes}")
        self._parameters = (ctypes.c_void_p * len(wanted))(*laid.addresses)
        self._function = ctypes.c_void_p(compiled.function)
        self._config = Config((*grid, 1, 1)[:3], (32 * meta.num_warps, 1, 1), meta.shared)
        self._reference = ctypes.byref(self._config)
        self._launch = driver().cuLaunchKernelEx
        self._stream = 0

    def __call__(self, stream: int) -> None:
        if stream != self._stream:
            self._config.stream = self._stream = stream
        for description in self._laid.descriptions:
            description.refresh()
        code = self._launch(self._reference, self._function, self._parameters, None)
        if code:
            doing = f"launching {self._compiled.metadata.name} in {tuple(self._config.grid)} programs: "
            after_failure(code, lambda: self._launch(self._reference, self._function, self._parameters, None), doing)
