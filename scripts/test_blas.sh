#!/usr/bin/env bash
# The tests whose matrix products are NumPy's (Triton's interpreter), with OpenBLAS's kernels for other CPUs than this one: they
# sum in another order. Usage: test_blas.sh PYTHON [CORE...], CORE as OPENBLAS_CORETYPE has it; default: Haswell.
# Kernels that NumPy takes by itself here are left out, because `make test` has run them, and those that this CPU cannot run.
set -euo pipefail

python=$1
shift
kernels() { OPENBLAS_VERBOSE=2 "$@" "$python" -c 'import numpy' 2>&1 | sed -n 's/^Core: //p' | head -n 1; }

own=$(kernels env -u OPENBLAS_CORETYPE)
if [ -z "$own" ]; then
  echo "NumPy is not built with OpenBLAS here: no other kernels to test"
  exit
fi
for core in "${@:-Haswell}"; do
  case $core in
    SkylakeX) needs=avx512vl ;;
    Cooperlake | SapphireRapids) needs=avx512_bf16 ;;
    Haswell | Zen) needs=avx2 ;;
    *) needs=sse2 ;;
  esac
  if ! grep -qw "$needs" /proc/cpuinfo; then
    echo "$core: not run, this CPU has no $needs"
  elif [ "$(kernels env OPENBLAS_CORETYPE="$core")" = "$own" ]; then
    echo "$core: not run, these are the kernels that NumPy takes by itself here ($own)"
  else
    echo "$core:"
    OPENBLAS_CORETYPE=$core OMP_NUM_THREADS=1 "$python" -m pytest -q -n auto --maxprocesses 8 -m blas tests/triton
  fi
done
