#!/usr/bin/env bash
# One session on a machine with a GPU: build, all tests, benchmark in bf16 and fp32, results as JSON.
#
#   benchmarks/gpu_session.sh [STEP...]        steps: build test sanitize bench; default: build test bench
#
# Settings: PYTHON (a python with torch), OUT (default runs/gpu), CUDA_HOME, TORCH_CUDA_ARCH_LIST (default: this GPU's),
# MAX_JOBS, POSITIONS and SHAPES (of the benchmark). Each step leaves a log in OUT. Exits 3 where there is no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(build test bench)

python=
for candidate in ${PYTHON:-} python3 python .venv/bin/python .venv-cuda/bin/python; do
  if "$candidate" -c 'import torch' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "gpu_session: no python with torch (set PYTHON)" >&2
  exit 2
fi
if ! arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>/dev/null); then
  echo "gpu_session: no GPU that torch can use here" >&2
  exit 3
fi

out=${OUT:-runs/gpu}
mkdir -p "$out"
newest_toolkit=$(printf '%s\n' /usr/local/cuda-* | sort -V | tail -1)
nvcc=$(command -v nvcc || true)
export CUDA_HOME=${CUDA_HOME:-$(if [ -n "$nvcc" ]; then dirname "$(dirname "$nvcc")"; else echo "$newest_toolkit"; fi)}
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch}
export MAX_JOBS=${MAX_JOBS:-$(nproc)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# Runs a command with its output in OUT/NAME.log too.
logged() {
  local name=$1
  shift
  echo "== $name: $*"
  "$@" 2>&1 | tee "$out/$name.log"
}

for step in "${steps[@]}"; do
  case $step in
    build)
      FORCE_CUDA=1 "$python" setup.py build_ext --inplace >"$out/build.log" 2>&1 ||
        { tail -40 "$out/build.log"; echo "gpu_session: the build failed, see $out/build.log" >&2; exit 1; }
      logged check "$python" tests/check_cuda_build.py
      # A build that compiled nothing anew has no kernels in its log.
      ! grep -q 'Compiling entry' "$out/build.log" || logged registers "$python" tests/ptxas_table.py "$out/build.log"
      ;;
    test)
      logged test "$python" -m pytest -q tests/test_cuda.py
      logged test_all "$python" -m pytest -q --ignore tests/test_cuda.py
      ;;
    sanitize)
      tests=(tests/test_cuda.py -q -k "TestValues and (absent or empty or not_finite or layout)")
      for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 logged "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
          "$python" -m pytest "${tests[@]}"
      done
      ;;
    bench)
      for dtype in bf16 fp32; do
        logged "bench_$dtype" "$python" -m dnl_ext bench --device cuda --dtype "$dtype" --memory \
          --n "${POSITIONS:-4096,9409,16384}" --shapes "${SHAPES:-256,256;256,512;256,1024;512,2048}" \
          --json "$out/bench_$dtype.json"
      done
      ;;
    *)
      echo "gpu_session: unknown step '$step' (build, test, sanitize, bench)" >&2
      exit 2
      ;;
  esac
done
echo "gpu_session: done, results in $out"
