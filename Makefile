# Everything that a person or CI runs. `make run` and `make test` need Python >= 3.11 and a C++17 compiler, nothing else.
PYTHON ?= python3
VENV ?= .venv
DATA ?= ../shared/data
BIN := $(VENV)/bin

# The install is editable: Python sources are used where they lie, and only what is compiled outdates it. Stamps say what is
# installed: `lint` holds what `test` does, and `test` what `run` does.
SOURCES := pyproject.toml $(shell find cuda_ext -type f)
RUN_READY := $(VENV)/ready-run
TEST_READY := $(VENV)/ready-test
LINT_READY := $(VENV)/ready-lint

# The tests' build compiles the CUDA sources, too, where nvcc is found: a GPU is not needed for that.
TEST_CUDA := $(if $(shell command -v nvcc),ON,OFF)

PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PIP_INSTALL := $(PIP) install
CUDA_ON := --config-settings=cmake.define.SPDNN_CUDA=ON
# make LOCKED=1 test: in the versions of .ci/requirements.txt, whose files must have the hashes that stand there (.ci/lock).
INSTALL_LOCKED = $(if $(LOCKED),$(PIP_INSTALL) --require-hashes --requirement=.ci/requirements.txt)
TEST_BUILD := --config-settings=cmake.define.SPDNN_CUDA=$(TEST_CUDA)

PYTHONS = $(shell IFS=:; for folder in $$PATH; do ls $$folder/python3.1[1-9] $$folder/python3.[2-9][0-9]; done 2>/dev/null)

.PHONY: run test fuzz tsan examples lint docs wheel wheel-cpu wheel-cuda gpu-install gpu-check gpu-bench clean

run: $(RUN_READY)
	@$(BIN)/spdnn --flagfile=configs/1024x120.flags
	@printf '\nNext: . %s/activate, then spdnn --help, spdnn doctor, or import spdnn_jax as README.md shows.\n' '$(BIN)'

# Processes take all cores: threads of a BLAS beside them would do little but wait, spinning.
test: $(TEST_READY)
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=worksteal

# A million damaged files, and every byte of small ones: half an hour on two cores. The tests try some hundreds.
fuzz: $(TEST_READY)
	SPDNN_FUZZ=1 $(BIN)/python -m pytest --numprocesses=auto tests/test_fuzz.py tests/test_plan.py tests/test_network.py

# The native core under ThreadSanitizer; `make test` runs it under those for addresses and undefined behaviour.
tsan: $(TEST_READY)
	SPDNN_SANITIZER=thread SPDNN_FUZZ=1 $(BIN)/python -m pytest tests/cuda_ext/test_sanitized.py

# In full; tests/examples runs them on a small size. The trained network is looked for in DATA.
examples: $(TEST_READY)
	@for name in $(if $(wildcard $(DATA)/trained),trained,) challenge sharded finetune; do \
	  echo "examples/$$name.py:"; $(BIN)/python examples/$$name.py $$([ $$name = trained ] && echo '$(DATA)') || exit 1; done

lint: $(LINT_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'tests/*.h' 'tests/*.cc' 'tests/*.cuh' 'cuda_ext/*.h' 'cuda_ext/*.cc' 'cuda_ext/*.cu' 'cuda_ext/*.cuh')

# The pages, as a site in build/docs; a warning fails. The tests build them, too.
docs: $(TEST_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# A wheel for CPUs in dist/cpu and, where nvcc is found, one with CUDA in dist/cuda. Each is installed into an empty
# environment, without a compiler or the source tree in reach, and runs a network there.
wheel: wheel-cpu $(if $(filter ON,$(TEST_CUDA)),wheel-cuda)

wheel-cpu wheel-cuda: wheel-%: | $(BIN)/python
	rm -rf dist/$*
	$(PIP) wheel --no-deps --wheel-dir=dist/$* --config-settings=build-dir=build/wheel-$* \
	  --config-settings=cmake.define.SPDNN_CUDA=$(if $(filter cuda,$*),ON,OFF) .
	$(BIN)/python -m venv dist/$*/venv
	cd dist/$* && export CC=false CXX=false PYTHONSAFEPATH=1 && \
	  venv/bin/python -m pip --disable-pip-version-check --quiet install "$$(ls *.whl)[data]" && \
	  venv/bin/python -c 'from spdnn_jax import _native; assert _native.has_cuda_library() == ("$*" == "cuda")' && \
	  PATH= venv/bin/spdnn --neurons=256 --layers=12 --features=500 --backend=cpu
	rm -rf dist/$*/venv
	@ls -l dist/$*/*.whl

# These two run where the GPU is, with that machine's own Python, JAX and nvcc, and without a network.
gpu-check: gpu-install
	SPDNN_REQUIRE_CUDA=1 XLA_PYTHON_CLIENT_PREALLOCATE=false $(PYTHON) -m pytest -q
	$(PYTHON) -m benchmarks.cuda_ext.sanitize

# make gpu-bench BENCH='--only=networks --mnist_dir=.carry' chooses what is measured.
gpu-bench: gpu-install
	$(PYTHON) -m benchmarks.cuda_ext.gpu $(BENCH)

gpu-install:
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable . $(CUDA_ON)

$(RUN_READY): $(SOURCES) | $(BIN)/python
	@rm -f $(TEST_READY) $(LINT_READY)
	@echo 'Building and installing into $(VENV): about a minute, most of it for what pip fetches.'
	@$(PIP_INSTALL) --editable '.[data]'
	touch $@

$(TEST_READY): $(SOURCES) | $(BIN)/python
	rm -f $(LINT_READY)
	@echo 'Building and installing into $(VENV)$(if $(filter ON,$(TEST_CUDA)), with the CUDA back end: some minutes).'
	$(INSTALL_LOCKED)
	$(PIP_INSTALL) --editable '.[test]' $(TEST_BUILD)
	touch $(RUN_READY) $@

$(LINT_READY): $(SOURCES) | $(BIN)/python
	$(INSTALL_LOCKED)
	$(PIP_INSTALL) --editable '.[test,lint]' $(TEST_BUILD)
	touch $(RUN_READY) $(TEST_READY) $@

$(BIN)/python:
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'PYTHON=$(PYTHON) is no Python 3.11 or newer. On the PATH: $(or $(strip $(PYTHONS)),none; install one)'; exit 1; }
	@'$(PYTHON)' -m venv $(VENV)

clean:
	rm -rf build dist $(VENV)
