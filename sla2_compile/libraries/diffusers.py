"""`set_diffusers_backend`: SLA2 behind diffusers' own attention dispatcher, one recipe for each model.

    sla2_compile.set_diffusers_backend(pipe.transformer, recipe="balanced")
    sla2_compile.reset_diffusers_backend(pipe.transformer)

diffusers' attention processors pass their `_attention_backend` to `dispatch_attention_fn`, which looks up a function
in a registry. The registry accepts any instance of its enumeration as a name, so ours is an instance that the class
does not list. The enumeration, its names and the process-wide choice stay as they are. The registered function is
diffusers' own for "native", with SLA2 (no learned parameters) in place of its `F.scaled_dot_product_attention` call.
"""

from __future__ import annotations

import functools
import json
import logging
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from sla2_compile.libraries.adapter import Adapter, forget
from sla2_compile.recipes import DEFAULT, Recipe

if TYPE_CHECKING:
    from diffusers.models.attention_dispatch import AttentionBackendName

log = logging.getLogger("sla2_compile")

# slots in use by recipe, as text; one name for each recipe, because compilers guard a name by its identity
_TAKEN: dict[str, Slot] = {}
# slots that are registered and have no recipe yet
_SPARE: list[Slot] = []
# slots registered at a time; every compiled diffusers model guards on their number, so it must seldom change
SPARE = 16
_LOCK = threading.Lock()


def set_diffusers_backend(
    model: nn.Module, recipe: str | Path | Recipe | dict[str, Any] = DEFAULT, **overrides: Any
) -> None:
    """Send the attention calls that model makes through diffusers' dispatcher to SLA2, without learned parameters.

    It works like `model.set_attention_backend`, but leaves the process-wide default alone: other models keep their
    backends, unless they share processor objects. Calls that SLA2 does not take (`passes/sites/rules.py`) run as
    "native". `report(model)` lists both kinds of eager call; compiled code records nothing. Copies and pickles of
    model keep the choice. Processors set afterwards do not have it. If a processor does not pass on the backend that
    it was given (the prefill of Qwen-Image 2.1), its call bypasses SLA2 and is not listed.

    Undo it with `reset_diffusers_backend(model)`. diffusers' own `reset_attention_backend` and
    `set_attention_backend` work too; the report's hooks are then removed at the next eager forward.

    Args:
        model: a diffusers model such as `pipe.transformer`; its calls have q (B, Nq, H, D), k and v (B, Nk, Hk, D).
        recipe, **overrides: as for `transform`, without the fields that select sites by name.

    Raises:
        ImportError: diffusers is not installed, or too old.
        RecipeError: unknown recipe or field.
        TypeError: model is not an nn.Module.
        ValueError: no attention processor of model uses the dispatcher; context parallelism is on; the recipe selects
            sites by name.

    Example:
        >>> sla2_compile.set_diffusers_backend(pipe.transformer, recipe="balanced", topk_ratio=0.1)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}; for a pipeline its transformer")
    name = diffusers_backend(recipe, **overrides)
    modules = _attention_modules(model)
    dispatching = [x for x in modules if _dispatches(x.processor)]
    others = sorted({type(x.processor).__name__ for x in modules if x not in dispatching})
    if not dispatching:
        raise ValueError(
            "model must have attention processors that leave the choice to diffusers' dispatcher, got "
            f"{type(model).__name__} with {', '.join(others) or 'none'}; use sla2_compile.transform"
        )
    for module in dispatching:
        _refuse_parallel(getattr(module.processor, "_parallel_config", None))
    if others:
        log.warning("left as they are, because they bypass diffusers' dispatcher: %s", ", ".join(others))
    for module in dispatching:
        module.processor._attention_backend = name
        _watch(module)


def reset_diffusers_backend(model: nn.Module) -> None:
    """Undo `set_diffusers_backend`: set the library's default, and remove everything of ours from model.

    A model without SLA2, or with another backend, stays as it is.

    Args:
        model: as `set_diffusers_backend`'s.
    """
    for module in model.modules():
        if adapter_of(module) is not None:
            module.processor._attention_backend = None  # type: ignore[union-attr]
        if HOOK in module._forward_pre_hooks:
            _unwatch(module)


def diffusers_backend(
    recipe: str | Path | Recipe | dict[str, Any] = DEFAULT, **overrides: Any
) -> AttentionBackendName:
    """Return the name of SLA2 with this recipe for diffusers' `with attention_backend(name):`.

    In that context the choice holds for every model that has none of its own. `report` lists nothing, because the
    dispatcher does not say which module calls. For one model, use `set_diffusers_backend`. The same recipe gives the
    same name.

    Args:
        recipe, **overrides: as for `transform`, without the fields that select sites by name.

    Raises:
        ImportError: diffusers is not installed, or too old.
        RecipeError: unknown recipe or field.
        ValueError: the recipe selects sites by name.

    Example:
        >>> with diffusers.attention_backend(sla2_compile.diffusers_backend("balanced")):
        ...     image = pipe("a cat").images[0]
    """
    try:
        from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry  # noqa: F401
    except ImportError as error:
        fix = "pip install 'diffusers>=0.36'"
        raise ImportError(f"the dispatcher needs diffusers 0.36 or later, got {error}; {fix}") from error
    chosen = Recipe.of(recipe, **overrides)
    fields = chosen.model_dump(mode="json")
    text = json.dumps(fields, sort_keys=True)
    with _LOCK:
        if text not in _TAKEN:
            adapter = Adapter(chosen, "diffusers' dispatcher")
            if not _SPARE:
                _SPARE.extend(Slot(len(_TAKEN) + i) for i in range(SPARE))
            slot = _SPARE.pop(0)
            slot.adapter = adapter
            # the enumeration's own pickle names a member that the class does not list
            slot.name.__reduce_ex__ = partial(_reduce, fields)
            _TAKEN[text] = slot
        name: AttentionBackendName = _TAKEN[text].name
        return name


class Slot:
    """A name in diffusers' registry, and the adapter behind it once a recipe has taken it."""

    def __init__(self, index: int) -> None:
        from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

        self.adapter: Adapter | None = None
        native = _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE]
        constraints = list(_AttentionBackendRegistry._constraints[AttentionBackendName.NATIVE])

        # with native's signature, from which the dispatcher tells which arguments to pass
        @functools.wraps(native)
        def attention(**kwargs: Any) -> Tensor:
            assert self.adapter is not None
            _refuse_parallel(kwargs.get("_parallel_config"))
            return self.adapter.call(_running(self.name), native, **kwargs)

        self.name: Any = str.__new__(AttentionBackendName, f"sla2_{index}")
        self.name._name_, self.name._value_ = f"SLA2_{index}", f"sla2_{index}"
        _AttentionBackendRegistry.register(self.name, constraints=constraints)(attention)


