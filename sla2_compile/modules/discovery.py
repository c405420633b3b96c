"""Finding every attention call of a model by running it once, usually under fake tensors.

A function mode sees each call of `F.scaled_dot_product_attention`; temporary hooks on the model's own modules
tell whose forward makes it. Whatever the run leaves in the model (lazy caches would hold fake tensors) is
put back afterwards.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import _lru_cache_wrapper
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.nn.parameter import UninitializedParameter
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._pytree import tree_map_only

from sla2_compile.modules.leave_alone import left_alone, private_copy
from sla2_compile.passes.multihead import function as multihead
from sla2_compile.passes.sites.call import AttentionCall, bind
from sla2_compile.passes.sites.masks import same_for_all_queries
from sla2_compile.passes.sites.outcome import Where
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.passes.sites.select import SeenCall

# owners that run whatever children they have: sites would be one of them
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
CHECKPOINT_FILE = torch.utils.checkpoint.__file__
SOFTMAX = (torch.softmax, F.softmax, Tensor.softmax)


class LeakError(ValueError):
    """The model kept tensors of a trial run where they cannot be taken back from."""


# arguments of a module's forward, by its name
Inputs = dict[str, tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Discovery:
    """What one forward showed.

    Attributes:
        seen: the attention calls, in order.
        how: "fake" or "real".
        inputs: what the modules around softmaxes written by hand were called with (fake tensors, if fake).
    """

    seen: list[SeenCall]
    how: str
    inputs: Inputs


def discover(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], how: str = "auto") -> Discovery:
    """Find the attention calls of one forward of model.

    Args:
        args, kwargs: one set of inputs; only shapes and dtypes matter under fake tensors.
        how: "fake" (no computation), "real" (one true forward), or "auto": fake, and real if that fails or shows
            masks over queries, which some libraries build only while they are traced (in eager they pass is_causal).

    Raises:
        ValueError: the model does not run on these inputs; the cause is chained.
    """
    if how not in ("auto", "fake", "real"):
        raise ValueError(f"discover must be 'auto', 'fake' or 'real', got {how!r}; 'auto' is the default")
    if any(isinstance(p, UninitializedParameter) for p in model.parameters()):
        raise ValueError("the model must have its parameters, got a lazy module's; run the model once before")
    first: Exception | None = None
    on_meta = any(p.is_meta for p in model.parameters())
    if how != "real":
        try:
            found = _trace_fake(model, args, kwargs, on_meta)
            if how == "fake" or on_meta or not any(_masks_queries(s) for s in found.seen):
                return found
        except LeakError:
            raise
        except Exception as error:  # the model's own code may raise anything; what is left is reported below
            if how == "fake":
                raise _does_not_run(model, error) from error
            first = error
    if on_meta:
        raise _does_not_run(model, first or RuntimeError("a model on the meta device cannot run")) from first
    try:
        with left_alone(model, largest=sys.maxsize), torch.random.fork_rng():
            seen, inputs = _record(model, *private_copy(args, kwargs))
            return Discovery(seen, "real", inputs)
    except Exception as error:  # as above
        raise _does_not_run(model, error) from error


def _does_not_run(model: nn.Module, error: Exception) -> ValueError:
    kind = type(model).__name__
    return ValueError(
        f"example_inputs must run through the model, got {type(error).__name__}: {error}; "
        f"pass what {kind}.forward takes, keywords as example_kwargs. The model was left as it was"
    )


def _masks_queries(seen: SeenCall) -> bool:
    mask = None if seen.call is None else seen.call.attn_mask
    return mask is not None and not same_for_all_queries(mask)


def _trace_fake(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], on_meta: bool) -> Discovery:
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(x: Tensor) -> Tensor:
        made = mode.from_tensor(x.detach().to("meta") if on_meta else x.detach())
        return made.requires_grad_(x.requires_grad)

    seen: list[SeenCall] = []
    inputs: Inputs = {}
    try:
        # fake tensors compute scalars for real, also those of a buffer such as a step counter
        with left_alone(model, largest=1), torch.random.fork_rng(devices=[]):
            # whatever is no tensor may change in a forward as well: a key/value cache, say
            fake_args, fake_kwargs = private_copy(args, kwargs, fake)
            with mode:
                seen, inputs = _record(model, fake_args, fake_kwargs)
            del fake_args, fake_kwargs
        # what is kept is kept as fakes of a mode of its own, so that what is left of this mode is a leak
        keep = FakeTensorMode()
        kept = [s if s.call is None else replace(s, call=_copy(s.call, keep)) for s in seen]
        return Discovery(kept, "fake", tree_map_only(Tensor, lambda x: _blank(x, keep), inputs))
    finally:
        seen, inputs = [], {}
        # the frames of an exception on its way hold fake tensors too: those are no leak
        _drop_cached_fakes(mode, refuse=sys.exc_info()[0] is None)


def _copy(call: AttentionCall, mode: FakeTensorMode) -> AttentionCall:
    mask = None if call.attn_mask is None else _blank(call.attn_mask, mode)
    return replace(call, q=_blank(call.q, mode), k=_blank(call.k, mode), v=_blank(call.v, mode), attn_mask=mask)


def _blank(x: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return made.requires_grad_(x.requires_grad)


def _record(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[SeenCall], Inputs]:
    recorder = Recorder(model)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), recorder.hooks(model), recorder:
        model(*args, **kwargs)
    return list(recorder.seen.values()), recorder.inputs


@dataclass
class Frame:
    """One forward that is running: its module, its arguments, and the attention calls it made so far."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    calls: int = 0


