"""A Hopper GPU that launches nothing: Triton compiles for it, launches on it, and each launch is kept as bytes.

For a process of its own: `start` loads a driver that does nothing (`fake_cuda.c`), and CPU tensors pass for CUDA's.
"""

from __future__ import annotations

import ctypes
import subprocess
import types
from pathlib import Path
from typing import Any

import torch
import triton

STREAM = 77
DESCRIBED = 120
"""Bytes of a description of four dims that `fake_cuda.c` writes; the real driver writes 128, of unknown meaning."""


def build(folder: Path) -> None:
    """Compile the driver into the folder, by the name that Triton's launcher looks for."""
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    command = ["cc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
    source, library = Path(__file__).with_name("fake_cuda.c"), folder / "libcuda.so.1"
    subprocess.run([*command, "-o", str(library), str(source)], check=True)


def start(folder: Path) -> Any:
    """Load the driver into this process, for PyTorch and Triton to find; returns it."""
    build(folder)
    library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    from triton.backends.nvidia import driver

    from sla2_compile.kernels.cuda import device

    fakes: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_available", True),
        (torch.cuda, "current_device", 0),
        (torch.cuda, "get_device_capability", (9, 0)),
        (torch.cuda, "current_stream", types.SimpleNamespace(cuda_stream=STREAM)),
        (torch._C, "_cuda_getCurrentRawStream", STREAM),
        (driver, "libcuda_dirs", [str(folder)]),
        (device, "capability", 90),
    ]
    for module, name, answer in fakes:
        setattr(module, name, lambda *_, answer=answer: answer)
    return library


Recorded = tuple[tuple[int, ...], int, int, int, list[bytes]]


class Recorder:
    """Keeps each launch: grid, block and shared bytes, stream, attributes, function, bytes of each parameter.

    Args:
        library: of `start`; sizes: by function, the bytes of its parameters.
    """

    def __init__(self, library: Any, sizes: dict[int, list[int]]) -> None:
        from sla2_compile.kernels.cuda.launch.driver import Config

        self.launches: list[Recorded] = []
        self._library = library

        def keep(config: Any, function: int, parameters: Any) -> None:
            c = config.contents
            sized = zip(parameters, sizes[function], strict=False)
            values = [ctypes.string_at(address, min(size, DESCRIBED)) for address, size in sized]
            self.launches.append(((*c.grid, *c.block, c.shared_bytes), c.stream, c.count, function, values))

        pointer = ctypes.POINTER
        # an attribute, or it would be freed under the driver
        self._hook = ctypes.CFUNCTYPE(None, pointer(Config), ctypes.c_void_p, pointer(ctypes.c_void_p))(keep)

    def __enter__(self) -> Recorder:
        self._library.fake_set_hook(self._hook)
        return self

    def __exit__(self, *_: object) -> None:
        self._library.fake_set_hook(None)
