#!/usr/bin/env bash
# What needs a GPU: its tests, then one table of steps, of memory, and of the base half of ImageNet end to end.
#
#     benchmarks/gpu.sh [options of benchmarks/gpu.py]
#
# Run it where clipfit is installed with its tests ('.[test]'); the table goes to stdout, all else to stderr.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pytest -q tests/test_gpu.py >&2
exec python benchmarks/gpu.py "$@"
