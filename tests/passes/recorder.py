"""A recorder: what PyTorch is asked for while a module runs, as a graph of functions at torch's level.

No compiler takes part: targets are what a function mode sees, methods as functions (`Tensor.__rmatmul__`), getters
of properties, functions in place; values are fake tensors in `meta["example_value"]`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from sla2_compile.passes.graph.operators import written


class Recorder(TorchFunctionMode):
    """Writes each call down as a node; `inputs` gives the real tensor of each placeholder."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.nodes: dict[int, fx.Node] = {}
        self.held: list[Any] = []
        self.inputs: list[Tensor] = []
        self.stack: list[tuple[str, type]] = []
        self.names = {module: name for name, module in module.named_modules()}

    def keep(self, value: Any, node: fx.Node) -> None:
        node.meta["example_value"] = value
        node.meta["nn_module_stack"] = {name: (name, kind) for name, kind in self.stack}
        # alive, so that no other tensor gets its identity
        self.held.append(value)
        if isinstance(value, Tensor):
            self.nodes[id(value)] = node
        elif isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            for i, x in enumerate(value):
                self.keep(x, self.graph.call_function(operator.getitem, (node, i)))

    def input(self, fake: Tensor, real: Tensor) -> None:
        self.keep(fake, self.graph.placeholder(f"x{len(self.inputs)}"))
        self.inputs.append(real)

    def node_of(self, x: Any) -> Any:
        return self.nodes[id(x)] if isinstance(x, Tensor) else x

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given, named = tree_map(self.node_of, (tuple(args), kwargs))
        result = func(*args, **kwargs)
        target, given = written(func, given)
        self.keep(result, self.graph.call_function(target, given, named))
        return result


def record(module: nn.Module, *inputs: Tensor) -> tuple[fx.GraphModule, list[Tensor]]:
    """The calls of one forward of a module, under fake tensors, and the tensors that its inputs stand for."""
    mode, recorder = FakeTensorMode(), Recorder(module)
    fakes = [mode.from_tensor(x) for x in inputs]
    real = {name: x.detach() for name, x in (*module.named_parameters(), *module.named_buffers())}
    own: dict[str, Tensor] = {name: mode.from_tensor(x) for name, x in real.items()}
    for fake, x in (*zip(fakes, inputs, strict=True), *((own[name], real[name]) for name in real)):
        recorder.input(fake, x)
    handles = []
    for m in module.modules():
        handles.append(m.register_forward_pre_hook(lambda m, _: recorder.stack.append((recorder.names[m], type(m)))))
        handles.append(m.register_forward_hook(lambda m, *_: recorder.stack.pop() and None))
    with mode, recorder:
        out = torch.func.functional_call(module, own, tuple(fakes))
    for handle in handles:
        handle.remove()
    recorder.graph.output(tree_map(recorder.node_of, out))
    return fx.GraphModule({}, recorder.graph), recorder.inputs
