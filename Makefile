# Set-up, demo, tests and checks. A fresh clone needs Python 3.11 or newer and make, nothing else.
# pip is configured from outside (PIP_INDEX_URL, PIP_FIND_LINKS, pip.conf, ...): no package index is named here.

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# The Python that makes the .venv: the first of these that is at least 3.11, or `make PYTHON=/path/to/python`.
PYTHON ?= $(shell for each in python3.13 python3.12 python3.11 python3; do \
	$$each -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$each && break; done)

# Idle OpenMP threads that spin slow shared cores down.
OMP_WAIT_POLICY ?= PASSIVE
export OMP_WAIT_POLICY

ARGS ?=# more arguments for the program or for pytest: make test ARGS="-x tests/canvas"

.PHONY: help demo venv setup test test-slow test-gpu check format wheel clean distclean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

demo: $(VENV)/.installed ## set up, then draw, caption and dream pairs into out/demo/index.html
	@$(BIN)/python infer/demo.py $(ARGS)

venv: $(VENV)/.python ## an empty .venv, for a build of PyTorch of your choice

setup: $(VENV)/.installed-dev ## set up .venv with the tools of development

test: $(VENV)/.installed-dev ## set up, then run the tests
	@$(BIN)/python -m pytest -q $(ARGS)

test-slow: $(VENV)/.installed-dev ## the tests that take minutes
	@$(BIN)/python -m pytest -q -m "slow and not gpu" $(ARGS)

test-gpu: $(VENV)/.installed-dev ## the tests that need CUDA; they fail where there is none
	@$(BIN)/python -m pytest -q -m gpu $(ARGS)

check: $(VENV)/.installed-dev ## ruff and pyright
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright

format: $(VENV)/.installed-dev ## let ruff mend and format what it can
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

wheel: $(VENV)/.installed-dev ## build the wheel into dist/
	@$(BIN)/python -m hatchling build -t wheel -d dist

clean: ## remove what was built, not .venv, out/ or runs/
	@rm -rf dist build .pytest_cache .ruff_cache
	@find mmdlm tokenizers_mm train infer tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	@rm -rf $(VENV)

# The stamps: a second run installs nothing until pyproject.toml changes, and an interrupted one starts again.
$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found; name one: make PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $(PYTHON) does not run or is older than Python 3.11" >&2; exit 2; }
	@echo "Making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.python
	@echo "Installing into $(VENV): a minute or two, 1 GB and more"
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	@echo "Installing the tools of development into $(VENV)"
	@$(PIP) -e ".[dev]"
	@touch $@
