PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
TOOLS := setuptools wheel pybind11 cmake ninja numpy torch
SANITIZERS := address,undefined
SANITIZED := $(CURDIR)/build/sanitized
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
BUILD_FILES := pyproject.toml setup.py CMakeLists.txt $(CPP)

.PHONY: setup build demo test test-sanitize test-gpu bench check clean

setup: $(VENV)/.installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The build imports nothing from torch but reads its headers, so torch comes first.
$(VENV)/.tools: constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt $(TOOLS)
	touch $@

$(VENV)/.installed: $(VENV)/.tools $(BUILD_FILES)
	$(PIP) install --no-build-isolation -c constraints.txt -e ".[dev,demo,compat]"
	touch $@

build: $(VENV)/.tools
	$(BIN)/python setup.py build_ext --inplace

demo: setup
	$(BIN)/esper demo $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

# The native code under AddressSanitizer and UBSan, in a build of its own. Leaks are not looked for:
# Python and torch keep memory until the process ends.
test-sanitize: setup
	ESPER_SANITIZE=$(SANITIZERS) ESPER_CUDA=OFF $(PIP) install --no-build-isolation --no-deps \
		--no-index --upgrade --target $(SANITIZED) .
	LD_PRELOAD="$(foreach lib,asan ubsan stdc++,$(shell g++ -print-file-name=lib$(lib).so))" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		$(BIN)/python -m pytest -o pythonpath=$(SANITIZED) -p no:cacheprovider \
		$(wildcard tests/test_ops_*.py) tests/test_seed_block.py $(ARGS)

# Everything that needs an NVIDIA GPU, in the environment of $(PYTHON) and without a network.
test-gpu:
	$(PYTHON) tests/gpu/session.py $(ARGS)

bench: setup
	$(BIN)/python benchmarks/run.py $(ARGS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

clean:
	rm -rf build dist *.egg-info esper/*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(VENV)/.installed
	find esper kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +
