# Two commands need nothing but Python 3.10, Rust and a network: `make demo` and `make test`. `make help` lists all.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python
DEPENDENCIES := $(VENV)/.dependencies
BUILT := $(VENV)/.built
OLDEST := .venv-oldest/.built
PEERS := .venv-peers/.installed

# The first Python on PATH that is new enough; PYTHON=... chooses another.
PYTHON ?= $(shell for candidate in python3 python python3.14 python3.13 python3.12 python3.11 python3.10; do \
	"$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo "$$candidate"; break; }; done)

RUST_SOURCES := $(wildcard Cargo.toml rust/*/Cargo.toml) $(shell find rust -name '*.rs' 2>/dev/null)
SOAK_SECONDS ?= 600
ROWS ?=
RECORD ?=

# pyo3 asks this interpreter about its ABI: always the same one, or cargo builds anew each time.
export PYO3_PYTHON := $(CURDIR)/$(RUN)

step = @printf '\n\033[1m== %s\033[0m\n' '$(1)'

.PHONY: help demo demo-rows test test-clients test-oldest test-oldest-contract bench bench-peers bench-growth instructions fidelity soak memcheck build lint fmt clippy ruff mypy stub test-rust test-python format clean require-python

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' | awk -F'|' '{ printf "  make %-12s %s\n", $$1, $$2 }'

# ---- set-up

require-python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 or later on PATH. Install one (any source will do), or name it: make PYTHON=/path/to/python3" >&2; exit 1; }

$(DEPENDENCIES): pyproject.toml scripts/prepare.py scripts/pip_settings.py | require-python
	$(call step,environment in $(VENV))
	@$(PYTHON) scripts/prepare.py dependencies
	@touch $@

$(BUILT): $(DEPENDENCIES) $(RUST_SOURCES)
	$(call step,build of the Rust extension in release mode)
	@$(PYTHON) scripts/prepare.py build
	@touch $@

build: $(BUILT) ## make the environment and build the extension

# ---- what a user runs

demo: $(BUILT) ## train a weight-clipped classifier four ways: a table and a picture
	$(call step,demonstration)
	@$(RUN) examples/clipped_classifier.py

demo-rows: $(BUILT) ## fit Gaussians to a photograph while rows come and go, two ways
	$(call step,demonstration of rows)
	@$(RUN) examples/gaussian_image.py

bench: $(BUILT) ## measure against torch; ROWS="step clip" picks rows
	$(call step,benchmark)
	@$(RUN) benches/run.py $(ROWS)

bench-growth: $(BUILT) ## cost of a step from 1 to 100,000 tensors and from a thousand to a thousand million elements
	$(call step,growth)
	@$(RUN) benches/run.py growth

$(PEERS): pyproject.toml scripts/prepare.py | $(BUILT)
	$(call step,environment of the optimizers of others)
	@$(PYTHON) scripts/prepare.py peers
	@touch $@

bench-peers: $(BUILT) $(PEERS) ## measure against optimi, torchao, bitsandbytes and DeepSpeed
	$(call step,benchmark against others)
	@.venv-peers/bin/python benches/run.py $(or $(ROWS),peers)

instructions: ## count each kernel's instructions under valgrind against the record; RECORD=1 writes it
	$(call step,instructions of the kernels)
	@$(PYTHON) scripts/instructions.py $(if $(RECORD),--record)

fidelity: $(BUILT) ## train in every precision of values and state; writes docs/fidelity.md
	$(call step,fidelity)
	@PYTHONPATH=examples $(RUN) benches/fidelity.py

# ---- checks

test: lint test-rust test-python test-clients test-oldest-contract ## everything: formats, lints, types, Rust and Python tests, frameworks, oldest torch
	$(call step,all checks passed)

lint: fmt clippy ruff mypy stub ## formats, lints, types and the stub

fmt: $(DEPENDENCIES)
	$(call step,cargo fmt --check)
	@$(PYTHON) scripts/prepare.py check-rust
	@cargo fmt --all --check

clippy: $(DEPENDENCIES)
	$(call step,cargo clippy)
	@cargo clippy --workspace --all-targets --quiet -- -D warnings

ruff: $(DEPENDENCIES)
	$(call step,ruff)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

mypy: $(BUILT)
	$(call step,mypy)
	@$(BIN)/mypy

stub: $(BUILT)
	$(call step,stub of the compiled module)
	@$(RUN) -m pytest -q tests/core/test_stub.py

test-rust: $(DEPENDENCIES) ## the core's tests, documented examples included
	$(call step,cargo test of the core)
	@cargo test --package paramstate --release

test-python: $(BUILT) ## pytest: tests, doctests, documents' examples
	$(call step,pytest)
	@$(RUN) -m pytest -q --ignore=tests/core/test_stub.py --ignore=tests/clients --ignore=tests/systems

test-clients: $(BUILT) ## the frameworks that drive an optimizer and the systems we learn from, on tiny models
	$(call step,pytest of the frameworks and the systems)
	@$(RUN) -m pytest -q tests/clients tests/systems

$(OLDEST): $(BUILT) $(shell find python -name '*.py' 2>/dev/null)
	$(call step,environment of the oldest supported releases)
	@$(PYTHON) scripts/prepare.py oldest
	@touch $@

test-oldest: $(OLDEST) ## the whole suite on the oldest supported torch, NumPy and Python
	$(call step,pytest on the oldest supported releases)
	@.venv-oldest/bin/python -m pytest -q tests --ignore=tests/core/test_stub.py --ignore=tests/clients --ignore=tests/systems

test-oldest-contract: $(OLDEST) ## of it, what torch's users rely on
	$(call step,pytest of the contract on the oldest supported releases)
	@.venv-oldest/bin/python -m pytest -q tests/contract tests/core tests/test_step.py tests/test_promises.py --ignore=tests/core/test_stub.py

soak: $(BUILT) ## ten minutes of the state machine of identity, new seeds all the time
	$(call step,state machine for $(SOAK_SECONDS) seconds)
	@PARAMSTATE_SOAK_SECONDS=$(SOAK_SECONDS) $(RUN) -m pytest -q -s -k test_soak tests/test_state_machine.py

memcheck: ## valgrind over the core's tests
	$(call step,valgrind over the tests of the core)
	@sh scripts/memcheck.sh

format: $(DEPENDENCIES) ## rewrite the sources in the project's format
	@cargo fmt --all
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

clean: ## remove the environment and everything built
	rm -rf $(VENV) .venv-oldest .venv-peers .venv-uv target dist examples/output benches/results .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find python -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
