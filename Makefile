# Everything a developer or an operator does from a checkout. `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A wheel index for PyTorch, e.g. the CPU index that pytorch.org's "Get Started" page names. Empty: see docs/howto/install.md
TORCH_INDEX_URL ?=
export TORCH_INDEX_URL

CHAOS ?=
SOAK ?=
.PHONY: help setup demo serve chaos soak check docs format test clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 14

setup: $(VENV)/.ready ## make .venv and install everything (CPU torch where there is no GPU)

$(VENV)/.ready: pyproject.toml .ci/install
	PYTHON="$(PYTHON)" VENV="$(VENV)" .ci/install
	@touch $@

demo: setup ## start the cluster, run the main job through HTTP, print the files, stop
	$(BIN)/ourvidz demo

serve: setup ## start the cluster on the laptop profile and keep serving
	$(BIN)/ourvidz up

check: setup ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

chaos: setup ## kill, stop and cut everything in turn under load, then check that nothing was lost
	$(BIN)/python -m benchmarks.chaos $(CHAOS)

soak: setup ## half an hour of steady load, then a look at what must not grow
	$(BIN)/python -m benchmarks.soak $(SOAK)

docs: setup ## write the generated parts of docs/reference anew
	$(BIN)/python docs/generate.py

test: setup ## run the tests in two processes (own Postgres, own Ray cluster, tiny models made on the spot)
	$(BIN)/pytest -n 2 --no-loadscope-reorder

clean: ## remove .venv and what the tools left
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
