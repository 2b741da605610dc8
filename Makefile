# Two commands for a fresh machine: `make demo` and `make test`. Both create the environment they need, once.
PYTHON ?= python3
VENV ?= .venv
EXTRA ?= cpu
# Test processes: one more than two cores, since the tests of whole runs also wait. Each takes up to 4 GB.
WORKERS ?= 3
BIN := $(VENV)/bin
# The tests start some 300 processes: compiled modules are kept, whatever the environment says.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-fast check bench gpu-check lock

demo: $(VENV)/.$(EXTRA)
	$(BIN)/python launch.py

test: $(VENV)/.$(EXTRA)-test
	$(PYTEST)

# Without the tests that start an engine, import one or take long.
test-fast: $(VENV)/.$(EXTRA)-test
	$(PYTEST) -m "not engine" --ignore tests/real

check: $(VENV)/.$(EXTRA)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/shellcheck .ci/run deploy/*.sh

bench: $(VENV)/.$(EXTRA)
	$(BIN)/python -m benchmarks.step --quick

# On a machine with a GPU: make gpu-check EXTRA=gpu
gpu-check: $(VENV)/.$(EXTRA)
	$(BIN)/python -m benchmarks.gpu_check

# Writes constraints.txt anew: the newest versions that pyproject.toml allows. Run `make test` before
# committing it.
lock:
	rm -rf $(VENV)-lock
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python $(PIP_INSTALL) --editable '.[cpu,dev]'
	grep '^#' constraints.txt > $(VENV)-lock/constraints.txt
	$(VENV)-lock/bin/python -m pip list --format=freeze --exclude-editable --exclude pip --exclude setuptools \
	  --exclude apache-tvm-ffi --exclude triton | sed 's/+cpu$$//' >> $(VENV)-lock/constraints.txt
	mv $(VENV)-lock/constraints.txt constraints.txt
	rm -rf $(VENV)-lock

# A stamp file names the extras that the environment has. It is stale when pyproject.toml or constraints.txt
# is newer.
$(VENV)/.$(EXTRA): pyproject.toml constraints.txt
	$(MAKE) install EXTRAS=$(EXTRA) STAMP=$@

$(VENV)/.$(EXTRA)-test: pyproject.toml constraints.txt
	$(MAKE) install EXTRAS=$(EXTRA),test STAMP=$@

$(VENV)/.$(EXTRA)-dev: pyproject.toml constraints.txt
	$(MAKE) install EXTRAS=$(EXTRA),dev STAMP=$@

.PHONY: install
install:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $(STAMP)
