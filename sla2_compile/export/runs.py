"""The inputs that a file is compared at: those of the export, and others of its dynamic sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def at_other_sizes(program: ExportedProgram) -> Iterator[Any]:
    """Yield inputs like the example's, with other values, at about 1.5 times, twice and half its dynamic sizes.

    A program may refuse the first, for lengths that must be whole patches, and take the second. A model with a table
    of positions may take the third alone. Sizes that a program derives from others are derived here too. Whole
    numbers are taken from the example, so that token ids stay token ids. Nothing is yielded where no other size is
    known.
    """
    assert program.example_inputs is not None
    examples, sizes = given_tensors(program.example_inputs), symbolic_sizes(program)
    known: dict[Any, int] = {}
    for x, shape in zip(examples, sizes, strict=True):
        for axis, n in enumerate(shape):
            if isinstance(n, sympy.Expr):
                known |= solved(n, x.shape[axis])
    done = [tuple(x.shape for x in examples)]
    for other in (lambda n: n + n // 2 + 1, lambda n: 2 * n, lambda n: max(2, n // 2)):
        grown = {symbol: within(program, symbol, n, other(n)) for symbol, n in known.items()}
        shapes = tuple(torch.Size(evaluated(shape, grown, x)) for x, shape in zip(examples, sizes, strict=True))
        if shapes in done:
            continue
        done.append(shapes)
        made = iter([resized(x, shape) for x, shape in zip(examples, shapes, strict=True)])
        yield tree_map(lambda x, made=made: next(made) if isinstance(x, Tensor) else x, program.example_inputs)


def solved(size: Any, n: int) -> dict[Any, int]:
    """Find the value of the one symbol of a size that is n; nothing if it has several symbols, or no such value."""
    if len(size.free_symbols) != 1:
        return {}
    (symbol,) = size.free_symbols
    try:
        values = sympy.solve(sympy.Eq(size, n), symbol)
    except NotImplementedError:
        # sympy solves no equations with remainders
        return {}
    return next(({symbol: int(x)} for x in values if x.is_Integer and x > 0), {})


def within(program: ExportedProgram, symbol: Any, n: int, other: int) -> int:
    """Bring another size than n into the range that the program declares for it; below n if n is the largest."""
    limits = program.range_constraints.get(symbol)
    if limits is None:
        return other
    least = int(limits.lower) if limits.lower.is_Integer else 1
    if not limits.upper.is_Integer or other <= limits.upper:
        return max(least, other)
    return int(limits.upper) if n < limits.upper else max(least, n - n // 3)


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
