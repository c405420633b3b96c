"""Find every attention call of a model by running its forward once.

The run is a real one: the model's own Python on real tensors, with gradients off. Fake tensors cost no memory and
little time, but a model that keeps some (tables made on first use, global caches) is broken afterwards. They also
have no values for a forward or a mask to read. So they are used only for models without weights, or on request.
docs/performance.md has both measured.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import _lru_cache_wrapper
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parameter import UninitializedParameter
from torch.overrides import _get_current_function_mode_stack

from sla2_compile.modules.first_backward import FirstBackward, nodes_of
from sla2_compile.modules.frames import returned
from sla2_compile.modules.recording.find import find
from sla2_compile.modules.recording.found import Found
from sla2_compile.modules.recording.record import Recorder
from sla2_compile.modules.restoring.copy_on_write import CopyOnWrite
from sla2_compile.modules.restoring.leave_alone import left_alone, private_copy

CHECKPOINT_FILE = torch.utils.checkpoint.__file__
HOW = ("auto", "real", "fake")


class LeakError(ValueError):
    """The model kept tensors of a fake run where they cannot be removed."""


def discover(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], how: str = "auto") -> Found:
    """Find the attention calls of one forward of model, and leave no trace of it.

    Args:
        args, kwargs: one set of inputs; the forward gets copies.
        how: "real" (one true forward), "fake" (no computation), or "auto": fake for a model on the meta device, else
            real.

    Raises:
        ValueError: the model does not run on these inputs; the cause is chained.
    """
    check_how(how)
    if any(isinstance(p, UninitializedParameter) for p in model.parameters()):
        raise ValueError("the model must have initialized parameters, got a lazy module; run the model once first")
    on_meta = any(p.is_meta for p in model.parameters()) and not _offloads(model)
    if on_meta and how == "real":
        raise ValueError("discover must be 'fake' for a model on the meta device, got 'real'; or load its weights")
    fake = how == "fake" or on_meta
    try:
        return _fake(model, args, kwargs, on_meta) if fake else _real(model, args, kwargs)
    except LeakError:
        raise
    except Exception as error:  # the model's own code may raise anything
        kind = type(model).__name__
        raise ValueError(
            f"example_inputs must run through the model, got {type(error).__name__}: {error}; "
            f"pass what {kind}.forward takes, keywords as example_kwargs. The model was left as it was"
        ) from error


def check_how(how: str) -> None:
    """Raise ValueError for an unknown value of `discover`."""
    if how not in HOW:
        raise ValueError(f"discover must be one of {', '.join(HOW)}, got {how!r}; 'auto' is the default")


def _offloads(model: nn.Module) -> bool:
    """Whether accelerate's hooks load the weights for a forward and keep them on the meta device otherwise."""
    return any("_hf_hook" in module.__dict__ for module in model.modules())


def _real(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Found:
    with left_alone(model, (args, kwargs), largest=sys.maxsize) as writes, torch.no_grad(), _no_autocast_cache():
        args, kwargs = private_copy(args, kwargs)
        return record_forward(model, model, args, kwargs, writes=writes)[0]


def record_forward(
    model: nn.Module,
    run: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    how: str = "real",
    writes: CopyOnWrite | None = None,
    recomputed: FirstBackward | None = None,
) -> Any:
    """Run a forward of model, and return (the attention calls in it, its result).

    Args:
        run: the model, or its original forward.
        writes: remembers what the forward writes to, if that is to be undone.
        recomputed: is given the forward's autograd graph if a checkpoint may compute some of it again.
    """
    recorder = Recorder(model, _inside_checkpoint, contextlib.nullcontext if writes is None else writes.paused)
    before = nodes_of(returned((args, kwargs)))
    active = contextlib.nullcontext() if writes is None else writes.active()
    with (
        torch.compiler.set_stance("force_eager"), recorder.frames.watch(model, recorder.ended), recorder.threads,
        recorder.below, recorder, active,
    ):  # fmt: skip
        output = run(*args, **kwargs)
    if recomputed is not None and recorder.checkpointed:
        recomputed.watch([*recorder.alive(), *returned(output)], before)
    recorded = recorder.finish(output)
    try:
        return find(recorded, how), output
    finally:
        recorder.forget()


@contextlib.contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Keep casts of weights out of autocast's cache: made without gradients, they would spoil later training."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def _fake(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], on_meta: bool) -> Found:
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(x: Tensor) -> Tensor:
        made = mode.from_tensor(x.detach().to("meta") if on_meta else x.detach())
        return made.requires_grad_(x.requires_grad)

    try:
        # under fake tensors, one-element buffers such as a step counter are still updated for real
        with left_alone(model, (args, kwargs), largest=1) as writes, torch.no_grad(), _no_autocast_cache():
            # a forward may change arguments that are not tensors too: a key/value cache, say
            fake_args, fake_kwargs = private_copy(args, kwargs, fake)
            with mode:
                found = record_forward(model, model, fake_args, fake_kwargs, "fake", writes)[0]
            del fake_args, fake_kwargs
        return found
    finally:
        # the frames of an exception in flight hold fake tensors too; those are no leak
        _drop_cached_fakes(mode, refuse=sys.exc_info()[0] is None)


def recording() -> bool:
    """Whether a trial run is under way. A trace is never part of one, because a trial run turns compilers off."""
    if torch.compiler.is_compiling():
        return False
    return any(isinstance(mode, Recorder) for mode in _get_current_function_mode_stack())


def _inside_checkpoint(owner: nn.Module | None) -> bool:
    """Whether the current call is inside a checkpoint that the owner's forward itself made; None: inside any.

    The recomputation of one in the owner's forward would run outside of that, and so without its sites.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == CHECKPOINT_FILE:
            return True
        if owner is not None and frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is owner:
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _drop_cached_fakes(mode: FakeTensorMode, refuse: bool) -> None:
    """Empty every `functools.lru_cache` that the fake run filled with its fake tensors.

    Raises:
        LeakError: refuse is set, and a fake tensor is still alive elsewhere (a global, a closure).
    """
    # the mode itself remembers a fake for each parameter
    mode.fake_tensor_converter = type(mode.fake_tensor_converter)()
    if not _fakes_of(mode):
        return
    ids = {id(x) for x in _fakes_of(mode)}
    # type(x), not isinstance, which runs code of some libraries' lazy objects
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
