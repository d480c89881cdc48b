#!/usr/bin/env bash
# The CUDA operators and Triton's kernels, at small sizes, under compute-sanitizer: memcheck and racecheck. Exits with 1 on
# any error that it finds, and on any failed test.
# Usage: scripts/sanitize_gpu.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
sanitizer=$(command -v compute-sanitizer || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer") || {
  echo "compute-sanitizer is not here, neither on PATH nor in CUDA_HOME/bin; it comes with the CUDA toolkit" >&2
  exit 1
}
"$python" -c 'import pytest' 2>/dev/null || {
  echo "the tests need pytest, which $python does not have: $python -m pip install pytest" >&2
  exit 1
}
tree=$(bash scripts/gpu_tree.sh "$python")
export PYTHONPATH=$tree${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
# each tensor an allocation of its own, so that what is beside it is not another tensor
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
pytest=("$python" -m pytest -q -x -p no:cacheprovider -o addopts= --import-mode=importlib -m gpu)
operators="not beyond and not every_run and not graph and not stream and not 32003"
triton="triton and test_small_sizes"

status=0
for tool in memcheck racecheck; do
  check=("$sanitizer" --tool "$tool" --error-exitcode 1 --target-processes all)
  echo "== $tool: CUDA operators"
  "${check[@]}" "${pytest[@]}" tests/gpu/test_cuda_ops.py -k "$operators" || status=1
  echo "== $tool: Triton kernels"
  "${check[@]}" "${pytest[@]}" tests/gpu/test_limits.py -k "$triton" || status=1
done
[ $status = 0 ] && echo "compute-sanitizer found nothing"
exit $status
