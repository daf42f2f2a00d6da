# Two commands do all: `make demo` sets up and runs the main job, `make test` sets up and runs every check.
# `make test-all` runs what takes longer beside them: whole tables of operations, searches, mutants.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadgroup
READY := .venv/.ready

.PHONY: demo test test-all lint types clean

demo: $(READY)
	$(BIN)/python -m pegrad train --data digits --out out/demo

test: $(READY) lint types
	$(PYTEST)
	OMP_NUM_THREADS=1 $(PYTEST) --nbmake --nbmake-timeout=300 notebooks

test-all: test
	$(PYTEST) -m slow
	$(BIN)/python tests/mutants/run.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv out
