# From a fresh clone, with python3 >= 3.11 and make: `make demo` runs the main job, `make test` checks everything.
# Both make .venv and install into it once; a change of pyproject.toml or constraints.txt installs again.
#
#   make test PYTHON=python3.12        another interpreter for a new .venv
#   make test PYTEST_ARGS="-k ui -x"   arguments for pytest
#   make demo ARGS="--help"            arguments for dtr-lab
#   make demo PIP_ARGS="..."           arguments for pip, such as the source of another build of torch

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
ARGS ?=

BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime-installed
DEV := $(VENV)/.dev-installed
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt

# Two test processes with one thread each: on two cores that is faster than one process with two threads.
# loadfile keeps tests that share a costly fixture (a browser, trained runs) in one process; loadgroup would too, but
# pytest-xdist 3.8 does not see its groups under pytest 9.2.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

export MLFLOW_DISABLE_TELEMETRY ?= true

.DEFAULT_GOAL := help
.PHONY: help test lint demo ui notebooks clean python-version

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

test: export OMP_NUM_THREADS := 1
test: $(DEV) lint ## run every check: ruff, mypy, pytest
	$(PYTEST) $(PYTEST_ARGS)

lint: $(DEV) ## run ruff and mypy only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(RUNTIME) ## train, measure and compare baseline, random routing and DTR on real digits
	$(BIN)/dtr-lab demo $(ARGS)

ui: $(RUNTIME) ## open MLflow's user interface on the runs
	$(BIN)/dtr-lab ui $(ARGS)

# In the store of MLFLOW_TRACKING_URI, else mlflow.db here. What papermill notes of this machine is taken out again.
notebooks: $(DEV) ## render the notebooks on the newest demo, into notebooks/rendered
	mkdir -p notebooks/rendered
	for notebook in notebooks/*.ipynb; do \
	  copy=notebooks/rendered/$$(basename $$notebook); \
	  $(BIN)/papermill --no-progress-bar --log-level WARNING $$notebook $$copy && \
	  $(BIN)/nbstripout --keep-output --keep-id --drop-empty-cells \
	    --extra-keys "metadata.papermill metadata.language_info cell.metadata.papermill cell.metadata.execution" $$copy || exit 1; \
	done

clean: ## remove .venv and caches, never runs or the store
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

python-version:
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: DTR Lab needs Python 3.11 or newer, but '$(PYTHON)' says: $$($(PYTHON) --version 2>&1 | tail -n 1)" >&2; \
	  echo "Name a newer one, for example: make $(or $(MAKECMDGOALS),test) PYTHON=python3.12" >&2; exit 1; }

# A .venv that an interrupted run left without pip is completed; one that works is kept, whatever made it.
$(RUNTIME): pyproject.toml constraints.txt | python-version
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt | python-version
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e '.[dev]'
	@touch $(RUNTIME) $@
