"""Reads Hopper's machine code for what the assembler may do wrong: use a product's registers while it runs.

A product (HGMMA) goes on after its instruction. Its last part ends a group (gsb0), and a wait (WARPGROUP.DEPBAR) says
how many groups may still run. Until then neither its sum nor its left operand may be written, nor its sum be read.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

NO_REGISTER = (
    "BAR", "BRA", "BSSY", "BSYNC", "CALL", "DEPBAR", "ELECT", "ERRBAR", "EXIT", "FENCE", "FSETP", "ISETP", "MEMBAR",
    "NOP", "PLOP3", "R2P", "R2UR", "RED", "RET", "ST", "SYNCS", "U", "VOTEU", "WARPGROUP", "WARPSYNC",
)  # fmt: skip
"""Beginnings of instructions that write no register of a thread."""


@dataclass(frozen=True)
class Instruction:
    """One instruction: `writes` and `reads` are numbers of registers; target: where a branch goes, or -1."""

    text: str
    name: str
    writes: frozenset[int]
    reads: frozenset[int]
    target: int = -1

    @property
    def is_product(self) -> bool:
        return self.name.startswith("HGMMA")


def width(name: str) -> int:
    """How many registers in a row an instruction writes or stores."""
    if name.startswith("LDSM"):
        return int(name[-1])
    return 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name or name.startswith("CS2R") else 1


def read(text: str, labels: dict[str, int]) -> Instruction:
    """Read an instruction's text, without its address."""
    name, _, rest = re.sub(r"^@!?U?P\w+\s+", "", text).partition(" ")
    operands = [x.strip() for x in rest.split(",") if not re.fullmatch(r"\s*!?U?P[T\d]\s*", x)]
    found = [[int(n) for n in re.findall(r"(?<![U\w])R(\d+)", x)] for x in operands]
    branch = re.search(r"`\((\.L\w+)\)", text)
    target = labels.get(branch[1], -1) if branch and name.startswith("BRA") else -1
    if name.startswith("HGMMA"):
        size = re.search(r"64x(\d+)x", name)
        assert size, text
        sums, left = found[0][0], found[1]
        return Instruction(
            text,
            name,
            frozenset(range(sums, sums + int(size[1]) // 2)),
            frozenset(n + i for n in left for i in range(4)),
        )
    writes: set[int] = set()
    if operands and found[0] and not name.startswith(NO_REGISTER):
        writes = set(range(found[0][0], found[0][0] + width(name)))
        found = found[1:]
    wide = width(name) if name.startswith("ST") else 1
    reads = {n + i for numbers in found for n in numbers for i in range(wide)}
    return Instruction(text, name, frozenset(writes), frozenset(reads), target)


def instructions(code: str) -> list[Instruction]:
    """Read what nvdisasm prints."""
    texts: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(texts)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            texts.append(found[1])
    return [read(text, labels) for text in texts]


def disassembled(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        return subprocess.run([tool, "-c", file], capture_output=True, text=True, check=True).stdout


def waits(code: list[Instruction]) -> list[int]:
    """How many groups each wait lets run, ascending."""
    return sorted(int(x.text.split(",")[1], 16) for x in code if x.name.startswith("WARPGROUP.DEPBAR"))


Group = tuple[frozenset[int], frozenset[int]]
"""The sums and the left operands of products that end together."""


def disturbed(code: list[Instruction]) -> list[str]:
    """Follow each path, and return the instructions that use registers of products that still run."""
    found: list[str] = []
    seen: set[tuple[int, tuple[Group, ...], Group]] = set()
    none: Group = (frozenset(), frozenset())
    ways: list[tuple[int, tuple[Group, ...], Group]] = [(0, (), none)]
    while ways:
        at, running, begun = ways.pop()
        while at < len(code) and (at, running, begun) not in seen:
            seen.add((at, running, begun))
            x = code[at]
            at += 1
            # a group's products add to one sum, in order
            others = running if x.is_product else (*running, begun)
            for sums, left in others:
                of_sums = sums & (x.reads if x.is_product else x.reads | x.writes)
                if of_sums or left & x.writes:
                    found.append(x.text)
            if x.is_product:
                begun = (begun[0] | x.writes, begun[1] | x.reads)
                if "gsb0" in x.text:
                    running, begun = (*running, begun), none
            elif x.name.startswith("WARPGROUP.DEPBAR"):
                running = running[max(0, len(running) - int(x.text.split(",")[1], 16)) :]
            if x.target >= 0:
                if x.text.startswith("@"):
                    ways.append((at, running, begun))
                at = x.target
            elif x.text == "EXIT":
                break
    return found


def lost(code: list[Instruction]) -> list[int]:
    """Return what a loop's products read as it was before the loop, and which the loop then overwrites."""
    found: set[int] = set()
    for end, x in enumerate(code):
        body = code[x.target : end + 1] if 0 <= x.target <= end else []
        # what comes after the end of the program only waits for the copy engine
        if any(y.text == "EXIT" for y in body):
            continue
        made: set[int] = set()
        before: set[int] = set()
        for y in body:
            if y.is_product:
                # a first product of a sum takes zeros in its place
                before |= y.reads - made
                made |= y.writes if "RZ" in y.text else set()
                before |= y.writes - made
            else:
                made |= y.writes
        found |= before & {n for y in body if not y.is_product for n in y.writes}
    return sorted(found)
