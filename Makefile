# Everything runs in .venv, which `make setup` makes from whatever Python is there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test check format bench soak soak-loader soak-memory soak-ranks clean

help:
	@echo "make demo    train on handwritten digits (sets up .venv first)"
	@echo "make test    run every test"
	@echo "make check   format, lint and types, as CI does"
	@echo "make format  rewrite the code in the project's format"
	@echo "make bench   print the benchmarks"
	@echo "make soak    kill and resume a run hundreds of times"
	@echo "make soak-loader  leave a loader's processes early, 50 times"
	@echo "make soak-memory  look at memory over many steps of varying shapes"
	@echo "make soak-ranks  let ranks fail at random, a hundred times"
	@echo "make clean   remove .venv and caches"

setup: $(STAMP)

# torch comes first, as the CPU build of this version: other versions bring gigabytes.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[cpu,dev]'
	$(BIN)/mlx-fit doctor --fix-blas
	touch $(STAMP)

demo: $(VENV)/.demo
	$(BIN)/mlx-fit demo

# The demo needs no development tools.
$(VENV)/.demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[cpu]'
	$(BIN)/mlx-fit doctor --fix-blas
	touch $(VENV)/.demo

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/python benchmarks/fit.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/blas.py
	$(BIN)/python benchmarks/imports.py
	$(BIN)/python benchmarks/checkpoints.py
	$(BIN)/python benchmarks/text.py
	$(BIN)/python benchmarks/chunked_loss.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/distributed.py

soak: setup
	$(BIN)/python tests/soak.py --stages 250 --kills 300
	$(BIN)/python tests/soak.py --fresh --kills 30

soak-loader: setup
	$(BIN)/python tests/soak_loader.py --times 50 --workers 2

soak-ranks: setup
	$(BIN)/python tests/soak_ranks.py --rounds 100

soak-memory: setup
	$(BIN)/python tests/soak_memory.py
	$(BIN)/python tests/soak_memory.py --eager

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist
