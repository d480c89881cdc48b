# Two commands for a newcomer: `make bench` and `make test`. Both set up what they need first. On a GPU: `make test-gpu`,
# `make bench-gpu` and the others of bench/results/PENDING.md, which install nothing.
#
# An active virtual environment (or conda environment) is used as it is, with the torch that is in it; otherwise one is made
# in .venv with $(PYTHON). See scripts/setup.sh for how torch is chosen.

PYTHON ?= python3
ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
ENVIRONMENT := $(or $(ACTIVE),.venv)
BIN := $(ENVIRONMENT)/bin
CXX_SOURCES = $(shell find csrc tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc')
NAME := $(subst /,_,$(abspath $(ENVIRONMENT)))
STAMP := build/.ready-$(NAME)
# Measuring needs less than the tests and the checks: `make bench` alone installs no more.
BENCH_STAMP := build/.ready-bench-$(NAME)
NEEDED := $(if $(filter bench,$(MAKECMDGOALS)),$(if $(wildcard $(STAMP)),$(STAMP),$(BENCH_STAMP)),$(STAMP))

.PHONY: bench test test-models test-distributed test-blas test-gpu sanitize-gpu bench-gpu bench-gpu-losses bench-gpu-policy bench-gpu-train \
	bench-gpu-grid bench-gpu-limits bench-gpu-curves tune-gpu lint types format setup ext clean

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py scripts/setup.sh
	PYTHON=$(PYTHON) bash scripts/setup.sh $(ENVIRONMENT) bench,test,dev
	@mkdir -p build && touch $@

$(BENCH_STAMP): pyproject.toml setup.py scripts/setup.sh
	PYTHON=$(PYTHON) bash scripts/setup.sh $(ENVIRONMENT) bench
	@mkdir -p build && touch $@

# The kernels of csrc that this machine can build, in place; nothing is compiled twice. LOGITLESS_EXT=cpu,cuda insists on both.
ext: $(NEEDED)
	$(BIN)/python setup.py -q build_ext --inplace

bench: ext
	$(BIN)/python -m logitless.bench

# The tensors are small: a process for each core is faster than threads.
test: ext
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal

# Every causal, image-text and multimodal class of transformers at tiny size, in one process: about 2 minutes. `make test` runs
# one class of each kind.
test-models: $(NEEDED)
	LOGITLESS_EVERY_CLASS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 0 tests/models/test_every_class.py

# Real DeepSpeed engines and TRL trainers on 2 ranks: about 3 minutes. Needs the extra `distributed`, which this installs.
TORCHRUN = OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 2

test-distributed: ext
	$(BIN)/python -c "import deepspeed" 2>/dev/null || DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --no-build-isolation -e ".[distributed]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 0 tests/distributed
	$(TORCHRUN) -m tests.distributed.deepspeed_stages
	$(TORCHRUN) -m tests.distributed.trl_trainers

# The tests of Triton's interpreter with the matrix products of other CPUs. BLAS_CORES="Haswell SkylakeX" names some.
BLAS_CORES ?= Haswell

test-blas: $(NEEDED)
	bash scripts/test_blas.sh $(BIN)/python $(BLAS_CORES)

# The next ten run on $(PYTHON) as it is, and install nothing: torch and Triton must be there, pytest for the first two; nvcc
# adds the backend cuda. What the caller's PYTHONPATH brings is used: TRL, Liger and Cut Cross-Entropy take part if they can be
# imported, matplotlib adds figures. Each ends within 10 minutes on one H100; bench/results/PENDING.md says what to run first.
# FLAGS: more arguments of the benchmark, such as FLAGS="--providers gemm torch logitless".
RESULTS ?= bench/results
FLAGS ?=
TOOL ?= both

test-gpu:
	bash scripts/test_gpu.sh $(PYTHON)

# TOOL=memcheck or racecheck: one of them alone, which takes half of the time.
sanitize-gpu:
	bash scripts/sanitize_gpu.sh $(PYTHON) $(TOOL)

GPU_SUITES_bench-gpu := ceilings gpu
GPU_SUITES_bench-gpu-losses := gpu-losses
GPU_SUITES_bench-gpu-policy := gae policy-gpu
GPU_ROUNDS_bench-gpu := 10
GPU_ROUNDS_bench-gpu-losses := 5
GPU_ROUNDS_bench-gpu-policy := 5

bench-gpu bench-gpu-losses bench-gpu-policy:
	name=$$($(PYTHON) -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))') && \
	bash scripts/gpu_run.sh $(PYTHON) -m logitless.bench --suite $(GPU_SUITES_$@) --device cuda \
		--rounds $(GPU_ROUNDS_$@) --time-limit 420 --profile --out $(RESULTS)/gpu-$$name $(FLAGS)

# Whole training steps, which need TRL, datasets and what these import; the memory that a step needs; loss curves.
TRAINING_bench-gpu-train := steps
TRAINING_bench-gpu-grid := grid
TRAINING_bench-gpu-limits := longest largest
TRAINING_bench-gpu-curves := curves options

bench-gpu-train bench-gpu-grid bench-gpu-limits bench-gpu-curves:
	name=$$($(PYTHON) -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))') && \
	PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True bash scripts/gpu_run.sh $(PYTHON) -m logitless.bench.training \
		--suite $(TRAINING_$@) --device cuda --time-limit 420 --out $(RESULTS)/gpu-$$name $(FLAGS)

# Configurations of the Triton kernels for this GPU, at the shapes of `make bench-gpu`. The file can replace
# kernels/backends/triton/tuning/configs.json; scripts/gpu_constants.py reads the times.
tune-gpu:
	bash scripts/gpu_run.sh $(PYTHON) -m logitless.cli tune --dtype bf16 --time-limit 420 \
		--export $(RESULTS)/triton-configs.json --timings $(RESULTS)/triton-timings.json \
		--shape tokens=8192,hidden=4096,vocab=151936 \
		--shape tokens=8192,hidden=2304,vocab=256000,softcap=1 \
		--shape tokens=16384,hidden=2048,vocab=151936 \
		--shape tokens=8192,hidden=1024,vocab=151936 \
		--shape tokens=8192,hidden=4096,vocab=128256

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

# The folders are packages only once they are installed, so the checker reads what a wheel would hold.
types: setup
	rm -rf build/types
	LOGITLESS_EXT=none $(BIN)/python setup.py -q build --build-base build/types-work --build-lib build/types
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p logitless

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean:
	rm -rf build dist *.egg-info kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
