#!/usr/bin/env bash
# The lowest versions that pyproject.toml promises, tried: installed into an environment of its own (torch alone is some
# gigabytes), under which the fast tests run. What was installed and how the tests ended goes to docs/lowest.md.
#
#   benchmarks/lowest.sh [ENVIRONMENT] [TESTS…]      default: .lowest, and all fast tests; takes half an hour
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${1:-.lowest}
tests=("${@:2}")

test -x "$environment/bin/python" || python3 -m venv "$environment"
"$environment/bin/python" benchmarks/lowest.py pins >"$environment/lowest.txt"
# with their own dependencies as new as these allow: that is what a resolver makes of a bound that is reached
"$environment/bin/pip" install --quiet --disable-pip-version-check -r "$environment/lowest.txt"

log=$environment/tests.txt
status=0
PYTHONPATH=$PWD OMP_NUM_THREADS=1 "$environment/bin/python" -m pytest -p no:cacheprovider "${tests[@]}" >"$log" 2>&1 || status=$?
tail -n 20 "$log"
"$environment/bin/python" benchmarks/lowest.py receipt "$log" "${tests[@]}" >docs/lowest.md
exit "$status"
