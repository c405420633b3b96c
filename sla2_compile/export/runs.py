"""The inputs that a file is compared at: those of the export, and others of its dynamic sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map


def given_tensors(inputs: Any) -> list[Tensor]:
    """The tensors among the inputs of a forward, in the order of the inputs of a file."""
    return [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]


def symbolic_sizes(program: ExportedProgram) -> list[tuple[Any, ...]]:
    """The sizes of each input tensor of a program: numbers, or expressions of symbols."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    given = [values.get(name) for name in program.graph_signature.user_inputs if isinstance(name, str)]
    return [
        tuple(n.node.expr if isinstance(n, torch.SymInt) else n for n in x.shape)
        for x in given
        if isinstance(x, Tensor)
    ]


def is_dynamic(program: ExportedProgram) -> bool:
    return any(isinstance(n, sympy.Expr) for sizes in symbolic_sizes(program) for n in sizes)


def at_other_sizes(program: ExportedProgram) -> Any:
    """Return inputs like the example's, with other values and about one and a half times its dynamic sizes.

    Sizes that a program derives from others are derived here too. Whole numbers are taken from the example, so that
    token ids stay token ids.
    """
    assert program.example_inputs is not None
    examples, sizes = given_tensors(program.example_inputs), symbolic_sizes(program)
    known: dict[Any, int] = {}
    for x, shape in zip(examples, sizes, strict=True):
        for axis, n in enumerate(shape):
            if isinstance(n, sympy.Symbol):
                known[n] = x.shape[axis]
    grown = {symbol: within(program, symbol, n + n // 2 + 1) for symbol, n in known.items()}
    made = iter([resized(x, evaluated(shape, grown, x)) for x, shape in zip(examples, sizes, strict=True)])
    return tree_map(lambda x: next(made) if isinstance(x, Tensor) else x, program.example_inputs)


def within(program: ExportedProgram, symbol: Any, n: int) -> int:
    """Bring a size into the range that the program declares for it."""
    limits = program.range_constraints.get(symbol)
    if limits is None or not limits.upper.is_Integer:
        return n
    return min(n, int(limits.upper))


def evaluated(shape: Sequence[Any], sizes: dict[Any, int], x: Tensor) -> tuple[int, ...]:
    """A shape as numbers; the example's where an expression has symbols without a size."""
    found = [n.subs(sizes) if isinstance(n, sympy.Expr) else n for n in shape]
    return tuple(
        x.shape[axis] if isinstance(n, sympy.Expr) and n.free_symbols else int(n) for axis, n in enumerate(found)
    )


def resized(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Repeat x along its axes to a shape, and move floating-point values by a tenth of their spread."""
    for axis, n in enumerate(shape):
        x = x.index_select(axis, torch.arange(n, device=x.device) % x.shape[axis])
    if not x.is_floating_point() or x.numel() < 2:
        return x
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return x + 0.1 * x.std() * noise.to(x)
