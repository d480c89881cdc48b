#!/usr/bin/env bash
# The tests of a GPU: tests/gpu, and the correctness suite of the CPU once on each backend of the GPU, side by side: most of
# the time goes into compiling Triton's kernels, on the CPU. The most telling start first. Logs go to build/test-gpu; exits
# with 1 if anything failed or was not done in its time.
# Usage: scripts/test_gpu.sh PYTHON
# LOGITLESS_TEST_LIMIT: seconds, of all together; LOGITLESS_TEST_JOBS: how many run at one time, by default one a core.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
"$python" -c 'import pytest' 2>/dev/null || {
  echo "make test-gpu needs pytest, which $python does not have: $python -m pip install pytest" >&2
  exit 1
}
start=$SECONDS
tree=$(bash scripts/gpu_tree.sh "$python")
# without the safe path, python -m puts this folder first, where logitless is not a whole package
export PYTHONPATH=$tree${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
logs=build/test-gpu
rm -rf "$logs" && mkdir -p "$logs"
# not those of pyproject.toml, which have options of a plugin
pytest=("$python" -m pytest -q -p no:cacheprovider -o addopts= --import-mode=importlib --strict-markers -rfEs)
limit=${LOGITLESS_TEST_LIMIT:-540}
cores=$(nproc)
jobs=${LOGITLESS_TEST_JOBS:-$cores}
names=()

run() { # NAME ARGUMENT...
  local name=$1 left
  shift
  names+=("$name")
  while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do sleep 0.5; done
  left=$((limit - (SECONDS - start)))
  [ "$left" -ge 3 ] || return 0
  # an interrupted pytest still says what failed; without env a process in the background would not hear it
  {
    status=0
    OMP_NUM_THREADS=$((cores > 8 ? cores / 8 : 1)) env --default-signal=INT timeout --signal=INT --kill-after=15 "$left" "$@" \
      >"$logs/$name.log" 2>&1 || status=$?
    echo "$status" >"$logs/$name.status"
  } &
}

available='import logitless as ll; print(*(name for name, why in ll.available_backends().items() if not why and name != "cpu"))'
found=" $("$python" -c "$available") "
backends=()
for backend in triton cuda torch; do # those that compile longest first
  case $found in *" $backend "*) backends+=("$backend") ;; esac
done
echo "backends: ${backends[*]}"
for backend in "${backends[@]}"; do
  run "gpu-every_loss-$backend" "${pytest[@]}" -m gpu tests/gpu/test_every_loss.py -k "$backend"
done
for file in backends cuda_ops limits policy; do
  run "gpu-$file" "${pytest[@]}" -m gpu "tests/gpu/test_$file.py"
done
# names of test modules, or patterns of such
for module in "linear_logps*" "losses_float64* losses_arguments" policy_float64 loss_modules "policy_modules*" "compile head_spec"; do
  for backend in "${backends[@]}"; do
    files=()
    for name in $module; do files+=(tests/*/test_$name.py); done
    run "$backend-${module%%[ *]*}" env LOGITLESS_TEST_DEVICE=cuda LOGITLESS_TEST_BACKEND="$backend" "${pytest[@]}" "${files[@]}"
  done
done
wait

failed=0
for name in "${names[@]}"; do
  if [ ! -f "$logs/$name.status" ]; then
    failed=1
    echo "$name: not started within $limit s"
    continue
  fi
  status=$(cat "$logs/$name.status")
  case $status in
    0 | 5) ;; # 5: nothing was collected, as where transformers is missing
    124 | 137) failed=1 && echo "$name: not done within $limit s" ;;
    *) failed=1 ;;
  esac
  printf '%-24s %s\n' "$name" "$(tail -1 "$logs/$name.log")"
  grep -E '^(FAILED|ERROR)' "$logs/$name.log" | head -20 || true
done
echo "$((SECONDS - start)) s; the logs are in $logs"
exit $failed
