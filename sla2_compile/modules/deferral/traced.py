"""Hand-written attention in a trace: traced as it is, and replaced where weights multiply the values.

Traces are those of torch.compile, torch.export and torch.jit.trace. What a program computes while it is traced does
not matter, so nothing needs to be deferred. What scores stand for is remembered beside them. Once
the site has answered, the scores are dead code, which every compiler removes; torch.export's own program keeps it.

Function modes do not see every write in a trace (`torch._foreach_*` is missing in torch 2.13). Planning, which runs
in eager mode, refuses owners that write to queries, keys or masks before that product.

A graph break ends what is known. The mode stays active while the finished part runs and while code runs that Dynamo
skips. Nothing tells the two apart, so calls there may be new and may write to tensors. They must not change the
tables either, because compiled code has checked them by then and reads them afterwards. They only set a flag.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sla2_compile.modules.calls import OwnerMode, RedirectAttention
from sla2_compile.modules.deferral.operands import FOLLOWED, Operands
from sla2_compile.modules.deferral.scores import (
    IN_PLACE,
    PRODUCTS,
    SHAPES,
    Product,
    Scores,
    follow,
    is_batched,
    read_product,
    regrouped,
    scores_of,
)
from sla2_compile.modules.deferral.written import Written
from sla2_compile.modules.deferral.written_call import call_of
from sla2_compile.passes.sites.sites import Sites, site_at

WRITERS = ("setitem", "__setitem__", "iadd", "isub", "imul", "itruediv", "ipow", "__iadd__", "__isub__", "__imul__")

METADATA = ("size", "dim", "numel", "ndimension", "nelement", "is_floating_point", "get_device", "__get__", "__len__")


def in_trace() -> bool:
    """Whether a compiler, torch.export or torch.jit.trace follows the code that runs now."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def writes(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a function may write to a tensor, judged by its name and arguments; a trace cannot read its schema."""
    name = getattr(func, "__name__", "")
    in_place = name in WRITERS or (name[-1:] == "_" and name[-2:] != "__")
    # a positional True may be inplace
    flags = [x for x in args[1:] if x is True]
    return in_place or "out" in kwargs or "inplace" in kwargs or len(flags) > 0


class TraceAttention(OwnerMode):
    """Runs an owner's forward in a trace, and replaces its hand-written attention calls.

    Args: as in `DeferAttention`.

    Attributes:
        broken: whether a call under this mode ran outside of a trace, so that what was known may be out of date.
    """

    def __init__(self, sites: Sites, written: dict[int, Written], calls: RedirectAttention) -> None:
        super().__init__()
        self.sites, self.written, self.calls = sites, written, calls
        self.product = 0
        self.broken = False
        # tensors, and for each what is known of it: (scores, planned call)
        self.tensors: list[Tensor] = []
        self.known: list[tuple[Scores, Written]] = []
        self.operands = Operands(_held, _unversioned)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if not in_trace():
            self.broken = True
        if self.broken:
            return self.calls.__torch_function__(func, types, args, kwargs)
        if func in PRODUCTS:
            if is_batched(func, args, kwargs):
                number = self.product
                self.product = number + 1
                return self._product(number, func, args, kwargs)
            return func(*args, **kwargs)
        at, known = self._among(args)
        result = self.calls.__torch_function__(func, types, args, kwargs)
        self.met = self.met or self.calls.met
        if known is not None and isinstance(result, Tensor):
            self._follow(func, at, known, args, kwargs, result)
        elif known is not None and getattr(func, "__name__", "") not in METADATA:
            # scores or weights are used in another way, such as by a hook on their gradient
            self.tensors, self.known = [], []
        elif writes(func, args, kwargs):
            # it may write to what scores were made of
            self.tensors, self.known, self.operands.made = [], [], []
        elif func in FOLLOWED:
            self.operands.see(func, args, kwargs, result)
        return result

    def _among(self, args: Any) -> tuple[int, tuple[Scores, Written] | None]:
        """Index of the first known tensor among the arguments, and what is known of it; (-1, None) without one."""
        for at, x in enumerate(args[:3]):
            for i, tensor in enumerate(self.tensors):
                if tensor is x:
                    return at, self.known[i]
        return -1, None

    def _keep(self, x: Tensor, scores: Scores | None, planned: Written) -> None:
        if scores is not None:
            self.tensors.append(x)
            self.known.append((scores, planned))

    def _product(self, number: int, func: Any, args: Any, kwargs: Any) -> Any:
        product = read_product(func, args, kwargs)
        if product is None:
            return func(*args, **kwargs)
        _, known = self._among((product.left,))
        if known is not None:
            answer = self._values(known, product, func, args, kwargs)
            return func(*args, **kwargs) if answer is None else answer
        result = func(*args, **kwargs)
        for planned, written in self.written.items():
            # after a graph break the number may be symbolic, and a dict finds no symbol
            if planned == number:
                self.met = True
                self._keep(result, scores_of(product, result.shape), written)
        return result

    def _follow(self, func: Any, at: int, known: Any, args: Any, kwargs: Any, result: Tensor) -> None:
        scores, planned = known
        old, rank = args[at].shape, args[at].dim()
        if func in SHAPES:
            new = regrouped(scores, old, result.shape)
            self._keep(result, new, planned)
            return
        plain = IN_PLACE.get(func, func)
        new = follow(scores, plain, at, args, kwargs, rank)
        if writes(func, args, kwargs):
            # views of the written tensor, and tensors made of it before, are no longer known
            self.tensors, self.known = [], []
        if new is None:
            self.tensors, self.known = [], []
        elif plain is func or at == 0:
            self._keep(result, new, planned)

    def _values(self, known: Any, product: Product, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        scores, planned = known
        if not scores.soft or product.bias is not None or product.scale != 1.0:
            return None
        v, shape = product.right, product.left.shape
        if torch.jit.is_tracing() and v.shape[:-2] == shape[:-2]:
            # in torch.jit.trace a size that is read is part of the program, and would keep the weights alive
            shape = torch.Size((*v.shape[:-2], scores.left.shape[-2], v.shape[-2]))
        call = call_of(self.operands.behind(scores, v.dtype), shape, v, planned.heads)
        if call is None:
            return None
        call = call.in_one_dtype()
        site = site_at(self.sites, planned.site)
        _, reason = site.decide(call)
        if reason is not None:
            site.count(reason)
            return None
        o = self.sites(planned.site, F.scaled_dot_product_attention, *call.as_arguments(), written=True)
        o = o.contiguous().reshape(*shape[:-1], v.shape[-1])
        if not torch.is_autocast_enabled(v.device.type):
            o = o.to(v.dtype)
        return o if product.order is None else o.permute(product.order)


def _held(x: Tensor) -> Any:
    return lambda: x


def _unversioned(x: Tensor) -> int:
    # a write makes a trace forget everything
    return 0
