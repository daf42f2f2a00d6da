# Two commands do all: `make demo` sets up and runs the main job, `make test` sets up and runs every check.
# `make test-all` runs what takes longer beside them: whole tables of operations, searches, mutants, other versions of
# PyTorch. `make test-newest` and `make test-oldest` run those alone.
PYTHON ?= python3
BIN := .venv/bin
PYTEST_OPTIONS := -m pytest --numprocesses logical --maxprocesses 8 --dist loadgroup
PYTEST := $(BIN)/python $(PYTEST_OPTIONS)
READY := .venv/.ready

# The oldest PyTorch that pyproject.toml admits, and the newest that there is; all else as in .venv.
oldest := torch==$(shell sed -n 's/.*"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml).*
newest := torch
# What rests on PyTorch's own ways, and what must not change with them.
ON_ANY_TORCH := $(addprefix tests/test_, \
	torch_internals.py rules.py decompositions.py recurrent.py conv_kernels.py strategies.py transforms.py nested.py \
	inlining.py guards.py failures.py fallback.py paths.py views.py joint.py odd_uses.py checkpoint.py modules.py \
	clipping_kinds.py statistics.py sensitivity.py random.py chacha.py compiling.py dp_sgd.py accumulation.py readme.py) tests/distributed src

.PHONY: demo test test-all test-newest test-oldest lint types clean

demo: $(READY)
	$(BIN)/python -m pegrad train --data digits --out out/demo

test: $(READY) lint types
	$(PYTEST)
	OMP_NUM_THREADS=1 $(PYTEST) --nbmake --nbmake-timeout=300 notebooks

test-all: test
	$(PYTEST) -m slow
	$(BIN)/python tests/mutants/run.py
	$(MAKE) test-oldest test-newest

test-newest test-oldest: test-%:
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	grep -v '^torch==' constraints.txt > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --quiet --upgrade --constraint .venv-$*/constraints.txt \
		--editable ".[dev]" "$($*)"
	.venv-$*/bin/python -c "import sys, numpy, torch; print(f'{sys.version=} {numpy.__version__=} {torch.__version__=}')"
	.venv-$*/bin/python $(PYTEST_OPTIONS) $(ON_ANY_TORCH)

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
	rm -rf .venv .venv-newest .venv-oldest out
