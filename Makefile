# Everything starts from a machine with Python 3.11, pip and make.
# `make demo` and `make test` create .venv and install from constraints.txt.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check testbed architectures bench clean

demo: .venv/installed
	$(BIN)/moesteer demo

test: check
	$(BIN)/pytest

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

# Retrains both bundled models into build/testbed (about an hour on one core).
testbed: .venv/installed
	mkdir -p build/testbed
	$(BIN)/python -m moesteer.testbed.train --out build/testbed

# Writes docs/architectures.md for the installed transformers.
architectures: .venv/installed-dev
	$(BIN)/python docs/architectures.py

bench: .venv/installed-dev
	$(BIN)/python benchmarks/run.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("moesteer needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
