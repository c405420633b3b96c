"""`Deferred`: a tensor that is computed only when its values are needed.

It stands for the result of a chain of recorded calls. `become` makes those calls and turns the same Python object
into their result, so every holder then has the real tensor. The rest of a program can tell only by time and memory:

- A torch function that is given a deferred tensor receives the real one (`Deferred.__torch_function__`).
- Code below Python (an autograd.Function, an extension) reaches it by dispatch, and in the autograd graph by `Later`.
- The recorded calls run in the gradient and autocast modes that were active when they were recorded.
- Their inputs must not have been written to since. The code that records them watches for writes, and makes the
  tensor real before one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sla2_compile.kernels.torch_internals import autograd_in_dispatch, throw_on_address
from sla2_compile.modules.deferral.likeness import Like, autocast_dtype, tensors
from sla2_compile.passes.sites.rules import Reason

if TYPE_CHECKING:
    from sla2_compile.modules.deferral.scores import Scores

LOCK = threading.RLock()
"""Held while a tensor becomes real, because several threads may hold the same tensor."""


class Origin:
    """One deferred product of queries and keys, and its fate so far.

    Attributes:
        answered: whether a site computed its attention, without the scores.
        needed: whether the scores or the weights themselves were computed.
        planned: the planned call that it belongs to.
        why: the reason to count if they are computed before a site answered.
        tell: called once, when scores or weights are computed.
    """

    __slots__ = ("answered", "needed", "planned", "tell", "why")

    def __init__(self, planned: Any, tell: Callable[[Origin], None]) -> None:
        self.planned, self.tell = planned, tell
        self.answered = self.needed = False
        self.why = Reason.WEIGHTS_USED

    def need(self) -> None:
        """Note that scores or weights are read."""
        if not self.needed:
            self.needed = True
            self.tell(self)


class Recorded:
    """One call that was not made.

    Attributes:
        func, args, kwargs: the call; it takes scores as `args[at]`, or makes the first scores if at is -1.
        scores: what the calls so far, with this one, stand for.
        shape, like: of the result.
        grad, cast: whether gradients were on; autocast's dtype, or None where it was off.
        leaves: the tensors that the calls so far read, with their versions.
        requires: whether one of them needs a gradient.
        origin: the product that the calls start from.
    """

    __slots__ = (
        "args", "at", "cast", "func", "grad", "kwargs", "leaves", "like", "origin", "requires", "scores", "shape",
    )  # fmt: skip

    def __init__(
        self, func: Any, args: Any, kwargs: Any, at: int, scores: Scores, shape: tuple[int, ...], like: Like,
        leaves: Sequence[tuple[Tensor, int]], origin: Origin,
    ) -> None:  # fmt: skip
        self.func, self.args, self.kwargs, self.at, self.scores, self.shape = func, args, kwargs, at, scores, shape
        self.like, self.grad, self.cast = like, torch.is_grad_enabled(), autocast_dtype(like.device)
        mine = [(x, version(x)) for x in tensors(args, kwargs) if type(x) is not Deferred]
        self.leaves = (*leaves, *mine)
        self.requires = self.grad and any(x.requires_grad for x, _ in self.leaves)
        self.origin = origin

    def compute(self) -> Tensor:
        """Make the calls. Intermediate results become real too, so views of views stay views."""
        args, kwargs = real(self.args), real(self.kwargs)
        with (
            torch.set_grad_enabled(self.grad),
            torch.autocast(self.like.device.type, self.cast, enabled=self.cast is not None),
            torch._C.DisableTorchFunction(),
        ):
            result: Tensor = self.func(*args, **kwargs)
        # .contiguous() and .to() may return their argument
        return result.view_as(result) if any(result is x for x in args) else result

    def stale(self) -> bool:
        """Whether an input of the calls was written to since, so that they can no longer be made."""
        return any(version(x) != known for x, known in self.leaves)


def version(x: Tensor) -> int:
    """The number of in-place writes that autograd has counted; 0 for inference tensors, which have no counter."""
    return 0 if x.is_inference() else x._version


def shape_of(func: Any, recorded: Recorded, args: Any, kwargs: Any) -> tuple[int, ...] | None:
    """The result shape of a function that only changes shapes; None if the dtype changes too, or if it raises."""
    blank = torch.empty(recorded.shape, dtype=recorded.like.dtype, device="meta")
    try:
        made = func(blank, *args[1:], **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    return tuple(made.shape) if isinstance(made, Tensor) and made.dtype == blank.dtype else None


METADATA: set[Any] = {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.ndimension, Tensor.__len__,
    Tensor.get_device, Tensor.is_complex, torch.is_floating_point, torch.is_complex, torch.numel, Tensor.nelement,
}  # fmt: skip
"""Functions that read no values."""
for _name in ("shape", "dtype", "device", "ndim", "is_cuda", "layout", "is_nested", "is_meta", "is_sparse"):
    METADATA.add(getattr(Tensor, _name).__get__)
for _name in ("requires_grad", "is_quantized", "is_cpu", "is_mps", "is_xla"):
    METADATA.add(getattr(Tensor, _name).__get__)


class Deferred(Tensor):
    """A tensor that is not computed yet; `recorded` says how to. Made by `defer`."""

    recorded: Recorded

    @staticmethod
    def __new__(cls: type[Deferred], recorded: Recorded) -> Deferred:
        x: Deferred = Tensor._make_wrapper_subclass(
            cls, recorded.shape, dtype=recorded.like.dtype, device=recorded.like.device
        )
        x.recorded = recorded
        throw_on_address(x)
        return x

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return func(*real(args), **real(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # below autograd: this code bypassed __torch_function__. Writes go into the kept tensor, which autograd must
        # know, because code above it may be given the same tensor later
        with autograd_in_dispatch():
            args, kwargs = tree_map_only(Deferred, beside, (args, kwargs or {}))
        args, kwargs = tree_map_only(Tensor, lambda x: x.detach() if x.requires_grad else x, (args, kwargs))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        return real(self).__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return real(self).__reduce_ex__(protocol)


class Later(torch.autograd.Function):
    """The autograd node of a deferred tensor, for code below Python that builds on it."""

    @staticmethod
    def forward(ctx: Any, recorded: Recorded, *leaves: Tensor) -> Tensor:
        ctx.recorded, ctx.leaves = recorded, leaves
        return Deferred(recorded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        check_fresh(ctx.recorded)
        with torch.enable_grad():
            result = ctx.recorded.compute()
        wanted = [x for x in ctx.leaves if x.requires_grad]
        found = iter(
            torch.autograd.grad(
                result, wanted, gradient, allow_unused=True, create_graph=torch.is_grad_enabled(), retain_graph=True
            )
        )
        return (None, *(next(found) if x.requires_grad else None for x in ctx.leaves))


def defer(recorded: Recorded) -> Tensor:
    """Return the deferred tensor that stands for a call's result."""
    if not recorded.requires:
        return Deferred(recorded)
    made: Tensor = Later.apply(recorded, *(x for x, _ in recorded.leaves))
    return made


