#!/usr/bin/env bash
# A step of a data pipeline: adapt, measure, export only what is good enough, and label the next images with it.
#
#   [NEXT=IMAGES] examples/pipeline.sh SHOTS OUT [LEAST_BASE_ACCURACY] [more options of `clipfit adapt` …]
#
# NEXT                images to label afterwards, a folder or a list; where it is not given, SHOTS once more
# OUT/metrics.json   what `clipfit evaluate --json` printed
# OUT/model/         the exported model (open_clip's local-dir:), only if base accuracy on held-out images is at least
#                    LEAST_BASE_ACCURACY (a fraction, default 0.8) and it is nowhere credibly worse than zero-shot
# OUT/labels.jsonl   a row an image of NEXT, by the exported model
#
# Exit codes: 0 exported and labelled · 5 measured, but not good enough · anything else: clipfit's own (see its --help).
set -euo pipefail

shots=${1:?usage: pipeline.sh SHOTS OUT [LEAST_BASE_ACCURACY] [adapt options …]}
out=${2:?usage: pipeline.sh SHOTS OUT [LEAST_BASE_ACCURACY] [adapt options …]}
least=${3:-0.8}
shift $(($# < 3 ? $# : 3))

mkdir -p -- "$out"
out=$(cd -- "$out" && pwd)
# into a file first: at the end of a pipe its reader's exit code would take the place of clipfit's
clipfit adapt --output "$out/run" --overwrite --json "$@" -- "$shots" >"$out/adapt.json"
run=$(python3 -c 'import json, sys; print(json.load(sys.stdin)["run"])' <"$out/adapt.json")
# where it is not good enough this ends with 5, where nothing was held out with 3; the document says why under "error"
clipfit evaluate "$run" --require "base:$least" --fail-if-worse --json >"$out/metrics.json"
clipfit export "$run" --format open_clip --output "$out/model" --overwrite

# a row an input, whatever is wrong with some: what is counted in the file is what the summary says
clipfit predict --output "$out/labels.jsonl" --overwrite --json -- "$out/model" "${NEXT:-$shots}" >"$out/predict.json"
rows=$(python3 -c 'import json, sys; print(json.load(sys.stdin)["rows"])' <"$out/predict.json")
if command -v jq >/dev/null; then
  counted=$(jq -c 'select(has("path") and has("label") and has("error"))' "$out/labels.jsonl" | wc -l)
else
  counted=$(wc -l <"$out/labels.jsonl")
fi
if [ "$counted" -ne "$rows" ]; then
  echo "$out/labels.jsonl has $counted whole rows of $rows" >&2
  exit 1
fi
