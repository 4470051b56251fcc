# `make demo` and `make test` are each enough on a bare machine with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# For Linux without a GPU: make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow lint check install ui bench clean
.PHONY: cluster-up cluster-demo cluster-down

demo: install
	$(BIN)/python pipelines/workflow.py run digits-plus

test: install
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow and not gpu"

test-slow: install
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "slow and not gpu"

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint test

install: $(INSTALLED)

# To compile all 20,000 files takes two minutes; Python compiles those that it imports.
PIP_INSTALL = $(BIN)/python -m pip install --no-compile --quiet --constraint constraints.txt $(PIP_ARGS)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable '.[dev]'
	touch $(INSTALLED)

ui: install
	@mkdir -p runs
	@echo 'open http://127.0.0.1:5000/#/experiments?workflowType=machine_learning'
	$(BIN)/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db

cluster-up cluster-down: install
	$(BIN)/python infra/local_cluster.py $(@:cluster-%=%)

cluster-demo: install
	$(BIN)/python infra/local_demo.py

# The RayCluster of infra/kubernetes, whose comments say why each line is there.
ray_cluster.yaml: infra/kubernetes/cluster/cluster.yaml infra/kubernetes/image/kustomization.yaml | install
	@echo '# Written by `make ray_cluster.yaml` from infra/kubernetes/cluster; see docs/kubernetes.md.' > $@
	$(BIN)/kubectl kustomize infra/kubernetes/cluster >> $@

bench: install
	$(BIN)/python benchmarks/step.py mnist --precision bfloat16 --rounds 5
	$(BIN)/python benchmarks/step.py celeba --model.width 0.25 --precision bfloat16 --rounds 5
	$(BIN)/python benchmarks/loader.py mnist --precision bfloat16
	$(BIN)/python benchmarks/startup.py

clean:
	rm -rf runs build .pytest_cache .ruff_cache
