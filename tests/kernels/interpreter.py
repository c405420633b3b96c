"""Make Triton's interpreter right where it is silently wrong: bf16 dots, and casts to bf16 and FP8.

As shipped (3.6 to 3.9) it multiplies the raw bits of bf16 operands, truncates fp32 -> bf16 and rounds FP8 wrongly.
`repair` replaces both places by ml_dtypes arithmetic. bf16 arithmetic other than dots stays wrong: kernels
go to fp32 first. FP8 saturates, as the GPU's conversion does. It also makes calls of functions cheaper.
"""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

FLOATS: dict[Any, Any] = {
    tl.bfloat16: ml_dtypes.bfloat16,
    tl.float8e4nv: ml_dtypes.float8_e4m3fn,
    tl.float8e5: ml_dtypes.float8_e5m2,
    tl.float16: np.float16,
    tl.float32: np.float32,
    tl.float64: np.float64,
}


def values(data: np.ndarray[Any, Any], kind: Any) -> np.ndarray[Any, Any]:
    """Read the interpreter's raw array as numbers of this type."""
    return data.view(FLOATS[kind]) if kind in FLOATS else data


def convert(data: np.ndarray[Any, Any], source: Any, target: Any, rounding_mode: Any) -> np.ndarray[Any, Any]:
    """Round to nearest even from one float type to another; FP8 saturates. Returns raw bits."""
    x = values(np.ascontiguousarray(data), source).astype(np.float32 if source != tl.float64 else np.float64)
    kind = FLOATS[target]
    if target in (tl.float8e4nv, tl.float8e5):
        limit = float(ml_dtypes.finfo(kind).max)
        x = np.clip(x, -limit, limit)
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(kind).view(getattr(np, f"uint{target.primitive_bitwidth}"))


def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """Multiply in float32 (integers in int32) and add to d."""
    x, y = values(a.data, a.dtype.scalar), values(b.data, b.dtype.scalar)
    kind = np.float32 if np.issubdtype(d.data.dtype, np.floating) else np.int32
    product = np.matmul(x.astype(kind), y.astype(kind)).astype(d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


NUMPY_TYPE = interpreter._get_np_dtype
NUMBERS: dict[Any, Any] = {}
"""What `interpreter._get_np_dtype` answers, which makes a table of all types at each call."""


def stored_as(kind: Any) -> Any:
    """The type in which the interpreter stores numbers, pointers or blocks of them."""
    element = kind.element_ty if isinstance(kind, tl.block_type) else kind
    if isinstance(element, tl.pointer_type):
        return np.dtype(np.uint64)
    if element not in NUMBERS:
        NUMBERS[element] = NUMPY_TYPE(element)
    return NUMBERS[element]


@functools.cache
def builtins_of(package: Any) -> tuple[str, ...]:
    """Names of a package's builtins, asked for while none of them is patched."""
    return tuple(name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member))


def patch_builtins(package: Any, builder: Any, scope: Any) -> None:
    """Patch a package's builtins for one call of a function, unless a call around it has: all of them, or none.

    As shipped, all members of `tl` are listed at each call, which takes a third of the time of these tests.
    """
    names = builtins_of(package)
    if names and tl.core.is_builtin(getattr(package, names[0])):
        for name in names:
            interpreter._patch_attr(package, name, getattr(package, name), builder, scope)


@functools.cache
def sizes_of(shape: tuple[int, ...]) -> tuple[Any, Any]:
    """The number of elements of a block and its shape, as a tensor of the language holds them."""
    return tl.constexpr(math.prod(shape)), tl.core.tuple([tl.constexpr(size) for size in shape])


def make_tensor(self: Any, handle: Any, kind: Any) -> None:
    """`tl.tensor.__init__`, with one object for all tensors of a shape."""
    tl.core.base_value.__init__(self)
    self.handle, self.type, self.dtype = handle, kind, kind.scalar
    self.numel, self.shape = sizes_of(kind.shape if kind.is_block() else ())


MAKE_BLOCK = tl.block_type.__init__
BLOCKS: dict[Any, dict[str, Any]] = {}


def make_block(self: Any, element: Any, shape: Any) -> None:
    """`tl.block_type.__init__`, which checks a shape once for each type of elements."""
    key = element.name, tuple(getattr(size, "value", size) for size in shape)
    if key not in BLOCKS:
        MAKE_BLOCK(self, element, shape)
        BLOCKS[key] = dict(self.__dict__)
    self.__dict__.update(BLOCKS[key])


EQUAL = tl.core.tuple.__eq__
SAME = tl.constexpr(True)


def equal(self: Any, other: Any) -> Any:
    """`tl.core.tuple.__eq__`, where most tuples that are equal are one."""
    return SAME if self is other else EQUAL(self, other)


def quicken() -> None:
    """Have the interpreter make fewer objects.

    It also computes whether whole numbers overflow, and tells nobody unless it debugs.
    """
    tl.tensor.__init__ = make_tensor
    tl.block_type.__init__ = make_block
    tl.core.tuple.__eq__ = equal
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None


def repair() -> None:
    """Patch the interpreter of this process."""
    quicken()
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter._patch_builtin = patch_builtins
    interpreter._get_np_dtype = stored_as
