# `make demo` and `make test` need Python, a C++20 compiler, cmake and make; they make the rest.

PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= .ci/constraints.txt
TORCH_INDEX ?=
EXTRAS      ?=
ARGS        ?=
COMMIT      ?=

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo compare gpu-check test test-cpp test-python lint setup setup-test clean distclean

comma   := ,
bin     := $(VENV)/bin
pip     := $(bin)/python -m pip --disable-pip-version-check
sources := pyproject.toml CMakeLists.txt $(CONSTRAINTS) \
           $(shell find csrc kernels python -type f ! -name '*.pyc' 2>/dev/null)
made    := $(VENV)/.made
ready   := $(VENV)/.ready$(subst $(comma),-,$(EXTRAS:%=-%))
tested  := $(VENV)/.ready-test$(subst $(comma),-,$(EXTRAS:%=-%))

# $(call install,extras): into the environment, with the pinned versions and an incremental build.
install = $(pip) install -q -c $(CONSTRAINTS) --no-build-isolation \
          -C build-dir=build/$(notdir $(VENV)) '.$(if $(1),[$(1)])'

help:
	@echo 'make demo      set up, train the embedded model, show where the results are'
	@echo 'make test      set up, C++ tests under sanitizers, pytest, the packaging test'
	@echo 'make compare   EAPO against the same trainer without an expert (about half an hour)'
	@echo 'make gpu-check build, prove and measure the GPU paths with the Python and torch found here'
	@echo 'make lint      ruff and mypy'
	@echo 'make setup     only the environment and the package'
	@echo 'make clean     remove build folders and caches (distclean: the environment too)'
	@echo
	@echo 'PYTHON=python3.12    another interpreter      VENV=.venv-gpu   another environment'
	@echo 'TORCH_INDEX=URL      package index that holds the torch build you want'
	@echo 'EXTRAS=gpu,flash     optional dependencies    CONSTRAINTS=FILE other pinned versions'
	@echo 'ARGS="--steps 20"    options of demo, compare or pytest'

demo: setup
	$(bin)/eapo-fast demo $(ARGS)

compare: setup
	$(bin)/eapo-fast compare $(ARGS)

# Needs no network and installs nothing outside a scratch folder.
gpu-check:
	PYTHONPATH=benchmarks$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m gpu_check $(COMMIT:%=--commit %) $(ARGS)

test: setup-test test-cpp test-python

test-cpp:
	@PYTHON='$(PYTHON)' .ci/tools
	cmake -S . -B build/sanitize -DCMAKE_BUILD_TYPE=RelWithDebInfo -DEAPO_FAST_PYTHON=OFF \
	  -DEAPO_FAST_TESTS=ON
	unset MAKEFLAGS MFLAGS MAKELEVEL; cmake --build build/sanitize --parallel
	ctest --test-dir build/sanitize --output-on-failure

test-python: setup-test
	$(bin)/pytest $(ARGS)

lint: setup-test
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy -p eapo_fast

setup: $(ready)

setup-test: $(tested)

$(made): $(CONSTRAINTS) .ci/tools
	@PYTHON='$(PYTHON)' .ci/tools
	@echo 'making the environment $(VENV)'
	$(PYTHON) -m venv $(VENV)
	$(pip) install -q -c $(CONSTRAINTS) scikit-build-core pybind11 ninja
ifneq ($(TORCH_INDEX),)
	$(pip) install -q -c $(CONSTRAINTS) --index-url $(TORCH_INDEX) torch
endif
	@touch $@

$(ready): $(made) $(sources)
	@echo 'installing eapo_fast and what it needs (the first time takes a minute or two)'
	$(call install,$(EXTRAS))
	@touch $@

$(tested): $(made) $(sources)
	@echo 'installing eapo_fast and what its tests need (the first time takes a minute or two)'
	$(call install,test$(comma)dev$(EXTRAS:%=$(comma)%))
	@touch $@ $(ready)

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find python kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
