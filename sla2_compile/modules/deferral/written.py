"""Hand-written attention in an owner's eager forward: its own Python runs, and only the attention is replaced.

The products that planning recognised are deferred (`deferred.py`), and so are the calls after them, as long as they
are steps of attention (`scores.py`). Where the weights multiply the values, the site answers, and the scores are
never computed. Any other use of scores or weights computes them, and the owner's code goes on unchanged.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sla2_compile.modules.calls import OwnerMode, RedirectAttention
from sla2_compile.modules.deferral.deferred import (
    METADATA,
    Deferred,
    Origin,
    Recorded,
    defer,
    is_deferred,
    real,
    shape_of,
    version,
)
from sla2_compile.modules.deferral.likeness import Like, like_of, tensors
from sla2_compile.modules.deferral.operands import FOLLOWED, Operands
from sla2_compile.modules.deferral.scores import (
    CASTS,
    DROPOUTS,
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
from sla2_compile.modules.deferral.watch import Watch, chain, storage
from sla2_compile.modules.deferral.writes import written as written_by
from sla2_compile.modules.deferral.written_call import call_of
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.passes.sites.site import Site
from sla2_compile.passes.sites.sites import Sites, site_at

SDPA = F.scaled_dot_product_attention
PLAIN = (Tensor, nn.Parameter)
READ_BACK = (
    "the attention weights of {} were read although SLA2 answered its call: the weights are exact, the output is not "
    "made of them; exclude the module (exclude='...') or transform the model with such inputs as example_inputs"
)


class Written(NamedTuple):
    """One hand-written attention call of an owner.

    Attributes:
        site: key of its site among the owner's.
        heads: heads of q, for products with one batch axis.
    """

    site: int
    heads: int


class DeferAttention(Watch, OwnerMode):
    """Runs an owner's forward in eager mode, and replaces its hand-written attention calls.

    Args:
        name: of the owner, for warnings.
        written: its hand-written calls, by the number of their product of queries and keys. All products with batch
            axes (`scores.is_batched`) of one forward are numbered in order.
        calls: handles the owner's calls of attention functions.
    """

    def __init__(self, name: str, sites: Sites, written: dict[int, Written], calls: RedirectAttention) -> None:
        super().__init__()
        self.name, self.sites, self.written, self.calls = name, sites, written, calls
        self.product = 0
        self.operands = Operands(weakref.ref, version)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():
            # in a compiled function that the owner calls: planning left products in there as they are
            self.met = self.met or func is SDPA
            return self.calls.__torch_function__(func, types, args, kwargs)
        kwargs, number = kwargs or {}, -1
        if func in PRODUCTS and is_batched(func, args, kwargs):
            number, self.product = self.product, self.product + 1
            if Deferred in types:
                done = self._values(func, args, kwargs)
            else:
                done = self._scores(number, func, args, kwargs) if number in self.written else None
            if done is not None:
                return done
        elif Deferred in types:
            if func in METADATA:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            done = self._follow(func, args, kwargs)
            if done is not None:
                return done
        if Deferred in types:
            if func in DROPOUTS and is_deferred(args[0] if args else None):
                args[0].recorded.origin.why = Reason.DROPOUT
            args, kwargs = real(args), real(kwargs)
        self.before(func, args, kwargs)
        if self.operands.made and (into := written_by(func, args, kwargs)) is not None:
            self.operands.forget({storage(x) for x in tensors(into)})
        result = self.calls.__torch_function__(func, types, args, kwargs)
        if number in self.written and self.calls.sightings is not None:
            # its site has counted it
            self.calls.sightings.forget(result)
        self.met = self.met or self.calls.met
        if func in FOLLOWED:
            self.operands.see(func, args, kwargs, result)
        return result

    # the product of queries and keys

    def _scores(self, number: int, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """Defer a planned product, or return None."""
        planned = self.written[number]
        self.met = True
        site, product = self._site(planned.site), read_product(func, args, kwargs)
        reason = self._unsteady()
        if product is None or type(product.left) not in PLAIN or type(product.right) not in PLAIN:
            reason = reason or Reason.UNSEEN
        like = like_of(func, args, kwargs) if reason is None else None
        if product is None or like is None:
            site.count(reason or Reason.UNSEEN)
            return None
        left, right = product.left, product.right
        shape = (*torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]), left.shape[-2], right.shape[-1])
        scores = scores_of(product, shape)
        call = None if scores is None else call_of(scores, shape, None, planned.heads)
        reason = Reason.UNSEEN if call is None else site.decide(call)[1]
        if scores is None or (reason is not None and reason is not Reason.DTYPE):
            # the dtype may be settled only when v is known
            site.count(reason or Reason.UNSEEN)
            return None
        if not self.steady((left, right)):
            site.count(Reason.EXPOSED)
            return None
        origin = Origin(planned, lambda it: self._needed(site, it))
        return self._defer(Recorded(func, args, kwargs, -1, scores, shape, like, (), origin))

    def _needed(self, site: Site, origin: Origin) -> None:
        """Count a read of scores or weights; warn of the first one after the site answered."""
        if not origin.answered:
            site.count(origin.why)
        elif site.count_read_back() == 1:
            warnings.warn(READ_BACK.format(self.name), stacklevel=2)

    def _unsteady(self) -> Reason | None:
        """Why a call must not be deferred out of its present context, or None."""
        if self.calls.in_checkpoint():
            return Reason.CHECKPOINT
        return None if torch._C._functorch.peek_interpreter_stack() is None else Reason.TRANSFORMED

    def _defer(self, recorded: Recorded) -> Tensor:
        x = defer(recorded)
        self.live.append(weakref.ref(x))
        return x

    def _site(self, index: int) -> Site:
        return site_at(self.sites, index)

    # the calls that follow it

    def _follow(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """Defer a call that takes one deferred tensor, or return None."""
        found = [x for x in tensors(args, kwargs) if type(x) is Deferred]
        at = next((i for i, x in enumerate(args) if type(x) is Deferred), None)
        if len(found) != 1 or at is None or not is_deferred(args[at]):
            return None
        old, plain = args[at].recorded, IN_PLACE.get(func, func)
        if old.grad != torch.is_grad_enabled():
            return None
        like: Like | None = old.like
        shape: tuple[int, ...] | None = old.shape
        scores: Scores | None = None
        if _returns_itself(plain, old, args, kwargs):
            return args[at] if at == 0 else None
        if plain in SHAPES:
            shape = shape_of(plain, old, args, kwargs)
            scores = None if shape is None else regrouped(old.scores, old.shape, shape)
        else:
            scores = follow(old.scores, plain, at, args, kwargs, len(old.shape))
            like = None if scores is None else like_of(plain, args, kwargs)
        if shape is None or scores is None or like is None or like.device != old.like.device:
            return None
        if any(not _fits(mask.tensor.shape, shape) for mask in scores.masks[len(old.scores.masks) :]):
            return None
        if plain is func:
            return self._defer(Recorded(func, args, kwargs, at, scores, shape, like, old.leaves, old.origin))
        return self._follow_write(plain, args, kwargs, scores, like) if at == 0 else None

    def _follow_write(self, func: Any, args: Any, kwargs: Any, scores: Scores, like: Like) -> Tensor | None:
        """Let the same object stand for the result of an in-place function, or return None."""
        x: Deferred = args[0]
        old = x.recorded
        # a view shares its memory with the scores that it was made of, and those made of x read x
        others = old.func in SHAPES or any(any(x is z for z in chain(y.recorded)) for y in self.alive())
        if others or like != old.like or x._use_count() > 1:  # type: ignore[attr-defined]
            return None
        before = self._defer(old)
        made = defer(Recorded(func, (before, *args[1:]), kwargs, 0, scores, old.shape, like, old.leaves, old.origin))
        with torch._C.DisableTorchFunctionSubclass():
            torch._C._swap_tensor_impl(x, made)
        x.__dict__, made.__dict__ = made.__dict__, x.__dict__
        self.live.append(weakref.ref(x))
        return x

    # the product of weights and values

    def _values(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """Answer the product of deferred weights with values, or return None."""
        product = read_product(func, args, kwargs)
        if product is None or not is_deferred(product.left) or not _only_multiplies(product):
            return None
        recorded: Recorded = product.left.recorded  # type: ignore[attr-defined]
        v, planned = product.right, recorded.origin.planned
        like = like_of(func, args, kwargs)
        if not recorded.scores.soft or recorded.grad != torch.is_grad_enabled() or recorded.stale() or like is None:
            return None
        if type(v) not in PLAIN or v.dim() != len(recorded.shape) or v.shape[-2] != recorded.shape[-1]:
            return None
        site, reason = self._site(planned.site), self._unsteady()
        call = call_of(self.operands.behind(recorded.scores, v.dtype), recorded.shape, v, planned.heads)
        if call is not None and reason is None:
            call = call.in_one_dtype()
            reason = site.decide(call)[1]
        if call is None or reason is not None:
            site.count(reason or Reason.UNSEEN)
            recorded.origin.needed = True
            return None
        recorded.origin.answered = True
        o = self.sites(planned.site, SDPA, *call.as_arguments(), written=True)
        o = o.contiguous().reshape(*recorded.shape[:-1], v.shape[-1]).to(like.dtype)
        return o if product.order is None else o.permute(product.order)


def _returns_itself(func: Any, old: Recorded, args: Any, kwargs: Any) -> bool:
    """Whether a cast or `contiguous` returns the scores that it is given, because nothing changes."""
    if func is not Tensor.contiguous and func not in CASTS:
        return False
    plain = not kwargs.get("copy") and kwargs.get("memory_format") is None and not any(x is True for x in args[1:])
    return plain and like_of(func, args, kwargs) == old.like


def _fits(small: Any, big: Any) -> bool:
    """Whether a shape broadcasts to another one."""
    return len(small) <= len(big) and all(a in (1, b) for a, b in zip(reversed(small), reversed(big), strict=False))


def _only_multiplies(product: Product) -> bool:
    return product.bias is None and product.scale == 1.0
