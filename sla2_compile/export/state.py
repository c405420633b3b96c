"""Models that write into their buffers or inputs, which a file does not."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

from sla2_compile.export.calls import graphs
from sla2_compile.modules.restoring.leave_alone import left_alone, private_copy


def warn_of_state(decomposed: ExportedProgram) -> None:
    """Tell what the file of a program will not write into.

    Args:
        decomposed: the program as torch.onnx.export has it, without writes in place; its signature has them instead.

    Warns:
        UserWarning: the program writes into a parameter, buffer or input.
    """
    signature = decomposed.graph_signature
    found = (signature.parameters_to_mutate, signature.buffers_to_mutate, signature.user_inputs_to_mutate)
    if names := [name for each in found for name in each.values()]:
        warnings.warn(
            f"the model writes into {', '.join(names)}, and a file into nothing: each of its runs computes what the "
            "model's next one would; return what is to be kept, and pass it as an input",
            stacklevel=3,
        )


def may_write(program: ExportedProgram) -> bool:
    """Whether an operator of a program writes in place, be it into a result of its own."""
    return any(writes(node) for gm in graphs(program.graph_module) for node in gm.graph.nodes)


def writes(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def runner(program: ExportedProgram, inputs: Any, changed: nn.Module | None = None) -> Callable[[], Any]:
    """Return a function that runs a program each time as the first time: what it writes into is put back.

    Args:
        changed: the program's module in another format, which runs in the place of its own.
    """
    module: Any = program.module() if changed is None else changed
    args, kwargs = inputs
    if not may_write(program):
        return lambda: module(*args, **kwargs)

    def run() -> Any:
        copied, named = private_copy(args, kwargs)
        with left_alone(module, (copied, named), sys.maxsize) as writes, writes.active():
            return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, module(*copied, **named))

    return run
