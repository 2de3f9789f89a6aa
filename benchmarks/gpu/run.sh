#!/usr/bin/env bash
# Measure on the GPU of this machine, within 6 minutes, with what is installed and what lies in this checkout: nothing is
# fetched. PYTHON names the interpreter; options are those of measure.py. Without a GPU every part says what is missing:
# `--provider CPUExecutionProvider --models yolo11n-shapes` tries them on the processor.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
export PYTHONPATH="$here/../../src${PYTHONPATH:+:$PYTHONPATH}"
exec timeout 360 "${PYTHON:-python3}" "$here/measure.py" "$@"
