# What CI and people run. Every target is a line or two that can be typed by hand as well.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python)

.DEFAULT_GOAL := help
.PHONY: help setup lint format types test test-all coverage trace

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

test-all: ## every test, the slow ones too, and what they counted
	$(PYTHON) -m pytest -m 'slow or not slow' -rP

coverage: ## `test`, and which lines it leaves out
	$(PYTHON) -m pytest --cov=clipfit --cov-report=term

trace: ## hashes of what training writes: the same before and after a refactor
	$(PYTHON) benchmarks/trace.py
