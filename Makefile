# Each target does all of its own set-up; `make` alone lists them. Needed beforehand: python3 (3.11 or later) with venv, bash, make.
# May be given: VENV=folder  PYTHON=python3.12  RANKS=4  TORCH='torch==2.13.0'  TORCH_ARGS='--index-url ...'  ARGS='...'
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
PYTHON ?= python3
RANKS ?= 2
TORCH_ARGS ?=
ARGS ?=

BIN := $(VENV)/bin
PY := $(BIN)/python
READY := $(VENV)/.ready
CONSTRAINTS := requirements/constraints.txt
# ranks of a test share the machine's cores, so each has one thread
TESTS := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest -q

say = @printf '\n== %s\n' $(1)

.PHONY: help setup run test check format lint types imports unit ranks launch long exact mutants parity methods bench triton clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 10

setup: $(READY) ## the virtual environment in .venv, pinned

$(READY): setup.cfg pyproject.toml $(CONSTRAINTS)
	$(call say,'set-up: virtual environment in $(VENV)')
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"ringctx needs Python 3.11 or later; this is {sys.version.split()[0]}. Give another: make PYTHON=python3.12")'
	@[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	$(call say,'set-up: torch (the largest download)')
	@torch='$(TORCH)'; [ -n "$$torch" ] || { if nvidia-smi -L >/dev/null 2>&1; then torch='torch>=2.13'; else torch='torch==2.13.0'; fi; }; \
	  echo "$$torch"; $(PY) -m pip install -q $(TORCH_ARGS) -c $(CONSTRAINTS) "$$torch"
	$(call say,'set-up: ringctx and what it needs')
	@$(PY) -m pip install -q -c $(CONSTRAINTS) -e '.[huggingface,plot,train,deepspeed,serve,dev]'
	@$(PY) -c 'import torch; print(f"torch {torch.__version__}, {torch.cuda.device_count()} GPU")'
	@touch $@

run: $(READY) ## ask a real model a question about a real document, over RANKS ranks
	@VENV=$(VENV) RANKS=$(RANKS) launch/quickstart.sh $(ARGS)

test: check ranks launch ## everything CI runs: check, then tests on ranks and end to end (meant to take under 15 minutes on two cores; README has what it took)
	$(call say,'test: all passed')

check: format lint types imports unit ## format, lint, types, import direction, unit tests

format: $(READY)
	$(call say,'format')
	@$(BIN)/ruff format --check .

lint: $(READY)
	$(call say,'lint')
	@$(BIN)/ruff check .

types: $(READY)
	$(call say,'types')
	@$(BIN)/mypy

imports: $(READY)
	$(call say,'import direction')
	@$(BIN)/lint-imports --no-logo

unit: $(READY)
	$(call say,'tests/unit')
	@$(TESTS) -m 'not slow and not gpu' -n auto tests/unit $(ARGS)

ranks: $(READY) ## tests on a pool of gloo ranks
	$(call say,'tests/ranks')
	@$(TESTS) -m 'not slow and not gpu' tests/ranks $(ARGS)

launch: $(READY) ## tests through torchrun, end to end
	$(call say,'tests/launch')
	@$(TESTS) -m 'not slow and not gpu' tests/launch $(ARGS)

long: $(READY) ## the tests that `make test` leaves out because they take long
	$(call say,'tests marked slow')
	@$(TESTS) -m 'slow and not gpu' tests $(ARGS)

exact: $(READY) ## every case against the float64 oracle; hours, resumable: ARGS='--help'
	@OMP_NUM_THREADS=1 $(PY) -m tests.exact $(ARGS)

mutants: $(READY) ## break the code in many ways; every break must be noticed
	@OMP_NUM_THREADS=1 $(PY) -m tests.mutants $(ARGS)

parity: $(READY) ## greedy tokens on 1 to 4 ranks against transformers' own generate
	@OMP_NUM_THREADS=1 $(PY) -m tests.parity $(ARGS)

methods: $(READY) ## the tests of every method, and the table of them in docs; about three minutes
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m tests.methods.table

bench: $(READY) ## the measurements of docs/results, rerun
	@$(BIN)/ringctx bench $(ARGS)

triton: $(READY) ## the Triton kernels in Triton's interpreter, then compiled for GPUs; installs triton (900 MB)
	@$(PY) -m pip install -q -c $(CONSTRAINTS) -e '.[triton]'
	$(call say,'triton: in the interpreter')
	@TRITON_INTERPRET=1 TRITON_DEFAULT_FP_FUSION=1 $(TESTS) tests/unit/test_triton_tiles.py tests/unit/test_triton_carried.py $(ARGS)
	$(call say,'triton: compiled')
	@TRITON_DEFAULT_FP_FUSION=1 $(TESTS) tests/unit/test_triton_tiles.py tests/unit/test_triton_carried.py $(ARGS)

clean: ## remove the virtual environment and caches (weights in ~/.cache/ringctx stay)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find ringctx tests launch -name __pycache__ -type d -prune -exec rm -rf {} +
