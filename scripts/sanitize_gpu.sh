#!/usr/bin/env bash
# The CUDA operators and Triton's kernels, at small sizes, under compute-sanitizer. Exits with 1 on any error that it finds, on
# any failed test, and where a tool is not done in its time; with 3 where this machine does not let compute-sanitizer run.
# Usage: scripts/sanitize_gpu.sh [PYTHON [memcheck | racecheck | both]]
# LOGITLESS_SANITIZE_LIMIT: seconds for each tool, default 500.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
case ${2:-both} in
  memcheck | racecheck) tools=("$2") ;;
  both) tools=(memcheck racecheck) ;;
  *)
    echo "the tool must be memcheck, racecheck or both, got '$2'" >&2
    exit 2
    ;;
esac
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
pytest=("$python" -m pytest -v -x -rs -p no:cacheprovider -o addopts= --import-mode=importlib -m gpu)
operators="not beyond and not every_run and not graph and not stream and not 32003"
triton="triton and test_small_sizes"
limit=${LOGITLESS_SANITIZE_LIMIT:-500}
log=build/sanitize.log
mkdir -p build

# a virtual machine's or a container's driver may refuse what the tool needs: better known before than from every test
code=0
probe=$(timeout 120 "$sanitizer" --tool "${tools[0]}" "$python" -c 'import torch; torch.ones(8, device="cuda").sum().item()' 2>&1) || code=$?
if grep -qi "device not supported" <<<"$probe"; then
  echo "compute-sanitizer cannot run on this machine: it says 'Device not supported'. The driver, or what virtualises the GPU," \
    "does not give it the debugging interface; nothing was checked, and nothing is wrong with the kernels for all we know." >&2
  exit 3
elif [ "$code" != 0 ]; then
  printf '%s\n' "$probe" | tail -20 >&2
  echo "compute-sanitizer fails on one sum of torch's already: see above; nothing was checked" >&2
  exit 1
fi

status=0
for tool in "${tools[@]}"; do
  end=$((SECONDS + limit))
  check=("$sanitizer" --tool "$tool" --error-exitcode 1 --target-processes all)
  for part in "CUDA operators|tests/gpu/test_cuda_ops.py|$operators" "Triton kernels|tests/gpu/test_limits.py|$triton"; do
    IFS='|' read -r what file chosen <<<"$part"
    left=$((end - SECONDS))
    if [ "$left" -lt 3 ]; then
      echo "== $tool: $what: not started, the $limit s of $tool are over" && status=1
      continue
    fi
    echo "== $tool: $what, for at most $left s"
    code=0
    timeout --kill-after=10 "$left" "${check[@]}" "${pytest[@]}" "$file" -k "$chosen" 2>&1 | tee "$log" || code=${PIPESTATUS[0]}
    [ "$code" = 0 ] || status=1
    if [ "$code" = 0 ] && ! grep -q PASSED "$log"; then
      echo "== $tool: $what: nothing ran, see the reasons above" && status=1
    fi
    if [ "$code" = 124 ] || [ "$code" = 137 ]; then
      echo "== $tool: $what: not done within $limit s; $(grep -c PASSED "$log" || true) tests passed until then"
    fi
  done
done
if [ $status = 0 ]; then
  echo "compute-sanitizer (${tools[*]}) found nothing"
fi
exit $status
