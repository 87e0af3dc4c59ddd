# Every target sets up what it needs by itself: an environment in $(VENV) with this project installed into it.
PYTHON ?= python3
VENV ?= .venv
INTEGRATION_VENV ?= .venv-integration
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INTEGRATION_BIN := $(abspath $(INTEGRATION_VENV))/bin
INTEGRATION_STAMP := $(INTEGRATION_VENV)/.installed

.PHONY: demo test integration zoo perf lint check bench bench-usage clean

demo: $(STAMP)  ## quantize a small network on real data and show what CAT wins back; ARGS="..." adds options
	$(BIN)/python -m benchmarks compare $(ARGS)

# A process a core, each with one thread: together they would slow each other down.
test: $(STAMP)  ## all tests but the slow ones; ARGS="-m slow" runs those
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --dist loadfile $(ARGS)

# In an environment of its own, with pinned toolkits. Two of them compile kernels: ninja, installed there, must be found.
integration: $(INTEGRATION_STAMP)  ## other toolkits' models, corrected; writes results/integration/results.md
	PATH="$(INTEGRATION_BIN):$$PATH" $(INTEGRATION_BIN)/python -m pytest -m integration --disable-warnings tests/integration $(ARGS)

zoo: $(STAMP)  ## a network of each architecture family, quantized (half an hour); writes results/zoo/table.md
	$(BIN)/python -m tests.zoo $(ARGS)

perf: $(STAMP)  ## what applying, fitting and collecting cost, and how that grows; writes results/perf/growth.md
	$(BIN)/python -m pytest benchmarks/perf $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check: lint test

bench-usage:
	@test -n "$(DATA)" -a -n "$(WEIGHTS)" || { echo "usage: make bench DATA=ZIP_OR_FOLDER WEIGHTS=FILE"; exit 2; }

bench: bench-usage $(STAMP)  ## CIFAR-10, three seeds: make bench DATA=cifar10.zip WEIGHTS=resnet20.pt
	$(BIN)/python -m benchmarks compare --dataset cifar10 --data "$(DATA)" --model resnet20 --weights "$(WEIGHTS)" \
		--seeds 0 1 2 $(ARGS)

# The stamp is written last, so that an installation that was interrupted is repeated.
$(STAMP): setup.cfg setup.py
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev,plots]"
	touch $@

$(INTEGRATION_STAMP): setup.cfg setup.py
	test -x $(INTEGRATION_VENV)/bin/pip || $(PYTHON) -m venv $(INTEGRATION_VENV)
	$(INTEGRATION_VENV)/bin/python -m pip install --quiet --editable ".[integration]"
	touch $@

clean:
	rm -rf .venv .venv-integration build dist *.egg-info .pytest_cache .ruff_cache .benchmarks
	find baselines benchmarks cat_plugin tests -name __pycache__ -type d -prune -exec rm -rf {} +
