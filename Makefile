# Two commands for a newcomer: `make bench` and `make test`. Both set up what they need first. On a GPU: `make test-gpu`
# and `make bench-gpu`.
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
# Measuring needs less than the tests and the checks: `make bench` and `make tune-gpu` alone install no more.
BENCH_STAMP := build/.ready-bench-$(NAME)
NEEDED := $(if $(filter bench tune-gpu,$(MAKECMDGOALS)),$(if $(wildcard $(STAMP)),$(STAMP),$(BENCH_STAMP)),$(STAMP))

.PHONY: bench tune-gpu test lint types format setup ext clean

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

# Configurations of the Triton kernels for this GPU, at the shapes of Qwen3 8B, Llama 3 8B, 2048 and 1024 hidden with Qwen's
# vocabulary, and Gemma 2 2B. The file can replace kernels/triton_kernels/configs.json.
tune-gpu: $(NEEDED)
	$(BIN)/python -m logitless.cli tune --dtype bf16 --export bench/results/triton-configs.json \
	  --shape tokens=8192,hidden=4096,vocab=151936 \
	  --shape tokens=8192,hidden=4096,vocab=128256 \
	  --shape tokens=16384,hidden=2048,vocab=151936 \
	  --shape tokens=8192,hidden=1024,vocab=151936 \
	  --shape tokens=8192,hidden=2304,vocab=256000,softcap=1

# The tensors are small: a process for each core is faster than threads.
test: ext
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8

# The next two run on $(PYTHON) as it is, and install nothing: torch, Triton and pytest must be there; nvcc adds the backend
# cuda. Each ends within 9 minutes on one H100.
test-gpu:
	bash scripts/test_gpu.sh $(PYTHON)

# TRL, Liger and Cut Cross-Entropy take part if they are installed; matplotlib adds the figure.
bench-gpu bench-gpu-policy:
	tree=$$(bash scripts/gpu_tree.sh $(PYTHON)) && \
	name=$$($(PYTHON) -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))') && \
	PYTHONPATH=$$tree PYTHONSAFEPATH=1 $(PYTHON) -m logitless.bench --suite $(if $(filter %-policy,$@),policy-gpu gae,gpu) \
		--device cuda --rounds 10 --time-limit 420 --out bench/results/gpu-$$name

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
