#!/usr/bin/env bash
# What the GitHub Action does, from the variables that action.yml sets: a run, and a gate on it.
set -euo pipefail

# Each pair of a variable and an option is added where the variable is not empty.
given=()
collect() {
  given=()
  while [ $# -gt 0 ]; do
    if [ -n "${!1:-}" ]; then given+=("$2" "${!1}"); fi
    shift 2
  done
}

read -ra more <<<"${OPTIONS:-}"
collect DATA --data EVAL --eval
bitalloy run "$MODEL" --out "$OUT" "${given[@]}" "${more[@]}"
collect MAX_LATENCY --max-latency MAX_DROP --max-drop BASELINE --baseline
# A run without any limit has nothing to check.
limits='--(latency|size|max-drop|min-agreement)'
if [ ${#given[@]} -eq 0 ] && ! [[ "${OPTIONS:-}" =~ $limits ]]; then exit 0; fi
bitalloy check "$OUT" --junit "$OUT/check.xml" "${given[@]}"
