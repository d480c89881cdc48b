# Two commands for a newcomer: `make bench` and `make test`. Both set up what they need first.
#
# An active virtual environment (or conda environment) is used as it is, with the torch that is in it; otherwise one is made
# in .venv with $(PYTHON). See scripts/setup.sh for how torch is chosen.

PYTHON ?= python3
ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
ENVIRONMENT := $(or $(ACTIVE),.venv)
BIN := $(ENVIRONMENT)/bin
STAMP := build/.ready-$(subst /,_,$(abspath $(ENVIRONMENT)))

.PHONY: bench test lint types format setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py scripts/setup.sh
	PYTHON=$(PYTHON) bash scripts/setup.sh $(ENVIRONMENT)
	@mkdir -p build && touch $@

bench: setup
	$(BIN)/python -m logitless.bench

test: setup
	$(BIN)/python -m pytest -q

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The folders are packages only once they are installed, so the checker reads what a wheel would hold.
types: setup
	rm -rf build/types
	$(BIN)/python setup.py -q build --build-base build/types-work --build-lib build/types
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p logitless

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
