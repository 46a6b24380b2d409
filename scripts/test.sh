#!/usr/bin/env bash
# Runs every test. First what needs little and can share the machine, then what starts labs and guests, one after the other.
# Fails if anything failed; the last lines are pytest's own summary.
set -uo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
status=0
$python -m pytest -q -n 2 tests/unit tests/conformance tests/simulation "$@" || status=$?
if [ $status -ne 0 ]; then echo "The quick tests failed (above); the others run all the same." >&2; fi
$python -m pytest -q tests/integration tests/faults "$@" || status=$?
exit $status
