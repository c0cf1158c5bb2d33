# The one door: the same commands for a person and for continuous integration. Each sets up what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Test processes; torch runs on one thread in each of them (tests/conftest.py).
WORKERS ?= 2

.PHONY: help setup demo test test-all check format walk bench lab docs clean

help:
	@echo "make setup     .venv with pinned packages (Python 3.11 to 3.13, about 2 GB of disk)"
	@echo "make demo      the whole story: text, training, release, audit, server, one page (about 10 minutes)"
	@echo "make test      the default tests: no network, no GPU"
	@echo "make test-all  the default tests and the slow ones"
	@echo "make check     style, formatting and types"
	@echo "make format    rewrite the source in the house format"
	@echo "make walk      every stop from a text file to a served token, told while it runs"
	@echo "make bench     measurements beside other programs (bench/)"
	@echo "make lab       studies (lab/)"
	@echo "make docs      check that what the documents say is so"
	@echo "make clean     remove what builds and tests left behind; .venv, the demo, runs and keys stay"

setup: $(READY)

# torch goes first and exactly as pinned: chosen by pip itself, it may bring gigabytes of CUDA to a machine without a GPU.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "trinity needs Python 3.11 to 3.13; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || echo absent)." \
	       "Try: make setup PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/pip || { $(PYTHON) -m venv $(VENV) || { \
	  echo "python3 -m venv failed: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }; }
	@echo "Installing the environment into $(VENV): a minute or two, about 2 GB."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[sign,dev]'
	@touch $(READY)

demo: setup
	$(BIN)/trinity demo --out demo

test: setup
	$(BIN)/pytest -n $(WORKERS) --dist worksteal

test-all: setup
	$(BIN)/pytest -n $(WORKERS) --dist worksteal -m 'not gpu'

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

walk: setup
	$(BIN)/pytest -v -s tests/walk

bench: setup
	@for script in bench/*.py; do test -e "$$script" || { echo "bench/ has no script yet"; break; }; \
	  echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

lab: setup
	@for script in lab/*/run.py; do test -e "$$script" || { echo "lab/ has no study yet"; break; }; \
	  echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

docs: setup
	$(BIN)/pytest -v tests/law/test_docs.py

clean:
	rm -rf walk build dist .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
