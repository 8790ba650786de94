# Two commands do all: `make demo` runs the main job, `make test` the test suite. Each first makes .venv where needed
# (tools/environment.py), and rebuilds only when csrc/, the build files or torch changed.
#
#   make demo ARGS="recording.npz --out out"      make test ARGS="tests/test_lstm_gates.py -x"
#   make test PYTHON=python3.12 TORCH="torch==2.13.0"      TORCH holds any arguments of pip install
#   make test JOBS=8                                       tests run in as many processes as there are cores

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
RUN := .venv/bin/python
CXX_FILES = $(shell git ls-files '*.cpp' '*.h' '*.inl' '*.cuh' '*.cu')

export TORCH
# Python keeps what it compiled of the modules that it imports, even where the machine says otherwise: tests start some
# hundred processes, and pip leaves that to them (tools/environment.py).
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test sanitize gpu-check gpu bench lint clean

demo:
	@$(PYTHON) tools/environment.py demo io preprocess
	@$(RUN) -m evkernels demo $(ARGS)

test:
	@$(PYTHON) tools/environment.py align compare dask demo io preprocess test train triton
	@$(RUN) -m pytest -p no:logging -n $(JOBS) --dist worksteal $(ARGS)

sanitize:
	@$(PYTHON) tools/environment.py align compare dask demo io preprocess test train triton
	@$(RUN) -m pytest -m sanitizer $(ARGS)

gpu-check:
	@$(PYTHON) tools/environment.py align compare dask demo io preprocess test train triton
	@EVKERNELS_CHECK_ALL_GPUS=1 $(RUN) -m pytest -n $(JOBS) --dist worksteal tests/test_cuda_build.py \
		tests/test_triton_compile.py tests/test_emulation.py tests/test_emulation_warps.py $(ARGS)
	@EVKERNELS_CHECK_ALL_GPUS=1 $(RUN) tests/gpu_resources.py

# On a machine with a GPU: all tests on the device, sanitizer, benchmark and table. ARGS="--jobs 8"
gpu:
	@$(PYTHON) tools/gpu.py --check
	@$(PYTHON) tools/environment.py align bench compare dask demo io preprocess test train triton
	@$(RUN) tools/gpu.py $(ARGS)

bench:
	@$(PYTHON) tools/environment.py bench test
	@$(RUN) -m benchmarks $(ARGS)

lint:
	@$(PYTHON) tools/environment.py dev
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@.venv/bin/clang-format --dry-run --Werror $(CXX_FILES)

clean:
	@rm -rf .venv build dist *.egg-info evkernels/*.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	@find csrc evkernels triton_kernels tests benchmarks tools -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
