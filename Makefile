# `make` alone lists the targets. Everything runs in .venv, which `setup` builds and keeps current.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

# The first interpreter that runs; the set-up program says so if it is not Python 3.11.
PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c '' >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv/bin

.PHONY: help setup triton demo test test-long test-versions gpu figures fuzz lint format typecheck docs wheel clean distclean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | awk -F ':.*  ## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup:  ## Build or refresh .venv (about 10 minutes the first time)
	@test -n "$(PYTHON)" || { echo "setup: no Python found; install Python 3.11, or run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) tools/dev/setup_env.py

# Their interpreter and compiler need no GPU. Without it their tests are skipped, but where CI and
# MMSOFT_TRITON=required are set.
triton: setup
	@$(VENV)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/triton/packages.txt \
		|| echo "test: Triton could not be installed; the tests of its kernels will be skipped" >&2

demo: setup  ## Train and test a small detector and segmentor on generated data
	$(VENV)/python tools/demo.py

# pytest comes last, so that its summary ends the output. One thread per worker: with more, the
# workers' threads wait for each other. Tests start a hundred Pythons, which would compile mmsoft
# anew if bytecode were not written.
PYTEST := env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(VENV)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal --durations 20

test: lint typecheck triton  ## Lint, check types, run the tests
	$(PYTEST) tests

test-long: setup triton  ## Run the tests marked `long`, which take minutes
	$(PYTEST) tests -m long

# On the GPU's own Python and torch, which `setup` does not manage.
# PYTHON, or the first whose torch sees a GPU.
gpu:  ## On a GPU, in nine minutes: tests, kernels, backbones, training
	@for python in $(if $(filter file,$(origin PYTHON)),$(VENV)/python python3 python3.11 python,$(PYTHON)); do \
		if $$python -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then \
			exec $$python tools/dev/gpu.py $(if $(WHEELS),--wheels $(WHEELS)) $(if $(OUT),--out $(OUT)); fi; done; \
		echo "gpu: no Python found whose torch sees a GPU; give one: make gpu PYTHON=/path/to/python" >&2; exit 1

figures: setup  ## Make the pictures of docs/look_inside.md and docs/method.md anew (20 minutes)
	$(VENV)/python tools/dev/figures.py

fuzz: setup  ## Try the public API on random arguments for ten minutes
	OMP_NUM_THREADS=1 $(VENV)/python -m pytest tests/faults/test_fuzz.py --hypothesis-profile fuzz

test-versions: setup  ## Test operators, models and a detector on torch 2.1 to the newest (an hour)
	$(VENV)/python tools/dev/test_versions.py

lint: setup  ## Check style and formatting
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .

format: setup  ## Fix what ruff can fix
	$(VENV)/ruff check --fix .
	$(VENV)/ruff format .

typecheck: setup  ## Check the types of mmsoft/ and tools/
	$(VENV)/mypy

# The site generator has a separate environment, which the set-up program does not manage. The
# marker file comes last, so that an interrupted installation is done again. With --quiet, --strict
# would count no warnings.
docs: .venv-docs/installed  ## Build the documentation into site/
	.venv-docs/bin/mkdocs build --strict
	@echo "site/index.html"

.venv-docs/installed: requirements/docs/packages.txt
	$(PYTHON) -m venv --clear .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

wheel: setup  ## Build the wheel and the source distribution into dist/
	$(VENV)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	$(VENV)/python -c "from setuptools.build_meta import build_sdist; build_sdist('dist')" >/dev/null
	@ls dist

clean:  ## Remove caches and build outputs
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean  ## Also remove .venv, data and results
	rm -rf .venv .venv-docs data work_dirs
