# Two commands for a fresh machine: `make demo` and `make test`. Both make the environment they need, once.
PYTHON ?= python3
VENV ?= .venv
EXTRA ?= cpu
BIN := $(VENV)/bin

.PHONY: demo test check bench

demo: $(VENV)/.$(EXTRA)
	$(BIN)/python launch.py

test: $(VENV)/.$(EXTRA)-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

check: $(VENV)/.$(EXTRA)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.$(EXTRA)
	$(BIN)/python -m benchmarks.step --quick

# A stamp names the extras that the environment has; it is older than pyproject.toml when they changed.
$(VENV)/.$(EXTRA): pyproject.toml
	$(MAKE) install EXTRAS=$(EXTRA) STAMP=$@

$(VENV)/.$(EXTRA)-test: pyproject.toml
	$(MAKE) install EXTRAS=$(EXTRA),test STAMP=$@

$(VENV)/.$(EXTRA)-dev: pyproject.toml
	$(MAKE) install EXTRAS=$(EXTRA),dev STAMP=$@

.PHONY: install
install:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	touch $(STAMP)