class Recorder(TorchFunctionMode):
    """Records attention calls with their owners.

    Attributes:
        seen: the first call of each (owner, position, what).
        inputs: arguments of the modules around each softmax that may be attention written by hand.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(module): name for name, module in reversed(list(model.named_modules()))}
        # a root whose __call__ is its own may never come through its hooks
        self.frames = [Frame(model, (), {})]
        self.seen: dict[tuple[str, int, str], SeenCall] = {}
        self.inputs: Inputs = {}

    @contextlib.contextmanager
    def hooks(self, model: nn.Module) -> Iterator[None]:
        """Watch the model's own modules, and only them, while this context lasts."""
        handles = []
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.frames.append(Frame(module, args, kwargs))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.frames.pop()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._see("attention", None, bind(*args, **kwargs))
        elif func is F.multi_head_attention_forward:
            given = multihead.arguments(args, kwargs)
            reason = multihead.why_whole(given)
            self._see("attention", reason, None if reason else multihead.inner_call(given))
        elif func in SOFTMAX and args and _is_score_map(args, kwargs):
            self._see("softmax", Reason.HAND_WRITTEN, None)
        return func(*args, **kwargs)

    def _see(self, what: str, reason: Reason | None, call: Any) -> None:
        frame = self.frames[-1]
        owner = self.names[id(frame.module)]
        index = frame.calls if what == "attention" else 0
        if what == "attention":
            frame.calls += 1
        key = (owner, index, what)
        old = self.seen.get(key)
        times = 1 if old is None else old.where.times + 1
        if call is not None:
            if isinstance(frame.module, CONTAINERS):
                reason = Reason.CONTAINER
            elif _inside_checkpoint(frame.module):
                reason = Reason.CHECKPOINT
            # of several calls at one position the longest says what the site is for
            longer = old is None or old.call is None or call.q.shape[-2:].numel() > old.call.q.shape[-2:].numel()
            if longer:
                self.seen[key] = SeenCall(Where.of(owner, index, call, times), call, reason)
                return
        if old is not None:
            self.seen[key] = replace(old, where=replace(old.where, times=times))
            return
        # the softmax may be a module of its own, and its two products stand in the module around it
        around = list(reversed(self.frames[-3:])) if what == "softmax" else []
        names = tuple(self.names[id(f.module)] for f in around)
        for name, f in zip(names, around, strict=True):
            self.inputs.setdefault(name, (f.args, f.kwargs))
        self.seen[key] = SeenCall(Where(owner, index, (), (), (), "", ""), None, reason, "", names)


def recording() -> bool:
    """Whether a trial run is under way; compilers are off in one."""
    if torch.compiler.is_compiling():
        return False
    return any(isinstance(mode, Recorder) for mode in _get_current_function_mode_stack())


def _inside_checkpoint(owner: nn.Module) -> bool:
    """Whether the running call stands in a checkpoint that the owner's forward itself made.

    Its recomputation would run outside of the owner's forward, and so without its sites.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == CHECKPOINT_FILE:
            return True
        if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is owner:
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _is_score_map(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """A softmax over the last axis of (..., Nq, Nk) with both long enough to be tokens."""
    x, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim")
    last = dim in (-1, x.dim() - 1)
    return bool(last and x.dim() >= 3 and min(x.shape[-1], x.shape[-2]) >= 16)


def _drop_cached_fakes(mode: FakeTensorMode, refuse: bool) -> None:
    """Empty every `functools.lru_cache` that the fake run filled with its fake tensors.

    Raises:
        LeakError: a fake tensor stays alive elsewhere (a global, a closure), if refuse.
    """
    # the mode itself remembers a fake for each parameter
    mode.fake_tensor_converter = type(mode.fake_tensor_converter)()
    if not _fakes_of(mode):
        return
    ids = {id(x) for x in _fakes_of(mode)}
    # by type and not isinstance: asking some libraries' lazy objects for their class has side effects
    for cache in [x for x in gc.get_objects() if type(x) is _lru_cache_wrapper]:
        if _reaches(cache, ids, depth=4):
            cache.cache_clear()
    left = _fakes_of(mode) if refuse else []
    if left:
        holders = sorted({type(x).__name__ for x in gc.get_referrers(*left) if x is not left} - {"frame"})
        raise LeakError(
            f"the model must not keep tensors outside its modules, got {len(left)} fake ones held by "
            f"{', '.join(holders)}, where they stay; build the model again and pass discover='real'"
        )


def _fakes_of(mode: FakeTensorMode) -> list[FakeTensor]:
    gc.collect()
    return [x for x in gc.get_objects() if type(x) is FakeTensor and x.fake_mode is mode]


def _reaches(holder: Any, ids: set[int], depth: int) -> bool:
    """Whether a container leads to one of these objects through plain containers."""
    inside = gc.get_referents(holder)
    if any(id(x) in ids for x in inside):
        return True
    return depth > 0 and any(_reaches(x, ids, depth - 1) for x in inside if type(x) in (tuple, list, dict))
