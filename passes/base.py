"""What a pass is: a frozen dataclass with a name, whose fields are its options and whose text form round-trips.

normalize-sdpa,select-attention{recipe=balanced,topk_ratio=0.1},replace-attention,clean-up
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import yaml
from torch import fx

from sla2_compile.passes.sites.outcome import Miss, Rewrite

REGISTRY: dict[str, type[Pass]] = {}


@dataclass
class PassResult:
    """What a pass did.

    Attributes:
        changed: nodes added, replaced or removed.
        outcomes: attention calls that this pass decided on, in graph order.
    """

    changed: int = 0
    outcomes: list[Rewrite | Miss] = field(default_factory=list)


@dataclass(frozen=True)
class Pass:
    """One rewrite of a graph. Running it twice changes nothing the second time.

    Class attributes:
        name: the first word of its text form.
        in_bodies: whether the pipeline also runs it on nested graphs. If not, the pass handles them itself.
    """

    name: ClassVar[str] = ""
    in_bodies: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        REGISTRY[cls.name] = cls

    def run(self, gm: fx.GraphModule) -> PassResult:
        """Rewrite gm in place. The pipeline lints and recompiles afterwards."""
        raise NotImplementedError(f"{type(self).__name__} must define run")

    def ensures(self, gm: fx.GraphModule) -> None:
        """Raise if gm, after `run`, is not what this pass promises."""

    def options(self) -> dict[str, Any]:
        """Options that differ from their defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Pass:
        """Build the pass from parsed options."""
        known = [f.name for f in fields(cls)]
        for key in options:
            if key not in known:
                raise ValueError(f"option of {cls.name} must be one of {known}, got {key!r}; leave it out")
        return cls(**options)

    def __str__(self) -> str:
        options = ",".join(f"{key}={_to_text(value)}" for key, value in self.options().items())
        return f"{self.name}{{{options}}}" if options else self.name


def parse_pass(text: str) -> Pass:
    """Build a pass from its text form.

    Raises:
        ValueError: unknown pass or option, or unbalanced braces.
    """
    name, brace, rest = text.strip().partition("{")
    if name not in REGISTRY:
        raise ValueError(f"pass must be one of {', '.join(sorted(REGISTRY))}, got {name!r}; check the spelling")
    if brace and not rest.endswith("}"):
        raise ValueError(f"pass options must end with '}}', got {text!r}; close the brace")
    pairs = [part.partition("=") for part in split_top(rest[:-1])] if brace else []
    return REGISTRY[name].from_options({key.strip(): yaml.safe_load(value) for key, _, value in pairs})


def split_top(text: str) -> list[str]:
    """Split at the commas outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        depth += 0 if quote else (char in "{[(") - (char in "}])")
        if char == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def _to_text(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10**6).strip()
    return text.removesuffix("...").strip()
