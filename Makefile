# `make demo` and `make test` are each enough on a bare machine with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# For Linux without a GPU: make demo PIP_ARGS="--index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple"
PIP_ARGS ?=
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all check install ui bench clean

demo: install
	$(BIN)/python pipelines/workflow.py run digits --demo

test: install
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: install
	$(BIN)/python -m pytest -m "not gpu"

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(MAKE) test VENV=$(VENV)

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install $(PIP_ARGS) --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

ui: install
	$(BIN)/mlflow ui --backend-store-uri sqlite:///$(CURDIR)/runs/mlflow.db

bench: install
	$(BIN)/python benchmarks/step.py digits --device cpu

clean:
	rm -rf runs build .pytest_cache .ruff_cache
