# every target does its own set-up: a fresh clone needs Python 3.10+ and make, nothing else
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.demo
ZOO_VENV := .venv-zoo
ZOO_STAMP := $(ZOO_VENV)/.installed
DOCS_VENV := .venv-docs
DOCS_STAMP := $(DOCS_VENV)/.installed

.PHONY: help demo test lint type bench gpu golden zoo docs wheel clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

# torch first and alone: its exact pin keeps a CPU machine from downloading CUDA packages
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "sla2_compile needs Python 3.10 or later; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch 'triton; sys_platform == "linux"' numpy setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,demo]'
	@touch $@

$(DEMO_STAMP): $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[demo,library]'
	@touch $@

demo: $(DEMO_STAMP) ## SLA2 against full attention on a photograph: table and pictures in demo_out/
	$(BIN)/python examples/demo.py

test: $(STAMP) ## run the tests (no GPU needed), on up to four cores
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 $(PYTEST_ARGS)

lint: $(STAMP) ## check format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

type: $(STAMP) ## check types
	$(BIN)/mypy

bench: $(STAMP) ## CPU benchmark: ratios to SDPA, written to benchmarks/results/
	$(BIN)/python benchmarks/cpu.py

gpu: $(STAMP) ## tests that need a CUDA device
	$(BIN)/python -m pytest -q -m gpu

golden: $(STAMP) ## rewrite the golden graphs and what kernels compile to, to be read in the diff
	EXPECTTEST_ACCEPT=1 $(BIN)/python -m pytest -q tests/passes tests/kernels/test_aot.py

# in a venv of its own: the libraries are large, and nothing else may come to need them
$(ZOO_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "sla2_compile needs Python 3.10 or later; set PYTHON=...")'
	$(PYTHON) -m venv $(ZOO_VENV)
	$(ZOO_VENV)/bin/python -m pip install -q -c constraints.txt torch 'triton; sys_platform == "linux"' numpy setuptools wheel
	$(ZOO_VENV)/bin/python -m pip install -q -c constraints.txt -e '.[zoo]'
	@touch $@

zoo: $(ZOO_STAMP) ## models of transformers, diffusers and others: found, rewritten, compiled, exported, written as files; docs/zoo.md
	$(ZOO_VENV)/bin/python -m tests.zoo

# the extra alone, without the package and torch: the API reference is read from the sources
DOCS_EXTRA := import importlib, sys; \
	toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "pip._vendor.tomli"); \
	extras = toml.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	print(*extras["docs"], sep="\n")

$(DOCS_STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "sla2_compile needs Python 3.10 or later; set PYTHON=...")'
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -c '$(DOCS_EXTRA)' > $(DOCS_VENV)/extra.txt
	$(DOCS_VENV)/bin/python -m pip install -q -r $(DOCS_VENV)/extra.txt
	@touch $@

docs: $(DOCS_STAMP) ## build these pages and the API reference as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict

wheel: $(STAMP) ## build the wheel and test it in a clean venv
	.ci/wheel

clean: ## remove what the targets made
	rm -rf $(VENV) .venv-wheel $(ZOO_VENV) $(DOCS_VENV) site build dist demo_out *.egg-info .pytest_cache .mypy_cache .ruff_cache
