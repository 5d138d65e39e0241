# What CI and people run. Every target is a line or two that can be typed by hand as well.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python)
# the slow tests that CI runs, for pytest's -k
A_FEW ?= every_rename

.DEFAULT_GOAL := help
.PHONY: help setup lint format types test test-few test-all coverage lowest help-docs bench trace

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: ## a virtual environment with everything that the targets below need
	python3 -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -e '.[test]'

lint: ## ruff: rules and format
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: ## ruff puts right what it can
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

types: ## mypy, strict
	$(PYTHON) -m mypy

test: ## what `pytest` alone runs: all but the slow tests
	$(PYTHON) -m pytest

test-few: ## the slow tests that CI runs
	$(PYTHON) -m pytest -m slow -k '$(A_FEW)'

test-all: ## every test, the slow ones with what they counted
	$(PYTHON) -m pytest
	$(PYTHON) -m pytest -m slow -rP

coverage: ## `test` (a process a core, a file a time) and `test-few`, and the lines that they leave out
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --dist loadfile --cov=clipfit --cov-report=
	$(PYTHON) -m pytest -m slow -k '$(A_FEW)' --cov=clipfit --cov-append --cov-report=term

help-docs: ## docs/options.md, docs/help.md and docs/models.md, from what is declared and from open_clip
	$(PYTHON) docs/options.py
	$(PYTHON) docs/architectures.py
	$(PYTHON) docs/models.py

lowest: ## the fast tests under the lowest versions that pyproject.toml promises; writes docs/lowest.md
	nice benchmarks/lowest.sh

bench: ## the short benchmarks, each a table of ratios of one run (under 20 minutes on two cores)
	$(PYTHON) benchmarks/startup.py --turns 3
	$(PYTHON) benchmarks/scan.py --files 10000 100000
	$(PYTHON) benchmarks/step.py --classes 10 --batch 16 --turns 2
	$(PYTHON) benchmarks/memory.py --whole --batch 16
	$(PYTHON) benchmarks/predict.py --images 64 --repeat 2
	$(PYTHON) benchmarks/evaluate.py

trace: ## hashes of what training writes: the same before and after a refactor
	$(PYTHON) benchmarks/trace.py
