"""`Recipe`: every choice that SLA2 leaves to the user. Validated, frozen, and saved as YAML."""

from __future__ import annotations

from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from sla2_compile.recipes.errors import RecipeError, explain, nearest
from sla2_compile.recipes.places import as_tuples, check_places

DEFAULT = "balanced"

SITE_FIELDS = (
    "topk_ratio", "compression_ratio", "block_q", "block_k", "feature_map",
    "alpha", "linear_scope", "low_bit", "qat", "min_seq_len", "method", "proxy_order",
    "selection", "threshold", "head_ratios", "protect", "grid", "order", "brick",
)  # fmt: skip
"""Fields that may differ between sites (`overrides`). The other fields choose the sites."""


Ratio = Annotated[float, Field(gt=0, le=1)]
Brick = tuple[int, int, int]


class Recipe(BaseModel):
    """How a model's attention becomes SLA2.

    Attributes:
        name: shown in reports.
        topk_ratio: share of the key blocks that the sparse branch computes exactly, in (0, 1]. Usually 0.05 to 0.30.
        compression_ratio: tokens averaged into one router token. A power of two, usually 4 to 16, or "block" (one
            router token per block, as in the paper).
        block_q, block_k: rows of a query block and of a key block. Powers of two from 8 to 256, or "auto" (by
            length).
        feature_map: phi of the linear branch: softmax (the paper's), elu (elu + 1) or relu.
        alpha: where the mix of the branches comes from: routed (the router's estimate, scaled per head), head (one
            learned value per head) or block (one per query block, the paper's; for one sequence length only).
        linear_scope: keys of the linear branch: complement (those that the sparse branch skips, the paper's) or all.
        low_bit: number format of the sparse branch in inference: none, int8 (INT8 QK), int8_fp8 (INT8 QK and FP8 PV),
            or auto (int8 where that was measured to be faster and close to bf16). A GPU without FP8 runs int8.
            Training and CPUs use the input's dtype. The report says what runs.
        qat: whether `prepare` makes the sites imitate low_bit, in training and in inference (auto is imitated as
            int8). Until `prepare` is called it has no effect, and never if low_bit is none.
        quantize_linear: number format of the Linear layers around the sites: none, or int8. `prepare` then has
            torchao make them imitate int8 weights and activations, and `convert` has them compute so. Whether the
            sites do is another matter (qat, low_bit). include and exclude choose the layers, by their names or those
            of the modules around them.
        start_layer, end_layer: replace attention in layers start_layer <= i < end_layer; end_layer None means up to
            the last. Layers are counted in the order in which a forward reaches them. A start_layer equal to their
            number leaves the model as it is, with a warning, so that a sweep may end with full attention.
        include, exclude: patterns of owner names, such as "blocks.*.attn", with shell wildcards. exclude wins. With
            quantize_linear they may name Linear layers too.
        overrides: field values for some sites, by patterns of owner names. Later patterns win.
        method: what takes the place of full attention: sla2, or a rival with the same topk_ratio and blocks. proxy
            has one pooled term of the softmax for each key block that is not selected (Sol-Attn, PISA); topk has
            nothing for them; sla is SLA (arXiv 2509.24006), vsa VSA (2505.13389) and vmoba VMoBA (2506.23858).
            `kernels/methods.py` says what each is made of.
        proxy_order: of method proxy: 1, or 2 to count the spread of a block's keys too.
        selection: topk keeps the topk_ratio best key blocks of each query block; threshold keeps those of them whose
            router score is `threshold` standard deviations above the row's mean (Sol-Attn), and the best.
        threshold: a number; None is 1. With method vmoba, which keeps the best chunks until they have a share of the
            normalised gates, that share; None is 0.25.
        head_ratios: a topk_ratio for each head, in place of the one for all.
        protect: ranges [start, stop] of tokens, such as a text prefix or registers, that every query sees, and whose
            own queries see every key where q and k are the same tokens. Negative numbers count from the end, and a
            stop of None (null) is the end.
        grid: (T, H, W), the sides of the video or image whose tokens stand row by row, without protected tokens in
            front of it and behind it; an image has T = 1. "auto" is a square image.
        order: how the grid's tokens are cut into blocks: raster (as they come), brick or hilbert. Each call is
            permuted and its result permuted back; a model that does so itself has the blocks for nothing
            (`token_order`). vsa and vmoba order their cubes and chunks themselves, if there is a grid.
        brick: sides (T, H, W) of a brick, -1 for a whole axis, or several bricks, which take turns over the layers.
            "auto" is 64 tokens: 4 x 4 x 4, or 1 x 8 x 8 in an image; vmoba's chunks have sides of their own.
        min_seq_len: calls with fewer queries or keys keep full attention. "auto" goes by what was
            measured on the device: by tokens, by work (B Hq Nq Nk D), and in training steps by higher numbers.

    Raises:
        RecipeError: a field is unknown, a value is out of range, or fields contradict each other.

    Example:
        >>> Recipe.of("balanced", topk_ratio=0.2).topk_ratio
        0.2
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    name: str = "custom"
    topk_ratio: float = Field(default=0.15, gt=0, le=1)
    compression_ratio: int | Literal["block"] = 8
    block_q: int | Literal["auto"] = "auto"
    block_k: int | Literal["auto"] = "auto"
    feature_map: Literal["softmax", "elu", "relu"] = "softmax"
    alpha: Literal["routed", "head", "block"] = "routed"
    linear_scope: Literal["complement", "all"] = "complement"
    low_bit: Literal["none", "auto", "int8", "int8_fp8"] = "auto"
    qat: bool = True
    quantize_linear: Literal["none", "int8"] = "none"
    start_layer: int = Field(default=0, ge=0)
    end_layer: int | None = Field(default=None, ge=1)
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    overrides: dict[str, dict[str, Any]] = Field(default_factory=dict)
    min_seq_len: int | Literal["auto"] = "auto"
    method: Literal["sla2", "sla", "proxy", "topk", "vsa", "vmoba"] = "sla2"
    proxy_order: Literal[1, 2] = 1
    selection: Literal["topk", "threshold"] = "topk"
    threshold: float | None = None
    head_ratios: tuple[Ratio, ...] = ()
    protect: tuple[tuple[int, int | None], ...] = ()
    grid: tuple[int, int, int] | Literal["auto"] | None = None
    order: Literal["raster", "brick", "hilbert"] = "raster"
    brick: Brick | tuple[Brick, ...] | Literal["auto"] = "auto"

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise explain(error, type(self).model_fields) from None

    @field_validator("compression_ratio", "block_q", "block_k", mode="before")
    @classmethod
    def _power_of_two(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, float) and value.is_integer():
            # 8.0, as configurations have it that declare a float
            value = int(value)
        word, low, fix = "auto", 8, "long sequences take 128 and 64, or leave it 'auto'"
        if info.field_name == "compression_ratio":
            word, low, fix = "block", 1, "usual are 4, 8 and 16"
        if value == word or (type(value) is int and low <= value <= 256 and not value & (value - 1)):
            return value
        rule = f"be {word!r} or a power of two from {low} to 256"
        raise ValueError(f"{info.field_name} must {rule}, got {value!r}; {fix}")

    @field_validator("min_seq_len", mode="before")
    @classmethod
    def _length(cls, value: Any) -> Any:
        if value == "auto" or (type(value) is int and value >= 0):
            return value
        raise ValueError(
            f"min_seq_len must be 'auto' or an int of at least 0, got {value!r}; 0 replaces every length"
        )

    @field_validator("protect", "grid", "brick", mode="before")
    @classmethod
    def _places(cls, value: Any, info: ValidationInfo) -> Any:
        return as_tuples(info.field_name or "", value)

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _one_pattern(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.end_layer is not None and self.end_layer <= self.start_layer:
            got = f"{self.end_layer} with start_layer {self.start_layer}"
            raise ValueError(f"end_layer must be greater than start_layer, got {got}; no layer would be left")
        if not self.include:
            raise ValueError("include must name at least one pattern, got none; '*' takes every attention call")
        for block in (self.block_q, self.block_k):
            r = self.compression_ratio
            if isinstance(block, int) and isinstance(r, int) and r > block:
                raise ValueError(
                    f"compression_ratio must not exceed the block sizes, got {r} with a block of {block}; "
                    "use 'block' for one router token a block"
                )
        check_places(self)
        for pattern, values in self.overrides.items():
            for key in values:
                if key not in SITE_FIELDS:
                    hint = f"{nearest(key, SITE_FIELDS)}allowed: {', '.join(SITE_FIELDS)}"
                    raise ValueError(f"overrides[{pattern!r}] must hold per-site fields, got {key!r}; {hint}")
            # the merged recipe is validated like any other, so that a bad override fails here, not in a forward
            plain = self.model_dump(exclude={"overrides"})
            try:
                Recipe(**{**plain, **values})
            except RecipeError as error:
                raise ValueError(f"overrides[{pattern!r}]: {error}") from None
        return self

    @property
    def bricks(self) -> tuple[Brick, ...]:
        """The bricks that are given, one or several."""
        given: tuple[Any, ...] = () if self.brick == "auto" else self.brick
        return given if not given or isinstance(given[0], tuple) else (given,)

    def brick_of(self, layer: int) -> Brick | Literal["auto"]:
        """Return the brick of a layer."""
        return self.bricks[layer % len(self.bricks)] if self.bricks else "auto"

    def for_site(self, owner: str) -> Recipe:
        """Return the recipe of one site: this recipe with every matching override applied, in order."""
        values = {k: v for pattern, o in self.overrides.items() if fnmatchcase(owner, pattern) for k, v in o.items()}
        return Recipe(**{**self.model_dump(exclude={"overrides"}), **values}) if values else self

    def selects(self, owner: str) -> bool:
        """Return whether include and exclude select this owner."""
        if any(fnmatchcase(owner, pattern) for pattern in self.exclude):
            return False
        return any(fnmatchcase(owner, pattern) for pattern in self.include)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from a YAML file.

        Raises:
            FileNotFoundError: there is no such file.
            RecipeError: the file holds no YAML mapping or no valid recipe. The message names the file.
        """
        path = Path(path)
        try:
            return cls._parse(path.read_text(encoding="utf-8"), path.stem)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from None

    @classmethod
    def _parse(cls, text: str, name: str) -> Recipe:
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"recipe file must be YAML, got {error}; see recipes/balanced.yaml") from None
        if not isinstance(values, dict):
            kind = type(values).__name__
            raise RecipeError(f"recipe file must hold a mapping of fields, got {kind}; see recipes/balanced.yaml")
        return cls(**{"name": name, **values})

    def save(self, path: str | Path) -> None:
        """Write every field to a YAML file. `Recipe.load` reads it back as an equal recipe."""
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def named(cls, name: str) -> Recipe:
        """Return a recipe that comes with the package.

        Raises:
            RecipeError: there is no such name. The message lists the names and suggests the nearest.
        """
        if name not in recipe_names():
            hint = f"{nearest(name, recipe_names())}give a path for a recipe file of your own"
            raise RecipeError(f"recipe must be one of {', '.join(recipe_names())}, got {name!r}; {hint}")
        file = resources.files("sla2_compile.recipes") / f"{name}.yaml"
        return cls._parse(file.read_text(encoding="utf-8"), name)

    @classmethod
    def of(cls, recipe: str | Path | Recipe | dict[str, Any] = DEFAULT, **fields: Any) -> Recipe:
        """Return a Recipe made from a name, the path of a YAML file, a dict or a Recipe, with fields replaced.

        Raises:
            RecipeError: as in `named`, `load` and the constructor.
            TypeError: recipe is none of these kinds.
        """
        if isinstance(recipe, Recipe):
            base = recipe
        elif isinstance(recipe, dict):
            base = cls(**recipe)
        elif isinstance(recipe, Path) or (isinstance(recipe, str) and recipe.endswith((".yaml", ".yml"))):
            base = cls.load(recipe)
        elif isinstance(recipe, str):
            base = cls.named(recipe)
        else:
            kind = type(recipe).__name__
            raise TypeError(f"recipe must be a name, a path, a dict or a Recipe, got {kind}; try recipe='balanced'")
        return cls(**{**base.model_dump(), **fields}) if fields else base


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    files = resources.files("sla2_compile.recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))
