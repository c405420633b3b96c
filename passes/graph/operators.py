"""What a node calls: one name for all spellings of an operator, and PyTorch's own schemas for it.

A graph may hold functions, methods (by name, or as functions), getters of properties, Python's operators, aten
overloads and their packets, and modules. A user's function that happens to be called `softmax` is not PyTorch's.
"""

from __future__ import annotations

import functools
import operator
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from sla2_compile.passes.graph.traits import SPELLINGS

# Python's in-place operators, `iadd` and the like, without their "i"
IN_PLACE = frozenset({
    "add", "and", "concat", "floordiv", "lshift", "matmul", "mod", "mul", "or", "pow", "rshift", "sub", "truediv",
    "xor",
})  # fmt: skip
REFLECTED = frozenset({f"r{name}" for name in IN_PLACE} | {"rdiv", "rdivmod"})

# methods of a property, and the function that each stands for; a read has the name of the property
DESCRIPTORS = {"__get__": "", "__set__": "setattr", "__delete__": "delattr"}

_PYTHON = ("_operator", "operator", "math")


@dataclass(frozen=True)
class Operator:
    """What a node calls.

    Attributes:
        name: canonical name, with a trailing underscore if it works in place. If the operator is not PyTorch's, its
            namespace or module comes first.
        known: whether it is PyTorch's or Python's. Its name and arguments then show what it writes into.
        pythons: whether it is from Python's `operator` or `math`.
        reads_property: whether it is the getter of a property of tensors.
        reflected: whether its first two arguments are swapped, as in `__rsub__`.
        overloads: the aten operators that it may run, as far as its name shows them.
    """

    name: str = ""
    known: bool = False
    pythons: bool = False
    reads_property: bool = False
    reflected: bool = False
    overloads: tuple[torch._ops.OpOverload, ...] = ()


def operator_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> Operator:
    """Return what a node calls; modules are those of the graph, by name."""
    if node.op == "call_method":
        return _named(str(node.target))
    if node.op == "call_module":
        return _of_module(modules.get(str(node.target)))
    if node.op != "call_function":
        return Operator()
    if node.target is getattr:
        # x.mT, as a plain trace writes it
        return replace(_named(str(node.args[1])), reads_property=True)
    return _of_function(node.target)


def written(function: Any, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Return a function and its arguments in a form that generated code can call.

    A function mode sees Tensor.mT.__get__(x), which code cannot call by name. It becomes getattr(x, "mT").
    """
    if isinstance(function, types.MethodWrapperType) and function.__name__ in DESCRIPTORS:
        name = _property_of(function).__name__
        replacement = {"__get__": getattr, "__set__": setattr, "__delete__": delattr}[function.__name__]
        return replacement, (args[0], name, *(args[1:2] if replacement is setattr else ()))
    return function, args


def _property_of(method: Any) -> Any:
    """Return the property that has this method, or the function behind that property."""
    owner = method.__self__
    return getattr(owner, "fget", owner)


def _of_function(target: Any) -> Operator:
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return _of_aten(target)
    name = str(getattr(target, "__name__", ""))
    if isinstance(target, types.MethodWrapperType) and name in DESCRIPTORS:
        # Tensor.mT.__get__, and Tensor.data.__set__, which writes
        owner = _property_of(target)
        if not DESCRIPTORS[name] and _is_known(owner):
            return replace(_named(owner.__name__), reads_property=True)
        name, target = DESCRIPTORS[name], owner
    if isinstance(target, torch._ops.HigherOrderOperator):
        return Operator(name)
    if not _is_known(target):
        # it may have the same name as a PyTorch function
        return Operator(f"{getattr(target, '__module__', None)}.{name}")
    if getattr(target, "__module__", None) in _PYTHON:
        return _named(name, pythons=True)
    return _named(name)


def _of_aten(target: torch._ops.OpOverload | torch._ops.OpOverloadPacket) -> Operator:
    overloads: tuple[torch._ops.OpOverload, ...]
    if isinstance(target, torch._ops.OpOverload):
        full, overloads = target._schema.name, (target,)
    else:
        full, overloads = target._qualified_op_name, tuple(getattr(target, o) for o in target.overloads())
    space, _, name = full.partition("::")
    if space != "aten":
        return Operator(f"{space}::{name}", overloads=overloads)
    spelt = _named(name)
    return Operator(spelt.name, known=True, reflected=spelt.reflected, overloads=overloads)


def _of_module(module: nn.Module | None) -> Operator:
    """Name a layer of torch.nn like its class. Any other module may run any code."""
    # an embedding with max_norm writes into its weights
    if module is None or getattr(module, "max_norm", None) is not None or not all(map(_is_plain, module.modules())):
        return Operator("module")
    spelt = _named(type(module).__name__.lower())
    name = spelt.name + ("_" if getattr(module, "inplace", False) else "")
    return Operator(name, known=True, overloads=spelt.overloads)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is PyTorch's own, and runs no user code, such as hooks."""
    kind = type(module)
    own = kind.__module__.startswith("torch.nn.modules.")
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return (
        own
        and getattr(sys.modules[kind.__module__], kind.__name__, None) is kind
        and not any(hooks)
        and "forward" not in module.__dict__
    )


def _is_known(target: Any) -> bool:
    """Whether a function is PyTorch's, Python's or ours, and runs no user code."""
    if isinstance(target, torch.jit.ScriptFunction) or target is getattr(operator, "call", None):
        return False
    place = getattr(target, "__module__", None)
    if place is not None:
        return str(place).partition(".")[0] in ("torch", "builtins", "sla2_compile", *_PYTHON)
    # methods and properties of tensors have no module
    return getattr(target, "__objclass__", None) in Tensor.__mro__


@functools.cache
def _named(name: str, pythons: bool = False) -> Operator:
    """Return PyTorch's or Python's operator of this name. There are few enough names to cache them all."""
    inner, reflected, in_place = name, False, False
    special = len(name) > 4 and name.startswith("__") and name.endswith("__")
    if special:
        inner = name[2:-2]
        reflected = inner in REFLECTED
    if inner == "rsub":
        reflected = True
    if reflected:
        inner = inner[1:]
    if (special or pythons) and inner[:1] == "i" and inner[1:] in IN_PLACE:
        inner, in_place = inner[1:], True
    elif inner not in SPELLINGS and inner.endswith("_") and not inner.startswith("_"):
        inner, in_place = inner[:-1], True
    canonical = SPELLINGS.get(inner, inner) + ("_" if in_place else "")
    return Operator(
        canonical, True, pythons, False, reflected, () if pythons else _overloads(name) or _overloads(canonical)
    )


def _overloads(name: str) -> tuple[torch._ops.OpOverload, ...]:
    """Return the aten operators of a name that work on tensors. TorchScript adds others, for lists and strings."""
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return ()
    found = [getattr(packet, overload) for overload in packet.overloads()]
    return tuple(o for o in found if "Tensor" in str(o._schema))
