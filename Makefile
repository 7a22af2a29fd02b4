# One verb a task, for people and machines alike. Needs Python 3.10 or newer, a C toolchain and cargo.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DOCS := .venv-docs
BUILT := $(VENV)/.built
RUST := Cargo.toml Cargo.lock $(shell find rust cuda -type f 2>/dev/null)

export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint bench docs wheel clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(BUILT)

$(BIN)/maturin: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "expected Python 3.10 or newer, found " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip 'maturin>=1.9.4,<2'
	@touch $@

$(BUILT): $(BIN)/maturin $(RUST)
	$(BIN)/maturin develop --release --extras dev
	@touch $@

demo: $(BUILT) ## train a tiny base and three fine-tunes, compress, route and serve them
	$(BIN)/meswitch demo

test: $(BUILT) ## run the tests of both languages
	cargo test --release -p meswitch-core
	$(BIN)/python -m pytest

lint: $(BUILT) ## check format, lints, types and stubs
	cargo fmt --check
	cargo clippy --workspace --all-targets -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/stubtest meswitch._native

bench: $(BUILT) ## measure speed: I/O, codec, whole jobs
	cargo bench -p meswitch-core
	for job in benches/*.py; do $(BIN)/python $$job || exit; done

$(DOCS)/.built: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(DOCS)/bin/python -m pip install --quiet --group docs
	@touch $@

docs: $(DOCS)/.built ## build the documentation into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

wheel: $(BUILT) ## build a wheel into dist/
	$(BIN)/maturin build --release --out dist

clean: ## remove everything that was built
	rm -rf $(VENV) $(DOCS) site dist target python/meswitch/_native.*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find python tests benches -name __pycache__ -type d -prune -exec rm -rf {} +
