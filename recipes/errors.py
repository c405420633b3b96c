"""Turn pydantic's errors into the form of this project's errors: rule, value, fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails


class RecipeError(ValueError):
    """A recipe is not valid. Each line of the message reads `<field> must <rule>, got <value>; <fix>`."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x'? " or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}? " if match else ""


def explain(error: ValidationError, fields: Iterable[str]) -> RecipeError:
    """Build one RecipeError with one line per finding."""
    known = sorted(fields)
    lines = [_line(detail, known) for detail in error.errors()]
    return RecipeError("\n".join(dict.fromkeys(lines)))


def _line(detail: ErrorDetails, known: list[str]) -> str:
    # a union reports each branch that it tried, as ("block_q", "int"); the first part is the field
    where = str(detail["loc"][0]) if detail["loc"] else "recipe"
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "extra_forbidden":
        return (
            f"recipe key must be a field of Recipe, got {where!r}; {nearest(where, known)}fields: {', '.join(known)}"
        )
    return f"{where} must {_rule(kind, context, detail['msg'])}, got {value!r}; see Recipe.{where} for what it means"


def _rule(kind: str, context: dict[str, Any], message: str) -> str:
    if kind == "literal_error":
        return f"be {context['expected']}"
    bounds = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    if kind in bounds:
        return f"be {kind.replace('_', ' ')} {context[bounds[kind]]}".replace("equal", "or equal to")
    return message.replace("Input should be", "be").replace("Input should", "").strip()
