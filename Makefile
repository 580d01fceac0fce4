# The two commands are `make demo` and `make test`; both set up what they need. `make help` lists the others.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := qemu-utils qemu-system-common libnbd-bin nbdkit fio e2fsprogs

.PHONY: help demo test test-long check bench docs clean peers

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.runtime ## back up a real disk that is being written to, in all three modes, and verify
	$(BIN)/blocklayer demo

test: $(VENV)/.dev peers ## install what the tests need, and run them
	$(BIN)/python -m pytest -n 2 -m "not long"

test-long: $(VENV)/.dev peers ## the same with the long ones: thousands of seeds
	BLOCKLAYER_SEEDS=2000 $(BIN)/python -m pytest -n 2 --timeout 3600

check: $(VENV)/.dev ## ruff, mypy, import-linter, tidy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_tidy.py

bench: $(VENV)/.dev peers ## every benchmark beside its peer, as a table
	$(BIN)/python -m benchmarks --readme README.md

docs: $(VENV)/.dev ## reference pages from docstrings, into site/
	$(BIN)/pdoc --docformat markdown -o site blocklayer '!blocklayer.cli'

peers: # the programs that tests compare with, where they can be installed
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	  missing=$$(for p in $(PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || echo $$p; done); \
	  if [ -n "$$missing" ]; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; \
	  fi; \
	fi

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml constraints-dev.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints-dev.txt -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints-dev.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints-dev.txt -e '.[dev,fast]'
	@touch $@ $(VENV)/.runtime

clean: ## remove what the other targets made
	rm -rf $(VENV) site dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
