#!/usr/bin/env bash
# The tests of a GPU: tests/gpu, and the correctness suite of the CPU once on each backend of the GPU, side by side: most of
# the time goes into compiling Triton's kernels, on the CPU. Logs go to build/test-gpu; exits with 1 if anything failed.
# Usage: scripts/test_gpu.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
"$python" -c 'import pytest' 2>/dev/null || {
  echo "make test-gpu needs pytest, which $python does not have: $python -m pip install pytest" >&2
  exit 1
}
tree=$(bash scripts/gpu_tree.sh "$python")
# without the safe path, python -m puts this folder first, where logitless is not a whole package
export PYTHONPATH=$tree${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
logs=build/test-gpu
rm -rf "$logs" && mkdir -p "$logs"
# not those of pyproject.toml, which have options of a plugin
pytest=("$python" -m pytest -q -p no:cacheprovider -o addopts= --import-mode=importlib --strict-markers -rfEs)
limit=${LOGITLESS_TEST_LIMIT:-520}  # seconds, of all together
cores=$(nproc)
start=$SECONDS
pids=() names=()

run() { # NAME ARGUMENT...
  local name=$1
  shift
  OMP_NUM_THREADS=$((cores > 8 ? cores / 8 : 1)) timeout "$limit" "$@" >"$logs/$name.log" 2>&1 &
  pids+=($!) names+=("$name")
}

run gpu "${pytest[@]}" -m gpu tests/gpu
available='import logitless as ll; print(*(name for name, why in ll.available_backends().items() if not why and name != "cpu"))'
backends=$("$python" -c "$available")
echo "backends: $backends"
for backend in $backends; do
  for module in linear_logps loss_modules losses_float64 policy_modules policy_float64 "compile head_spec"; do
    files=()
    for name in $module; do files+=("tests/test_$name.py"); done
    run "$backend-${module%% *}" env LOGITLESS_TEST_DEVICE=cuda LOGITLESS_TEST_BACKEND="$backend" "${pytest[@]}" "${files[@]}"
  done
done

failed=0
for i in "${!pids[@]}"; do
  status=0
  wait "${pids[$i]}" || status=$?
  case $status in
    0 | 5) ;; # 5: nothing was collected, as where transformers is missing
    124) failed=1 && echo "${names[$i]}: not done within $limit s" ;;
    *) failed=1 ;;
  esac
  printf '%-24s %s\n' "${names[$i]}" "$(tail -1 "$logs/${names[$i]}.log")"
  grep -E '^(FAILED|ERROR)' "$logs/${names[$i]}.log" | head -20 || true
done
echo "$((SECONDS - start)) s; the logs are in $logs"
exit $failed
