"""The pages: their examples run, their links and paths lead somewhere, and the reference lists what is public."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sla2_compile
from sla2_compile.passes.pipeline import Pipeline
from sla2_compile.recipes import Recipe, recipe_names

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("name", ["guide", "recipes", "debugging", "export", "training"])
def test_python_blocks_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = DOCS / f"{name}.md"
    blocks = python_blocks(page)
    assert blocks
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), scope)


def test_every_page_with_python_blocks_is_run():
    # README.md by test_readme.py
    run = {"README", "guide", "recipes", "debugging", "export", "training"}
    assert {page.stem for page in PAGES if python_blocks(page)} == run


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_page_of_the_site_is_in_its_menu():
    """`make docs` is strict about that, and no part of the tests."""
    menu = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))
    pages = {page.relative_to(ROOT).as_posix() for page in (*PAGES, *(ROOT / "benchmarks" / "results").glob("*.md"))}
    assert pages == menu


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_paths_of_sources_exist(page):
    folders = "sla2_compile|passes|kernels|recipes|tests|benchmarks|examples"
    for path in re.findall(rf"`((?:{folders})/[\w/]*(?:\.\w+)?)`", page.read_text()):
        assert (ROOT / path).exists(), path


def reference() -> set[str]:
    """The names that the API reference shows, without their modules."""
    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    names = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)", text, flags=re.MULTILINE)}
    return names.union(*(re.findall(r"\w+", members) for members in re.findall(r"members: \[(.*?)\]", text)))


def test_the_reference_lists_every_public_name():
    assert set(sla2_compile.__all__) <= reference()


def test_the_reference_lists_the_passes_in_their_order():
    passes = Pipeline.standard(Recipe.of("balanced")).passes
    assert {type(step).__name__ for step in passes} <= reference()
    headings = re.findall(r"^## (\S+)$", (DOCS / "api" / "passes.md").read_text(), flags=re.MULTILINE)
    assert headings == [step.name for step in passes]


def test_the_recipe_page_has_every_field_and_recipe():
    text = (DOCS / "recipes.md").read_text()
    rows = "\n".join(line.split("|")[1] for line in text.splitlines() if line.startswith("|"))
    assert set(Recipe.model_fields) - {"name"} | set(recipe_names()) <= set(re.findall(r"`(\w+)`", rows))