def _reduce(fields: dict[str, Any], protocol: int) -> tuple[Any, tuple[dict[str, Any]]]:
    return diffusers_backend, (fields,)


def _attention_modules(model: nn.Module) -> list[Any]:
    """The modules that `model.set_attention_backend` looks at."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention, MochiAttention

    classes = (Attention, MochiAttention, AttentionModuleMixin)
    return [x for x in model.modules() if isinstance(x, classes) and getattr(x, "processor", None) is not None]


def _dispatches(processor: Any) -> bool:
    # a processor whose class names a backend takes no other
    own = getattr(type(processor), "_attention_backend", None)
    return own is None and hasattr(processor, "_attention_backend")


def _refuse_parallel(config: Any) -> None:
    if config is not None:
        raise ValueError(
            "diffusers' context parallelism must be off under SLA2, which routes over the whole sequence, got "
            f"{type(config).__name__}; use model.set_attention_backend('native')"
        )


# the dispatcher does not say which module calls; hooks on the attention modules do, in eager mode only
_THREAD = threading.local()
# one hook id for all modules: compiled layers are guarded by it, and would share no code under torch's own ids, which
# count up from 0. Not a number, which another hook could have
HOOK: Any = "sla2_compile"


def _backend(module: nn.Module) -> Any:
    """The backend that is set on a module's processor; read without running other libraries' code, which may fail."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    processor = vars(module).get("processor", module._modules.get("processor"))
    return getattr(processor, "__dict__", {}).get("_attention_backend")


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter of the backend that is set on a module now; None if that is not ours."""
    backend = _backend(module)
    return next((slot.adapter for slot in tuple(_TAKEN.values()) if slot.name is backend), None)


def _running(name: Any) -> nn.Module | None:
    if torch.compiler.is_compiling():
        return None
    stack = _stack()
    module = stack[-1]() if stack else None
    return module if module is not None and _backend(module) is name else None


def _stack() -> list[ReferenceType[nn.Module]]:
    """The watched modules whose forward is running in this thread, the innermost last."""
    if not hasattr(_THREAD, "stack"):
        _THREAD.stack = []
    return _THREAD.stack


def _watch(module: nn.Module) -> None:
    forget(module)
    module._forward_pre_hooks[HOOK] = _enter
    module._forward_hooks[HOOK] = _leave
    module._forward_hooks_always_called[HOOK] = True


def _unwatch(module: nn.Module) -> None:
    forget(module)
    for hooks in (module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called):
        hooks.pop(HOOK, None)


def _enter(module: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    if adapter_of(module) is None:
        # the choice was changed by diffusers' own methods
        if "_attention_backend" not in getattr(getattr(module, "processor", None), "__dict__", {}):
            log.warning("no longer SLA2, because its processor was replaced: %s", type(module).__name__)
        _unwatch(module)
        return
    stack = _stack()
    # torch calls no hooks when KeyboardInterrupt ends a forward: drop its entry, which is not around this one
    while stack and not _is_around(stack[-1](), module):
        stack.pop()
    stack.append(ref(module))


def _is_around(outer: nn.Module | None, module: nn.Module) -> bool:
    return outer is not None and outer is not module and any(x is module for x in outer.modules())


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    # if a compiler ran only one of the two hooks, the top is not what _enter put there
    stack = _stack()
    if stack and stack[-1]() is module:
        stack.pop()