def is_deferred(x: Any) -> bool:
    """Whether x is a tensor that is still to be computed."""
    return type(x) is Deferred and "kept" not in x.__dict__


def real(x: Any) -> Any:
    """x, a tensor or a nest of arguments, with every deferred tensor in it computed."""
    if isinstance(x, Tensor):
        return become(x) if type(x) is Deferred else x
    if type(x) in (list, tuple):
        return type(x)(real(item) for item in x)
    return {name: real(item) for name, item in x.items()} if type(x) is dict else x


def check_fresh(recorded: Recorded) -> None:
    """Refuse to compute from tensors that were written to.

    Raises:
        RuntimeError: there was such a write; autograd raises the same for tensors that it saved.
    """
    if recorded.stale():
        raise RuntimeError(
            "queries, keys and masks must not be written to in place, below Python, while the attention scores made "
            "of them are in use, got such a write; exclude this module from the recipe (exclude='...')"
        )


def beside(x: Deferred) -> Tensor:
    """Return the real tensor of x, which C++ code holds, so that it cannot be swapped; x keeps it as `kept`."""
    with LOCK:
        if "kept" not in x.__dict__:
            check_fresh(x.recorded)
            x.recorded.origin.need()
            x.__dict__["kept"] = x.recorded.compute()
        kept: Tensor = x.__dict__["kept"]
        return kept


def become(x: Tensor) -> Tensor:
    """Turn a deferred tensor in place into the tensor that it stands for, and return that."""
    with LOCK:
        if type(x) is not Deferred:
            return x
        if "kept" in x.__dict__ or x._use_count() > 1:  # type: ignore[attr-defined]
            return beside(x)
        check_fresh(x.recorded)
        x.recorded.origin.need()
        made = x.recorded.compute()
        if type(made) is not Tensor:
            # the result is another subclass, which x cannot become
            x.__dict__["kept"] = made
            return made
        # as torch.utils.swap_tensors does, but that refuses weak references; here they should see the real tensor
        with torch._C.DisableTorchFunctionSubclass():
            x.__class__, made.__class__ = Tensor, Deferred  # type: ignore[assignment]
            own = {name: value for name, value in x.__dict__.items() if name not in ("recorded", "kept")}
            x.__dict__, made.__dict__ = own, x.__dict__
            torch._C._swap_tensor_impl(x, made)
        return x
