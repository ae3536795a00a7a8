# Broadbeam. `make` alone prints what there is; `make demo` and `make test` do all their own set-up.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
UV_VERSION := 0.13.9
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/broadbeam
BOOTSTRAP := $(CACHE)/uv-$(UV_VERSION)
UV := $(BOOTSTRAP)/bin/uv
BIN := .venv/bin
PROMPT ?= Why is the sky blue? Answer in two sentences.
# As it was typed, through the environment: what make or the shell would expand means itself in a question.
override PROMPT := $(value PROMPT)
export PROMPT
# Test processes of `make unit`: half of a test's time it waits for processes, so two pay on two cores.
WORKERS ?= 2
# TORCH_BACKEND=cpu takes uv's small CPU build of torch, where its index can be reached.
TORCH_BACKEND ?=
# What Python has compiled is kept, whatever the environment says: without it each start of a process with torch
# takes three times as long, and the tests start hundreds.
unexport PYTHONDONTWRITEBYTECODE
export DO_NOT_TRACK := 1
export HF_HUB_OFFLINE ?= 1

.PHONY: help
help: ## print the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

# With TORCH_BACKEND, torch and what that build of it needs come first; then the lock, without what another build needs.
# The stamp lives in the clone; the wheels come from uv's cache, so a second clone takes seconds.
.venv/.stamp-$(TORCH_BACKEND): requirements/dev.lock pyproject.toml
	@! ls */__init__.py 2>/dev/null || { echo "a top-level folder holds an __init__.py: operator/__init__.py would shadow the standard library"; exit 1; }
	@test -x "$(UV)" || { echo "installing uv $(UV_VERSION) into $(BOOTSTRAP)"; \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Broadbeam needs Python >= 3.11; set PYTHON=/path/to/python3.11")'; \
	  $(PYTHON) -m venv "$(BOOTSTRAP)"; \
	  "$(BOOTSTRAP)/bin/python" -m pip install -q --disable-pip-version-check uv==$(UV_VERSION); }
	@echo "preparing .venv (the first time downloads torch: 4.5 GB, or 0.2 GB with TORCH_BACKEND=cpu)"; start=$$SECONDS; \
	test -x $(BIN)/python || "$(UV)" venv -q --allow-existing --python $(PYTHON) .venv; \
	if [ -n "$(TORCH_BACKEND)" ]; then \
	  "$(UV)" pip install --torch-backend $(TORCH_BACKEND) -c requirements/dev.lock torch; \
	  grep -vE '^(torch|nvidia-[a-z0-9-]+|cuda-[a-z-]+)==' requirements/dev.lock | "$(UV)" pip install --no-deps -r -; \
	else \
	  "$(UV)" pip install -r requirements/dev.lock; \
	fi; \
	"$(UV)" pip install -q --no-deps -e .; \
	touch $@; echo "prepared .venv in $$((SECONDS - start)) s"

.PHONY: setup
setup: .venv/.stamp-$(TORCH_BACKEND) ## make the virtual environment .venv

.PHONY: demo
demo: setup ## serve a small real model with prefill and decode apart, ask it one question (PROMPT="…")
	@$(BIN)/broadbeam demo examples/laptop.yaml --prompt="$$PROMPT"

# Every clone finds what mypy knows of torch, which takes it a minute to learn.
.PHONY: check
check: setup ## format, lint, types, import contracts, generated files fresh
	@! ls */__init__.py 2>/dev/null
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy --cache-dir "$(CACHE)/mypy"
	@$(BIN)/lint-imports
	@$(BIN)/python -m broadbeam_crds.schema --check

.PHONY: crds
crds: setup ## regenerate the CRD YAML from the models
	@$(BIN)/python -m broadbeam_crds.schema --write

.PHONY: format
format: setup ## format and fix what can be fixed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

.PHONY: unit
unit: setup ## tests that need neither a GPU nor an API server
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder tests

.PHONY: controlplane
controlplane: setup ## build etcd, API server, controller-manager, scheduler and helm once (about 10 minutes)
	@$(BIN)/python e2e/controlplane/build.py

.PHONY: e2e
e2e: setup controlplane ## tests against a real API server, pods as local processes
	@$(BIN)/python -m pytest -q e2e

.PHONY: test
test: check controlplane unit e2e ## everything that needs no GPU (under 12 minutes when its caches are warm)

.PHONY: test-gpu
test-gpu: setup ## tests that need a CUDA device
	@$(BIN)/python -m pytest -q -m gpu tests

.PHONY: bench
bench: setup ## figures as JSON lines: each a ratio or a floor measured in the same run
	@$(BIN)/python -m broadbeam_runtime.bench
	@$(BIN)/python -m broadbeam_router.bench
	@$(BIN)/python -m broadbeam_operator.bench
	@$(BIN)/python -m broadbeam_operator.local.bench

.PHONY: bench-kernels
bench-kernels: setup ## kernel timings on the GPU at hand, against their floors and peers
	@$(BIN)/python -m broadbeam_kernels bench
