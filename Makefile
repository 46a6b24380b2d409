# Atoll: `make help` tells what there is.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test faults model check lint bench clean docs

# How many tests run side by side; those that start guests or labs take turns whatever this is.
JOBS ?= 2
# More options for pytest, such as TESTS="tests/unit -k certs" or TESTS="-m 'not qemu'".
TESTS ?=
PYTEST = .venv/bin/python -m pytest -n $(JOBS)

help:  ## what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## installs what Atoll needs to run, and no more
	@scripts/setup.sh demo

demo:  ## shows what Atoll does, in about half a minute (KEEP=1 leaves the lab; as root with real guests)
	@scripts/setup.sh demo
	@KEEP='$(KEEP)' .venv/bin/python -m atoll.lab.demo

test:  ## runs every test (as root: also those with real guests and nodes)
	@scripts/setup.sh test
	@$(PYTEST) $(TESTS)

faults:  ## runs every fault test at full length and counts the cases (ONLY="simulation conformance store api processes ceph guests": some of it)
	@scripts/setup.sh test
	@.venv/bin/python scripts/run_faults.py --jobs $(JOBS) $(ONLY)

model:  ## searches the model of claims and migrations completely, about four minutes (ONLY="2-jobs bug-undo": some of it)
	@scripts/setup.sh model
	@.venv/bin/python scripts/run_model.py $(ONLY)

check:  ## a look in under a minute: lint, and the fast tests
	@scripts/setup.sh check
	@$(MAKE) --no-print-directory lint
	@$(PYTEST) -q -m 'not slow and not qemu and not root' tests/unit

lint:  ## style, types, and who imports whom
	@scripts/setup.sh check
	.venv/bin/ruff check src tests scripts contrib benchmarks
	.venv/bin/mypy
	.venv/bin/lint-imports

bench:  ## measures the control plane, about nine minutes (ONLY="cli instances jobs volumes idle scale migration ceph": some of it)
	@scripts/setup.sh test
	@.venv/bin/python -m benchmarks $(ONLY)

docs:  ## the documentation as a site (build/docs) and manual pages (build/man); a warning is a failure
	@scripts/setup.sh docs
	.venv/bin/mkdocs build --quiet
	.venv/bin/python scripts/gen_man.py build/man

clean:  ## removes what was built here; labs and the system's packages stay
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
