# One verb a task, for people and machines alike. Needs Python 3.10 or newer, a C toolchain and cargo.

PYTHON ?= python3
GPU_PYTHON ?= 3.12
VENV := .venv
BIN := $(VENV)/bin
DOCS := .venv-docs
BUILT := $(VENV)/.built
# nvcc from wheels, where the system has none, wheels exist and MESWITCH_CUDA=off does not say otherwise
NVCC := $(if $(filter off,$(MESWITCH_CUDA))$(shell command -v nvcc)$(wildcard $(patsubst %,%/bin/nvcc,$(CUDA_HOME) /usr/local/cuda)),,$(VENV)/.nvcc)
RUST := Cargo.toml Cargo.lock $(shell find rust cuda -type f 2>/dev/null)
SDIST := target/sdist
AARCH64 := aarch64-unknown-linux-gnu
MANYLINUX := $(if $(filter Linux,$(shell uname -s)),--zig --compatibility manylinux2014)
# Overflows and debug assertions are checked in this package alone: what it depends on needs no second build.
CHECKED := $(foreach check,overflow-checks debug-assertions,--config profile.release.package.meswitch-core.$(check)=true)

export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-models interleavings miri cuda-check lint lint-aarch64 bench docs wheel wheel-check \
	gpu-wheel gpu-check clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(BUILT)

$(BIN)/maturin: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "expected Python 3.10 or newer, found " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1' 'maturin>=1.9.4,<2'
	@touch $@

$(VENV)/.nvcc: pyproject.toml | $(BIN)/maturin
	rm -rf $(VENV)/cuda
	$(BIN)/python -m pip install --quiet --target $(VENV)/cuda --group cuda
	cargo clean --quiet --release --package meswitch-cuda # what was built when there was no nvcc
	@touch $@

$(BUILT): $(BIN)/maturin $(NVCC) $(RUST)
	@echo 'building meswitch and installing what it needs into $(VENV): some minutes and 6 GB the first time'
	$(BIN)/maturin develop --release --extras dev
	@touch $@

demo: $(BUILT) ## train a tiny base and three fine-tunes, compress, route and serve them
	$(BIN)/meswitch demo

test: $(BUILT) ## run the tests of both languages, Rust's with checked arithmetic
	cargo test --release $(CHECKED) -p meswitch-core
	cargo test -p meswitch-cuda
	$(MAKE) --no-print-directory interleavings
	$(BIN)/python -m pytest

test-models: $(BUILT) ## serve a tiny model of every class of transformers, and compare it with the class alone
	$(BIN)/python -m pytest -m slow tests/test_causal_models.py

interleavings: ## play the threads of a residency in thousands of orders
	RUSTFLAGS='--cfg shuttle -D warnings' cargo test --profile interleavings --target-dir target/shuttle \
		-p meswitch-core --no-default-features --lib interleavings

miri: ## run layout, residency and scalar kernels under Miri, which nightly Rust must have
	@cargo +nightly miri --version >/dev/null 2>&1 || { echo 'Miri is missing: rustup toolchain install nightly -c miri -c rust-src'; exit 1; }
	MIRIFLAGS=-Zmiri-disable-isolation cargo +nightly miri test -p meswitch-core

cuda-check: $(BUILT) ## run the CUDA kernels on the host under sanitizers, break them on purpose
	$(BIN)/python cuda/check/sanitizers.py
	$(BIN)/python cuda/check/mutations.py

lint: $(BUILT) lint-aarch64 ## check format, lints, types, stubs and documentation
	cargo fmt --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy -p meswitch-core --no-default-features --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --no-deps -p meswitch-core
	$(BIN)/python tests/msrv.py
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/stubtest meswitch._native

lint-aarch64: ## check what is compiled for 64-bit Arm only, where Rust and C can be compiled for it
	@if [ ! -d "$$("$${RUSTC:-rustc}" --print target-libdir --target $(AARCH64))" ]; then \
		echo 'skipped: $(AARCH64) is not checked without Rust for it: rustup target add $(AARCH64)'; \
	elif [ -z "$$CC_aarch64_unknown_linux_gnu" ] && ! command -v aarch64-linux-gnu-gcc >/dev/null; then \
		echo 'skipped: $(AARCH64) is not checked without aarch64-linux-gnu-gcc or CC_aarch64_unknown_linux_gnu'; \
	else \
		cargo check -p meswitch-core --target $(AARCH64); \
	fi

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

wheel: $(BIN)/maturin $(NVCC) ## build the source distribution, and of it a wheel, into dist/
	$(BIN)/python -m pip install --quiet 'maturin[zig]>=1.9.4,<2'
	rm -rf dist $(SDIST)
	$(BIN)/maturin sdist --out dist
	mkdir -p $(SDIST)
	tar -xzmf dist/*.tar.gz -C $(SDIST) --strip-components 1 # -m: new files to cargo, which goes by their times
	cd $(SDIST) && maturin build --release $(MANYLINUX) --target-dir $(CURDIR)/target --out $(CURDIR)/dist

wheel-check: wheel ## install the wheel into an empty environment and use it there
	$(BIN)/python tests/wheel.py dist

gpu-wheel: wheel ## build the wheel and fetch what it needs on a machine without a network but with torch, into dist/gpu/
	$(BIN)/python cuda/check/gpu_wheels.py dist/*.whl dist/gpu --python $(GPU_PYTHON)

gpu-check: ## on a machine with an NVIDIA GPU and torch: check and measure everything there, with dist/gpu/ if it is there
	$(PYTHON) cuda/check/gpu_check.py

clean: ## remove everything that was built
	rm -rf $(VENV) $(DOCS) site dist gpu-report target python/meswitch/_native.*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find python tests benches -name __pycache__ -type d -prune -exec rm -rf {} +
