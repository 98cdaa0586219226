# make demo, test and docs work on a fresh machine: they make a virtual environment and install what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: check demo test lint docs clean

# torch is pinned here only: an open range may pull a build for another device of several gigabytes.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py
	$(BIN)/python examples/demo_flamingo.py
	$(BIN)/python examples/demo_janusflow.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy mmopt passes exporters

# Every-minute use: the tests of rooms that were changed, and of those that may import them.
check: lint
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $$($(BIN)/python tests/changed.py)

test: lint
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

docs: $(STAMP)
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

clean:
	rm -rf $(VENV) build docs/_build dist out *.egg-info
