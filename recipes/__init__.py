"""Recipes: what SLA2 does to a model, as validated, frozen data. The named recipes are YAML files in this folder."""

from sla2_compile.recipes.errors import RecipeError
from sla2_compile.recipes.recipe import DEFAULT, SITE_FIELDS, Recipe, recipe_names

__all__ = ["DEFAULT", "SITE_FIELDS", "Recipe", "RecipeError", "recipe_names"]
