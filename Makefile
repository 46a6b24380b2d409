# The two commands of a newcomer are `make demo` and `make test`.
.DEFAULT_GOAL := help
PYTHON := .venv/bin/python

.PHONY: help setup demo test check clean

help: ## Show this
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## /	/' | expand -t 12

setup: ## Install what is needed (Debian packages, .venv)
	@scripts/setup.sh

demo: setup ## Tell and show the story on this machine (KEEP=1 leaves the lab)
	@KEEP=$(KEEP) $(PYTHON) -m atoll.lab.demo

test: setup ## Run every test
	@scripts/test.sh

check: setup ## Lint, types, layers and the fast tests, in under a minute
	@.venv/bin/ruff check src tests
	@.venv/bin/mypy
	@.venv/bin/lint-imports
	@$(PYTHON) -m pytest -q -n 2 -m "not slow and not root and not qemu" tests/unit tests/simulation

clean: ## Remove the virtual environment and caches
	@rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist
