# make demo      prune a trained network to half its measured latency
# make test      the tests            make test-all   the same, thousands of random networks
# make lint      ruff and basedpyright
# make clean     remove what these made (not what you made)
#
# Needs Python 3.11 or newer with its venv module, and the network once, to fill .venv. Variables:
#   PYTHON=python3.12     the interpreter .venv is made with (found by itself if not given)
#   PIP_FLAGS="..."       more flags for pip, such as --extra-index-url https://download.pytorch.org/whl/cpu,
#                         which takes the CPU build of torch and saves some gigabytes on Linux
#   PYTEST_FLAGS="..."    more flags for pytest

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done)
PIP_FLAGS ?=
PYTEST_FLAGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.kfe-fx-installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed -n 1,4p

# Made again when what to install changes. The stamp comes last, so a broken installation is tried again.
$(STAMP): pyproject.toml constraints.txt
	@if [ ! -x $(BIN)/python ] && [ -z "$(PYTHON)" ]; then \
	  echo "kfe-fx needs Python 3.11 or newer: install one, or name it with make PYTHON=/path/to/python3" >&2; exit 2; fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing kfe-fx and what it needs into $(VENV) (once; minutes where torch has to be downloaded)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/kfe-fx demo

test: $(STAMP)
	@$(BIN)/python -m pytest -q -n 2 $(PYTEST_FLAGS)

test-all: $(STAMP)
	@KFE_FX_THOROUGH=1 $(BIN)/python -m pytest -q -n 2 $(PYTEST_FLAGS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist demo kfe_fx.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
