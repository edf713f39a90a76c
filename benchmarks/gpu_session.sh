#!/usr/bin/env bash
# tests/gpu_check.py with a Python that has torch, on a machine with a GPU: build, time, test, sanitize.
#
#   benchmarks/gpu_session.sh [OPTIONS of tests/gpu_check.py]
#
# Settings: PYTHON (a python with torch). Exits 2 without one, 3 where there is no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
for candidate in ${PYTHON:-} python3 python .venv/bin/python .venv-cuda/bin/python; do
  if "$candidate" -c 'import torch' 2>/dev/null; then
    exec "$candidate" tests/gpu_check.py "$@"
  fi
done
echo "gpu_session: no python with torch (set PYTHON)" >&2
exit 2
