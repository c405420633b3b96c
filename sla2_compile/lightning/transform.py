"""`SLA2Callback`: transforms a model of a LightningModule when the Trainer sets it up."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

import sla2_compile
from sla2_compile.kernels.checks import fail
from sla2_compile.lightning.base import Base, log
from sla2_compile.lightning.fields import example_inputs, recipe_of
from sla2_compile.modules.redirect import CHILD
from sla2_compile.plan import plan_of
from sla2_compile.training.optimizer_state import merge_optimizer_state
from sla2_compile.training.qat import prepare


class SLA2Callback(Base):
    """Transforms a model before `configure_model`, a checkpoint's weights and the optimizers.

    The model has SLA2 only under a Trainer with this callback. A script that samples without it computes full
    attention, and loads the checkpoint without the keys of sites only where strict=False: use `sla2_denoiser` there,
    or call `sla2_compile.transform` with the same recipe.

    A copy of the model that exists already, such as an EMA made in `__init__`, would lack the sites. It is refused.

    A checkpoint from before SLA2 is resumed with its weights and the optimizer's moments; the sites begin untrained.

    Args:
        recipe: name of a recipe, or path of a YAML file.
        module: name of the model in the LightningModule, such as "denoiser"; empty for the LightningModule itself.
        example: as `sla2_denoiser` takes it. Without it the LightningModule's `example_input_array` is used, if
            module is empty.
        qat, discover and the fields of `Recipe`: as `sla2_denoiser` takes them.

    Raises (from the Trainer):
        ValueError: there is no such module, no example, a copy without sites; all of `sla2_compile.transform`.
    """

    def __init__(
        self,
        recipe: str = "balanced",
        module: str = "",
        example: list | dict | None = None,
        topk_ratio: float | None = None,
        compression_ratio: float | Literal["block"] | None = None,
        qat: bool | None = None,
        start_layer: int | None = None,
        end_layer: int | None = None,
        feature_map: str | None = None,
        min_seq_len: int | Literal["auto"] | None = None,
        alpha: str | None = None,
        block_q: int | Literal["auto"] | None = None,
        block_k: int | Literal["auto"] | None = None,
        linear_scope: str | None = None,
        low_bit: str | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        overrides: dict[str, dict] | None = None,
        discover: Literal["auto", "fake", "real"] = "auto",
        method: str | None = None,
        proxy_order: int | None = None,
        quantize_linear: str | None = None,
        selection: str | None = None,
        threshold: float | None = None,
        head_ratios: list[float] | None = None,
        protect: list[list] | None = None,
        grid: list[int] | Literal["auto"] | None = None,
        order: str | None = None,
        brick: list | Literal["auto"] | None = None,
    ) -> None:
        super().__init__()
        self.recipe = recipe_of(
            recipe, topk_ratio=topk_ratio, compression_ratio=compression_ratio, qat=qat, start_layer=start_layer,
            end_layer=end_layer, feature_map=feature_map, min_seq_len=min_seq_len, alpha=alpha, block_q=block_q,
            block_k=block_k, linear_scope=linear_scope, low_bit=low_bit, include=include, exclude=exclude,
            overrides=overrides, method=method, proxy_order=proxy_order, quantize_linear=quantize_linear,
            selection=selection, threshold=threshold, head_ratios=head_ratios, protect=protect, grid=grid,
            order=order, brick=brick,
        )  # fmt: skip
        self.module, self.discover, self.qat = module, discover, qat
        self.inputs = None if example is None else example_inputs(example)
        self._hooks: list[Any] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Transform the model, unless it is already by the same recipe."""
        model = self._model(pl_module)
        if plan_of(model) is None:
            self._refuse_copies(pl_module, model)
        known = plan_of(model) is not None
        args, kwargs = self._inputs(pl_module)
        transform = sla2_compile.transform
        transform(model, self.recipe, example_inputs=args, example_kwargs=kwargs, discover=self.discover)
        if not known:
            if self.qat:
                prepare(model)
            log.info("%s", sla2_compile.report(model))

        keys = [key for key in pl_module.state_dict() if CHILD in key.split(".")]
        if keys and stage == "fit":
            self._hooks.append(pl_module.register_load_state_dict_pre_hook(_begin_untrained))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Fit the moments of a checkpoint from before SLA2 to the optimizers, when they are loaded."""

        def merged(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
            mine, theirs = (sum(len(g["params"]) for g in x) for x in (optimizer.param_groups, state["param_groups"]))
            return merge_optimizer_state(optimizer, state, pl_module)[0] if mine > theirs else None

        self._hooks += [optimizer.register_load_state_dict_pre_hook(merged) for optimizer in trainer.optimizers]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _model(self, pl_module: nn.Module) -> nn.Module:
        try:
            return pl_module.get_submodule(self.module)
        except AttributeError:
            names = ", ".join(name for name, _ in pl_module.named_children()) or "none"
            raise fail(
                "module", "be a part of the LightningModule", repr(self.module), f"its parts are {names}"
            ) from None

    def _inputs(self, pl_module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.inputs is not None:
            return self.inputs
        given = None if self.module else getattr(pl_module, "example_input_array", None)
        if given is None:
            raise fail(
                "example",
                "be given",
                None,
                "write the shapes of forward's arguments; see sla2_compile.lightning.sla2_denoiser",
            )
        if isinstance(given, dict):
            return (), given
        return (tuple(given) if isinstance(given, (tuple, list)) else (given,)), {}

    def _refuse_copies(self, pl_module: nn.Module, model: nn.Module) -> None:
        """Refuse a module beside the model that has its class and its parameters' names, so most likely a copy."""
        inside = set(model.modules())
        names = [name for name, _ in model.named_parameters()]
        for name, other in pl_module.named_modules():
            if other in inside or type(other) is not type(model):
                continue
            if [each for each, _ in other.named_parameters()] == names:
                fix = (
                    "transform the model before it is copied: wrap its node in sla2_compile.lightning.sla2_denoiser "
                    "and drop this callback"
                )
                raise fail(self.module or "the LightningModule", "have no copy, such as an EMA", repr(name), fix)


def _begin_untrained(module: nn.Module, state: Any, prefix: str, *rest: Any) -> None:
    """Give a state dict from before SLA2 the values that sites have, which a strict load asks for."""
    mine = module.state_dict(prefix=prefix)
    keys = [key for key in mine if CHILD in key.split(".")]
    if not any(key in state for key in keys):
        log.info("the checkpoint has no values of SLA2's sites: they begin untrained")
        state.update({key: mine[key] for key in keys})
