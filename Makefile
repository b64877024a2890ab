# Everything that a person or CI runs. `make run` and `make test` need Python >= 3.11 and a C++17 compiler, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# The tests' build compiles the CUDA sources, too, where nvcc is found: a GPU is not needed for that.
TEST_CUDA := $(if $(shell command -v nvcc),ON,OFF)

.PHONY: run test lint gpu-check gpu-bench clean

run: $(BIN)/python
	$(PIP) install '.[data]'
	$(BIN)/spdnn --flagfile=configs/1024x120.flags

test: $(BIN)/python
	$(PIP) install '.[test]' -C cmake.define.SPDNN_CUDA=$(TEST_CUDA)
	$(BIN)/python -m pytest

lint: $(BIN)/python
	$(PIP) install '.[test,lint]'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'cuda_ext/*.h' 'cuda_ext/*.cc' 'cuda_ext/*.cu' 'cuda_ext/*.cuh')

# These two run where the GPU is, with that machine's own Python, JAX and nvcc, and without a network.
gpu-install:
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps . -C cmake.define.SPDNN_CUDA=ON

gpu-check: gpu-install
	SPDNN_REQUIRE_CUDA=1 $(PYTHON) -m pytest -q
	$(PYTHON) benchmarks/sanitize.py

gpu-bench: gpu-install
	$(PYTHON) benchmarks/gpu.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf build $(VENV)
