# make demo | test | test-kill | test-mutants | lint | bench: everything a fresh clone needs is made on the way.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 20000

.PHONY: demo demo-short test test-kill test-mutants lint bench clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nestling needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[hf]' \
		|| echo "no transformers from this package source: the tests of pre-trained models will say that they skip"
	touch $@

demo: $(VENV)/installed
	$(BIN)/nestling demo --out runs/demo

demo-short: $(VENV)/installed
	$(BIN)/nestling demo --short --out runs/demo-short

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=12

test-kill: $(VENV)/installed
	$(BIN)/python tests/kills.py --kills 20
	OMP_NUM_THREADS=1 $(BIN)/python tests/life_kills.py --kills 100

test-mutants: $(VENV)/installed
	$(BIN)/python tests/mutants.py

bench: $(VENV)/installed
	$(BIN)/python benchmarks/sequence.py

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
