# make demo   the whole round on made-up data, ending with demo/index.html
# make test   the tests, without the slow ones of faults
# make faults those of bad files, full disks and interruptions, the slow ones too (docs/faults.md)
# make lint   ruff and mypy
# make docs   docs/recipes.md, from the schema
#
# Each makes $(VENV) and installs what it needs, once. Another Python: make test PYTHON=python3.12
# Tests in four processes: make test JOBS=4. Options for pytest: make test PYTEST_ARGS="-k dice"
# Options for pip (an index with CPU-only torch makes a much smaller download): make demo PIP_ARGS="..."

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
JOBS ?= 2
DEMO_ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.sdseg-ready
# A virtual environment must not be steered by the one that make was called from.
unexport PYTHONHOME

.PHONY: help demo test faults lint docs install clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed '/^A virtual/,$$d'

install: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "sdseg needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Use: make PYTHON=..." >&2; exit 2; }
	@echo "installing sdseg and its libraries into $(VENV); the first time this takes minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) "pip>=25.1"
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --editable . --group dev
	@touch $@

demo: $(READY)
	$(BIN)/sdseg demo $(DEMO_ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile -m "not (slow and faults)" $(PYTEST_ARGS)

faults: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile -m faults $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python -c "from pathlib import Path; from sdseg_cli.core.recipe_reference import recipe_reference; \
		Path('docs/recipes.md').write_text(recipe_reference(), encoding='utf-8')"

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
