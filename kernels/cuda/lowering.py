"""How Inductor compiles the ops `sla2::*` on a GPU: to launches in its own code (`cuda/compiled.py`).

Inductor then allocates results and scratch, reuses memory, and fuses what produces q, k and v and what consumes o. A
call stays a call of the op if the kernels do not take it, and in code that is not Python (AOTInductor). Where sizes
are symbols, each call looks up its launches by its layout.

All of Inductor that is used here is private to it: `tests/kernels/test_lowering.py` fails on a PyTorch where it works
differently. `ops.py` calls `install` when Inductor is about to meet an op, so that Inductor is not loaded for this.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch._inductor import ir
from torch._inductor.lowering import empty_strided, fallback_handler, lowerings, register_lowering
from torch._inductor.virtualized import V

from sla2_compile.kernels.cuda import dispatch
from sla2_compile.kernels.cuda.compiled import written
from sla2_compile.kernels.cuda.launch.layout import Slot
from sla2_compile.kernels.layout import Layout
from sla2_compile.kernels.records import arguments, of, tensor_count
from sla2_compile.kernels.switches import by_trial

DEVICES = {"cuda"}
"""Types of devices whose calls become launches."""


class LaunchesNode(ir.ExternKernel):
    """A call of `compiled.Launches` among Inductor's operations.

    Args:
        constructor: the expression that makes the `Launches`.
        inputs: buffers that it reads; made: those that it writes, results and scratch.
    """

    def __init__(self, constructor: str, inputs: Sequence[Any], made: Sequence[Any]) -> None:
        self.tensors = [self.unwrap_storage_for_input(x) for x in (*inputs, *made)]
        self.device = self.tensors[0].get_device()
        super().__init__(None, ir.NoneLayout(device=self.device), self.tensors, ())
        self.constructor = constructor
        self.mutation_outputs = [ir.MutationOutput(ir.NoneLayout(device=self.device), x, self) for x in made]
        V.graph.register_operation(self)

    def codegen(self, wrapper: Any) -> None:
        name = "sla2_" + hashlib.sha256(self.constructor.encode()).hexdigest()[:12]
        wrapper.add_import_once(f"from {dispatch.__package__}.compiled import Launches as sla2_launches")
        definition = f"{name} = {self.constructor}"
        if definition not in wrapper.header.getvalue():
            wrapper.header.writeline(definition)
        wrapper.writeline(f"{name}({', '.join(x.codegen_reference() for x in self.tensors)})")

    def get_outputs(self) -> list[ir.Buffer]:
        return list(self.mutation_outputs)

    def get_device(self) -> torch.device | None:
        return self.device

    def should_allocate(self) -> bool:
        return False


def decided(x: Any) -> Any:
    """Have Inductor decide the strides of a realised argument now, since launches are scheduled for them."""
    buffer = ir.ExternKernel.unwrap_storage_for_input(x)
    if isinstance(buffer, ir.Buffer):
        buffer.decide_layout()
    return x


def readable(name: str, x: Any) -> Any:
    """Realise an argument in a layout that the kernels read (`dispatch.laid_out`); None stays None."""
    if x is None:
        return None
    x = decided(ir.ExternKernel.realize_input(x))
    if name == "alpha_bias":
        return x
    fine = x.get_stride()[-1] == 1 if name in dispatch.STRIDED else x.get_layout().is_contiguous()
    return x if fine else decided(ir.ExternKernel.require_contiguous(x))


def numbers(values: Sequence[Any]) -> tuple[int, ...]:
    """Sizes or strides as numbers; the example's where they are symbols."""
    return tuple(V.graph.sizevars.optimization_hint(x) for x in values)


def is_number(x: Any) -> bool:
    """Whether a size or an option contains no symbol."""
    return not getattr(x, "free_symbols", None)


def layout_of(x: Any) -> Layout:
    """The layout of a realised argument in the example; a buffer's address is a multiple of 16 bytes."""
    layout = x.get_layout()
    (offset,) = numbers([layout.offset])
    shape, stride = torch.Size(numbers(layout.size)), numbers(layout.stride)
    return Layout(shape, stride, layout.dtype, x.get_device(), offset * layout.dtype.itemsize % 16 == 0)


def allocated(shape: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Any:
    """Have Inductor allocate a contiguous tensor."""
    made = empty_strided(list(shape), None, dtype=dtype, device=device)
    made.realize()
    return made


def result_shapes() -> list[list[Any]]:
    """The shapes, with symbols, of the results of the node that is being lowered."""
    values = V.graph.current_node.meta["val"]
    values = [values] if isinstance(values, torch.Tensor) else values
    return [[n.node.expr if isinstance(n, torch.SymInt) else n for n in x.shape] for x in values]


def swapped(shape: Sequence[Any], slot: Slot) -> Sequence[Any]:
    """The shape of a result as its slot has it, given that in the graph."""
    return (shape[0], shape[2], shape[1], shape[3]) if slot.transposed else shape


def lower(op: str, values: Sequence[Any]) -> Any:
    """Lower a call of an op, given all its arguments, to launches; None if it must stay a call."""
    record, scheduler = dispatch.SCHEDULED[op]
    count = tensor_count(record)
    device = values[0].get_device()
    if device.type not in DEVICES or V.graph.cpp_wrapper or not all(map(is_number, values[count:])):
        return None
    options = tuple(int(x) if isinstance(x, sympy.Integer) else x for x in values[count:])
    tensors = [readable(about.name, x) for about, x in zip(arguments(record), values[:count], strict=False)]
    present = [x for x in tensors if x is not None]
    layouts = [None if x is None else layout_of(x) for x in tensors]
    scheduled = scheduler(of(record, (*layouts, *options)), by_trial())
    if scheduled is None:
        return None
    schedule, slots = scheduled
    fixed = all(is_number(n) for x in present for n in (*x.get_size(), *x.get_stride(), x.get_layout().offset))
    fixed = fixed and all(layout is None or layout.aligned for layout in layouts)
    shapes = [swapped(shape, slot) for shape, slot in zip(result_shapes(), slots, strict=True)]
    made = [allocated(shape, slot.dtype, device) for shape, slot in zip(shapes, slots, strict=True)]
    scratch = [allocated([schedule.scratch_bytes(slots)], torch.uint8, device)] if fixed else []
    # calls of one constructor share its object, so that it must name all that is fixed
    kinds = tuple(None if x is None else (written(x) if fixed else ()) for x in layouts)
    constructor = f"sla2_launches({op!r}, {kinds}, {options})"
    LaunchesNode(constructor if fixed else f"{constructor}.of_any_layout", present, [*made, *scratch])
    permute = lowerings[torch.ops.aten.permute.default]
    seen = tuple(permute(x, [0, 2, 1, 3]) if slot.transposed else x for x, slot in zip(made, slots, strict=True))
    return seen[0] if len(seen) == 1 else seen


def install_op(op: str) -> None:
    """Register one op's lowering with Inductor."""
    overload = getattr(torch.ops.sla2, op).default
    call = fallback_handler(overload, add_to_fallback_set=False)
    taken = arguments(dispatch.SCHEDULED[op][0])

    def lowered(*args: Any, **kwargs: Any) -> Any:
        made = lower(op, [*args, *(kwargs.get(x.name, x.default) for x in taken[len(args) :])])
        return call(*args, **kwargs) if made is None else made

    register_lowering(overload, type_promotion_kind=None)(lowered)


@functools.cache
def install() -> None:
    """Register the ops' lowerings with Inductor, once per process."""
    for op in dispatch.SCHEDULED:
        install_op(op)
