# One command a need. `make run` and `make test` set everything up first.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: run test check setup slow

run: $(READY)  ## set up, then the main job on the default recipe
	$(BIN)/mi-pipe run

test: $(READY) check  ## set up, then everything that CI runs

check:  ## format, lint, types, layers, tests, docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/python -m docs.generate --check
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not real_model and not storm" --doctest-modules mi_pipe stages flows tests

slow: $(READY)  ## the slow proofs: real model, kill storms
	$(BIN)/mi-pipe models pull smollm2-135m
	$(BIN)/python -m pytest -m "slow or real_model or storm"

setup: $(READY)

# torch first and by version: an index that offers the CPU build of this version serves it.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	touch $(READY)
