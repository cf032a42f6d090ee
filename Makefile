# What there is to do, in the words that CI uses too.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0

.PHONY: demo test lint types docs bench gpu tiny clean

# Fine-tune the embedded model and show what changed: two minutes on two cores.
demo: .venv/demo
	$(BIN)/python docs/demo.py

# Three at once also on two cores: many wait for processes that they started.
test: .venv/dev
	$(BIN)/python -m pytest -n 3 --dist worksteal tests

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev
	$(BIN)/mypy

# Check that what the docs show exists and runs.
docs: .venv/dev
	$(BIN)/python -m pytest -n 2 tests/docs

# Measure, write docs/benchmarks/*.json and the tables of docs/performance.md.
bench: .venv/dev
	$(BIN)/python -m tests.benchmarks

# What needs CUDA: correctness, then measurements, in ten minutes; without a network.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m tests.gpu

# Make the embedded model again, from nothing.
tiny: .venv/dev
	$(BIN)/python -m mytune.assets.make_tiny

clean:
	rm -rf .venv dist outputs

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --editable '.[plot]'
	touch $@

.venv/dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --editable '.[dev]'
	touch $@
