# Everything that a person or CI runs. `make run` and `make test` need Python >= 3.11 and a C++17 compiler, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Stamps say what is installed; a changed source outdates them. `lint` holds what `test` does, and `test` what `run` does.
SOURCES := pyproject.toml README.md LICENSE $(shell find spdnn_jax cuda_ext -type f -not -name '*.so' -not -name '*.pyc')
RUN_READY := $(VENV)/ready-run
TEST_READY := $(VENV)/ready-test
LINT_READY := $(VENV)/ready-lint

# The tests' build compiles the CUDA sources, too, where nvcc is found: a GPU is not needed for that.
TEST_CUDA := $(if $(shell command -v nvcc),ON,OFF)

PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check --quiet install
CUDA_ON := -C cmake.define.SPDNN_CUDA=ON
TEST_BUILD := -C cmake.define.SPDNN_CUDA=$(TEST_CUDA)

.PHONY: run test lint gpu-install gpu-check gpu-bench clean

run: $(RUN_READY)
	$(BIN)/spdnn --flagfile=configs/1024x120.flags

# The installed package is tested: PYTHONSAFEPATH keeps the source tree, which holds no compiled core, off the module path.
test: $(TEST_READY)
	PYTHONSAFEPATH=1 $(BIN)/python -m pytest

lint: $(LINT_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'tests/emulator/*.h' 'tests/emulator/*.cc' 'tests/emulator/*.cuh' 'cuda_ext/*.h' 'cuda_ext/*.cc' 'cuda_ext/*.cu' 'cuda_ext/*.cuh')

# These two run where the GPU is, with that machine's own Python, JAX and nvcc, and without a network.
gpu-check: gpu-install
	PYTHONSAFEPATH=1 SPDNN_REQUIRE_CUDA=1 XLA_PYTHON_CLIENT_PREALLOCATE=false $(PYTHON) -m pytest -q
	$(PYTHON) benchmarks/sanitize.py

# make gpu-bench BENCH='--only=networks --mnist_dir=.carry' chooses what is measured.
gpu-bench: gpu-install
	$(PYTHON) benchmarks/gpu.py $(BENCH)

gpu-install:
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps . $(CUDA_ON)

$(RUN_READY): $(SOURCES) | $(BIN)/python
	rm -f $(TEST_READY) $(LINT_READY)
	$(PIP_INSTALL) '.[data]'
	touch $@

$(TEST_READY): $(SOURCES) | $(BIN)/python
	rm -f $(LINT_READY)
	$(PIP_INSTALL) '.[test]' $(TEST_BUILD)
	touch $(RUN_READY) $@

$(LINT_READY): $(SOURCES) | $(BIN)/python
	$(PIP_INSTALL) '.[test,lint]' $(TEST_BUILD)
	touch $(RUN_READY) $(TEST_READY) $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf build $(VENV)
