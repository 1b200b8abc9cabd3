PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
TOOLS := setuptools wheel pybind11 cmake ninja numpy torch
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
BUILD_FILES := pyproject.toml setup.py CMakeLists.txt $(CPP)

.PHONY: setup build demo test bench check clean

setup: $(VENV)/.installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The build imports nothing from torch but reads its headers, so torch comes first.
$(VENV)/.tools: constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt $(TOOLS)
	touch $@

$(VENV)/.installed: $(VENV)/.tools $(BUILD_FILES)
	$(PIP) install --no-build-isolation -c constraints.txt -e ".[dev,demo]"
	touch $@

build: $(VENV)/.tools
	$(BIN)/python setup.py build_ext --inplace

demo: setup
	$(BIN)/esper demo $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

bench: setup
	$(BIN)/python benchmarks/run.py $(ARGS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

clean:
	rm -rf build dist *.egg-info esper/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(VENV)/.installed
	find esper kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +
