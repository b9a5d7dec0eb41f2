# Everything a newcomer needs, by name. `make` alone prints the list.

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

# Small models on a few cores run many times faster on one thread than on two that wait for each other.
export OMP_NUM_THREADS ?= 1
# Those that do wait for each other, as in tests that need two, sleep meanwhile.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-all test test-fast docs results check

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## Make .venv and install narvl with all it needs into it (1 to 5 minutes, 6 GB)

demo: $(INSTALLED) ## Train, generate, score and report on a small embedded data set (10 to 20 minutes)
	bash run_scripts/caption.sh PRESET=quick

demo-all: $(INSTALLED) ## The same for all tasks: captions, boxes, sets of boxes, entailment, questions (an hour or more)
	for task in caption refcoco regions scene_graph scene_tree snli_ve gqa vqa; do bash run_scripts/$$task.sh PRESET=quick || exit; done

test: $(INSTALLED) ## Run all tests
	$(VENV)/bin/python -m pytest -n auto --dist worksteal

test-fast: $(INSTALLED) ## Run the quick tests, of less than a second each (1 to 2 minutes)
	$(VENV)/bin/python -m pytest -n auto --dist worksteal -m "not integration"

docs: $(INSTALLED) ## Build the documentation into docs/_build/html, without a network
	$(VENV)/bin/python -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build/html

results: $(INSTALLED) ## Render docs/results/, RESULTS.md and README's table from docs/results/data/
	$(VENV)/bin/python docs/results/make.py

check: $(INSTALLED) ## Lint, check the formatting, the types, and that imports keep to their borders
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo

# The stamp is newer than setup.py as long as what setup.py asks for is installed.
$(INSTALLED): setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 11) <= v < (3, 13) or sys.exit( \
	  f"narvl needs Python 3.11 or 3.12, $(PYTHON) is {v.major}.{v.minor}: make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --editable '.[dev]'
	@touch $@
