"""Compiles launches without a GPU, and remembers what came out of each: registers, spills and shared memory.

`compiled.json` has that by fingerprint, of all that a compilation depends on. So a run of the tests need not compile
again what has not changed, which takes minutes. `make golden` writes it anew. It holds for one version of Triton;
with another, everything is compiled.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import re
import subprocess
import tempfile
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from sla2_compile.kernels.cuda.launch.layout import Slot, Tiles
from sla2_compile.kernels.cuda.launch.steps import Launch

TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.bool: "*i1",
    torch.int8: "*i8", torch.float8_e4m3fn: "*fp8e4nv",
}  # fmt: skip
FILE = Path(__file__).with_suffix(".json")


class Usage(NamedTuple):
    """What a program of a compiled kernel takes: registers of a thread, and bytes."""

    registers: int
    spilled: int
    shared: int

    def __str__(self) -> str:
        return f"{self.registers} registers, {self.spilled} bytes spilled, {self.shared} of shared"


class Record:
    """What compilations gave, by fingerprint, which begins with kernel and chip.

    Attributes:
        holds: whether this Triton made it.
        again: of each kernel and chip one fingerprint, which changes with the kernel; compiled in every run.
    """

    def __init__(self, usage: dict[str, Usage], version: str = triton.__version__) -> None:
        self.usage, self.holds = usage, version == triton.__version__
        self.again = set({key.rpartition(" ")[0]: key for key in sorted(usage)}.values())

    @classmethod
    def load(cls) -> Record:
        found = json.loads(FILE.read_text()) if FILE.exists() else {"triton": triton.__version__, "usage": {}}
        return cls({key: Usage(*value) for key, value in found["usage"].items()}, found["triton"])

    def save(self) -> None:
        lines = [f"  {json.dumps(key)}: {json.dumps(self.usage[key])}" for key in sorted(self.usage)]
        body = ",\n".join(lines)
        FILE.write_text(f'{{"triton": "{triton.__version__}", "usage": {{\n{body}\n}}}}\n')


RECORD = Record.load()


def source_of(launch: Launch) -> tuple[Any, dict[str, Any]]:
    """A launch's kernel as Triton's launcher would specialise it, and the options of its compilation."""
    kernel, args, kwargs = launch.kernel, launch.args, launch.constants
    options = {name: kwargs[name] for name in ("num_warps", "num_stages", "maxnreg") if kwargs.get(name) is not None}
    names = list(inspect.signature(kernel.fn).parameters)
    # on a CPU the launcher asks for what the interpreter can do
    kwargs = kwargs | ({"FAST": True} if "FAST" in kwargs else {})
    given = dict(zip(names, args, strict=False)) | {name: x for name, x in kwargs.items() if name in names}
    fixed = set(kernel.do_not_specialize or ())
    gluon = kernel.is_gluon()
    signature, constants, attrs = {}, {}, {}
    for index, name in enumerate(names):
        value, parameter = given[name], kernel.params[index]
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Slot):
            signature[name] = TYPES[value.dtype]
            attrs[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, Tiles):
            layout = f",{value.layout!r}" if gluon else ""
            signature[name] = f"tensordesc<{TYPES[value.slot.dtype][1:]}{list(value.block)}{layout}>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and name not in fixed:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            if value % 16 == 0 and name not in fixed:
                attrs[(index,)] = [["tt.divisibility", 16]]
    source = (GluonASTSource if gluon else ASTSource)(kernel, signature=signature, constexprs=constants, attrs=attrs)
    return source, options


def built(launch: Launch, arch: int) -> Any:
    """Compile one launch."""
    source, options = source_of(launch)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@functools.cache
def assembler() -> str:
    """Version of the assembler that comes with Triton, or that is named in its place."""
    tool = triton.knobs.nvidia.ptxas.path
    return subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout


def names_in(code: CodeType) -> set[str]:
    """Names that a function's code reads, those in comprehensions too."""
    return set(code.co_names).union(*(names_in(x) for x in code.co_consts if isinstance(x, CodeType)))


@functools.cache
def code_of(function: Any) -> str:
    """The text of a kernel and of all of ours that it calls, and the constants that these read.

    Triton's own key of a kernel is another one if what it calls was compiled before.
    """
    seen: dict[str, str] = {}
    waiting = [function]
    while waiting:
        one = waiting.pop()
        found = {name: one.fn.__globals__.get(name) for name in names_in(one.fn.__code__)}
        constants = {name: str(x) for name, x in found.items() if isinstance(x, triton.language.constexpr)}
        seen[f"{one.fn.__module__}.{one.fn.__name__}"] = f"{one.src} {sorted(constants.items())}"
        called = [x for x in found.values() if isinstance(x, triton.runtime.JITFunction)]
        waiting += [x for x in called if f"{x.fn.__module__}.{x.fn.__name__}" not in seen]
    return str(sorted(seen.items()))


def fingerprint(launch: Launch, arch: int) -> str:
    """Kernel, chip, and a hash of the kernel's code, of what it calls, of its arguments' types and of the options."""
    source, options = source_of(launch)
    arguments = [
        sorted(source.signature.items()),
        sorted(map(str, source.constants.items())),
        sorted(source.attrs.items()),
    ]
    whole = f"{code_of(launch.kernel)} {arguments} {sorted(options.items())} {arch} {assembler()}"
    return f"{launch.kernel.fn.__name__} sm_{arch} {hashlib.sha256(whole.encode()).hexdigest()[:20]}"


def compiled(launch: Launch, arch: int) -> Usage:
    """Compile one launch, and read what its programs take."""
    made = built(launch, arch)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return Usage(found["REG"], found["STACK"], made.metadata.shared)


def usage_of(launch: Launch, arch: int) -> Usage:
    """What a launch's programs take: as recorded, or compiled, where it must equal what is recorded."""
    key = fingerprint(launch, arch)
    known = RECORD.usage.get(key) if RECORD.holds else None
    if known is None or key in RECORD.again:
        made = compiled(launch, arch)
        assert known in (None, made), f"{key} is recorded as {known}, and compiles to {made}; run make golden"
        return made
    return known
