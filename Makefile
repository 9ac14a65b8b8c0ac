# make help tells what there is. Everything lands in .venv (benchmarks: .venv-bench and .venv-bench-gpu, TensorFlow:
# .venv-seqio); nothing outside is touched.
#
# PYTHON         the interpreter a new .venv is made of, 3.11 or later:      make test PYTHON=python3.12
# EXTRA          what the tests install: dev, or tests (all but torch and the linters):  make test VENV=.venv-3.12 EXTRA=tests
# PYTEST_ARGS    replaces the arguments of pytest (two workers, a file each):  make test PYTEST_ARGS="tests/methods -x"
# STEPS COMPARE  of the quickstart:                                          make quickstart STEPS=320 COMPARE=1
# GPU            the extra of bench-gpu, gpu13 or gpu (CUDA 12):              make bench-gpu GPU=gpu UV_TORCH_BACKEND=cu128
# Another package index, for instance one with CPU builds of torch, is given in pip's own way: set
# PIP_EXTRA_INDEX_URL (and UV_INDEX where uv is on the PATH) in the environment.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STEPS ?= 240
COMPARE ?=
QUICKSTART_ARGS ?=
EXTRA ?= dev
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
BENCH_ARGS ?=
GPU ?= gpu13
NOTEBOOKS ?= $(sort $(wildcard notebooks/*.ipynb))
# uv takes torch's CPU build unless told otherwise; pip does not read this.
export UV_TORCH_BACKEND ?= cpu

COMMA := ,# between arguments of call, and so not inside of one
VERSION_OF = import sys; print("%d.%d" % sys.version_info[:2])

.PHONY: help quickstart test test-seqio lint format bench bench-gpu notebooks clean distclean
.SECONDARY:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

quickstart: $(VENV)/.stamp-base ## tune a small real model on the CPU (STEPS=320, COMPARE=1 for other methods beside it)
	$(BIN)/python -m deptjax.quickstart --steps $(STEPS) $(if $(COMPARE),--compare) $(QUICKSTART_ARGS)

test: $(VENV)/.stamp-$(EXTRA) ## run all tests and doctests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-seqio: .venv-seqio/.stamp-tests ## run the tests that need seqio and TensorFlow, in a venv of its own (3 GB)
	.venv-seqio/bin/python -m pytest tests/data/seqio_test.py tests/data/tfds_test.py

lint: $(VENV)/.stamp-dev ## check formatting, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.stamp-dev ## format the code and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

notebooks: $(VENV)/.stamp-notebooks ## run every notebook in place (NOTEBOOKS=... for some)
	@[ -n "$(NOTEBOOKS)" ] || { echo "make notebooks: notebooks/ holds no .ipynb file." >&2; exit 2; }
	$(BIN)/jupyter-execute --inplace --timeout=1800 --kernel_name=python3 $(NOTEBOOKS)

bench: .venv-bench/.stamp-torch ## compare with torch + peft, in a venv of its own
	.venv-bench/bin/python benchmarks/compare.py $(BENCH_ARGS)

# torch's build is then that of the driver's CUDA, and the environment's for jax of the same one.
bench-gpu: export UV_TORCH_BACKEND = auto
bench-gpu: .venv-bench-gpu/.stamp-$(GPU) ## measure on one NVIDIA GPU, beside torch + peft, in a venv of its own
	.venv-bench-gpu/bin/python benchmarks/gpu.py $(BENCH_ARGS)

clean: ## remove caches and build leftovers
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find deptjax tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## also remove the virtual environments
	rm -rf $(VENV) .venv-bench .venv-bench-gpu .venv-seqio .venv-newest

# A .venv that is there is used as it is; asking for another interpreter than its own is a mistake, not a rebuild.
.PHONY: same-python
same-python:
	@if [ "$(origin PYTHON)" != file ] && [ -x $(BIN)/python ]; then \
	  have=$$($(BIN)/python -c '$(VERSION_OF)'); want=$$("$(PYTHON)" -c '$(VERSION_OF)' 2>/dev/null || echo unknown); \
	  [ "$$have" = "$$want" ] || { \
	    echo "make: $(VENV) holds Python $$have and PYTHON=$(PYTHON) is $$want; remove $(VENV), or add VENV=.venv-$$want" >&2; exit 2; }; fi

# One stamp an extra: a second make finds it newer than setup.py and installs nothing.
define INSTALL
	@test -f $(@D)/pyvenv.cfg || { \
	  command -v "$(PYTHON)" >/dev/null || { \
	    echo "make: no interpreter '$(PYTHON)'; name one of version 3.11 or later: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }; \
	  version=$$("$(PYTHON)" -c '$(VERSION_OF)' 2>/dev/null || echo unknown); \
	  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "make: deptjax needs Python >= 3.11 and '$(PYTHON)' is $$version; name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }; \
	  echo "making $(@D) with Python $$version"; \
	  if command -v uv >/dev/null; then uv venv -q --seed --python "$$(command -v "$(PYTHON)")" $(@D); \
	  else "$(PYTHON)" -m venv $(@D); fi; }
	@echo "installing deptjax$(1) into $(@D) (some minutes the first time)"
	@if command -v uv >/dev/null && uv pip install -q --python $(@D)/bin/python -e '.$(1)'; then :; \
	else $(@D)/bin/python -m pip install -q --disable-pip-version-check --progress-bar off -e '.$(1)'; fi
	@touch $(@D)/.stamp-base $@
endef

$(VENV)/.stamp-base: setup.py | same-python
	$(call INSTALL,)

$(VENV)/.stamp-%: setup.py | same-python
	$(call INSTALL,[$*])

.venv-bench/.stamp-torch: setup.py
	$(call INSTALL,[torch])

.venv-bench-gpu/.stamp-%: setup.py
	$(call INSTALL,[$*$(COMMA)torch])

.venv-seqio/.stamp-tests: setup.py
	$(call INSTALL,[seqio$(COMMA)tfds$(COMMA)tests])
