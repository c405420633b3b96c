"""`Product`: one contraction of two tensors with named axes, whether matmul, bmm, baddbmm or einsum wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from sla2_compile.passes.graph.reader import Reader, known
from sla2_compile.passes.graph.traits import Trait


@dataclass(frozen=True)
class Product:
    """left and right, contracted over the axes that out lacks; one letter per axis.

    Attributes:
        bias, beta, alpha: beta * bias + alpha * product, as in baddbmm.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_axes: str
    right_axes: str
    out: str
    bias: fx.Node | None = None
    beta: Any = 1
    alpha: Any = 1

    def __post_init__(self) -> None:
        assert len(set(self.out)) == len(self.out)

    @property
    def contracted(self) -> str:
        """Axes of both operands that the result lacks."""
        return "".join(a for a in self.left_axes if a in self.right_axes and a not in self.out)

    @property
    def lost(self) -> str:
        """Axes of only one operand that the result lacks: they are summed over."""
        return "".join(a for a in self.left_axes + self.right_axes if a not in self.out and a not in self.contracted)


def read_product(reader: Reader, node: fx.Node) -> Product | None:
    """Read a node as a contraction, or return None."""
    if not reader.has(node, Trait.PRODUCT):
        return None
    name = reader.name(node)
    if name == "einsum":
        return _einsum(reader, node)
    if name == "baddbmm":
        left, right = reader.arg(node, 1, "batch1"), reader.arg(node, 2, "batch2")
        beta, alpha = (
            reader.number(reader.arg(node, 3 + i, key, default=1)) for i, key in enumerate(("beta", "alpha"))
        )
        made = _matmul(reader, node, left, right)
        bias = reader.first(node)
        if made is None or bias is None or beta is None or alpha is None:
            return None
        # with beta = 0 the first argument is not read, even if it holds nan
        ignored = isinstance(beta, (int, float)) and beta == 0
        return Product(
            node,
            made.left,
            made.right,
            made.left_axes,
            made.right_axes,
            made.out,
            None if ignored else bias,
            beta,
            alpha,
        )
    return _matmul(reader, node, reader.first(node), reader.arg(node, 1, "other", "mat2", "tensor2"))


def _matmul(reader: Reader, node: fx.Node, left: Any, right: Any) -> Product | None:
    a, b = reader.shape(left), reader.shape(right)
    if a is None or b is None or min(len(a), len(b)) < 2:
        return None
    batch = "abcdefgh"[: max(len(a), len(b)) - 2]
    left_axes = batch[len(batch) - len(a) + 2 :] + "xy"
    right_axes = batch[len(batch) - len(b) + 2 :] + "yz"
    return Product(node, left, right, left_axes, right_axes, batch + "xz")


def _einsum(reader: Reader, node: fx.Node) -> Product | None:
    equation = reader.arg(node, 0, "equation")
    rest = reader.arg(node, 1, "operands", "tensors")
    operands: list[Any] = list(rest) if isinstance(rest, (list, tuple)) else list(node.args[1:])
    if not isinstance(equation, str) or "->" not in equation or len(operands) != 2:
        return None
    inputs, _, out = equation.replace(" ", "").partition("->")
    axes = inputs.split(",")
    shapes = [reader.shape(x) for x in operands]
    if len(axes) != 2 or None in shapes:
        return None
    if "..." in equation:
        # the axes of an ellipsis are aligned from the right
        free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
        counts = [
            len(s or ()) - len(a.replace("...", "")) if "..." in a else 0 for a, s in zip(axes, shapes, strict=True)
        ]
        dots = "".join(free[: max(counts)])
        axes = [a.replace("...", dots[len(dots) - n :]) for a, n in zip(axes, counts, strict=True)]
        out = out.replace("...", dots)
    repeated = any(len(set(a)) != len(a) for a in (*axes, out))
    # einsum broadcasts axes of size 1, even axes that it sums over
    both = [(a, n) for a, n in zip(axes[0], shapes[0] or (), strict=False) if a in axes[1] and a not in out]
    if not all(
        known(n == (shapes[1] or ())[axes[1].index(a)]) for a, n in both if len(axes[1]) == len(shapes[1] or ())
    ):
        return None
    if repeated or any(len(a) != len(s or ()) for a, s in zip(axes, shapes, strict=True)):
        return None
    return Product(node, operands[0], operands[1], axes[0], axes[1], out)
