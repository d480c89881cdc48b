#!/usr/bin/env bash
# Makes a checkout importable as the package, without installing anything: a folder of links for PYTHONPATH, and the CUDA
# operators for this machine's GPU in place, where there is an nvcc. Needs torch, and setuptools for the operators.
# Usage: scripts/gpu_tree.sh PYTHON  (prints the folder; the rest goes to stderr)
set -euo pipefail
python=$1
root=$(cd "$(dirname "$0")/.." && pwd)
tree=$root/build/tree
cd "$root"

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {  # PYTHONSAFEPATH
  echo "this needs Python >= 3.11; $python is $("$python" --version 2>&1). PYTHON=/path/to/python3 names another." >&2
  exit 1
}
"$python" -c 'import torch; torch.cuda.get_device_name()' >&2 || {
  echo "$python has no torch that sees a CUDA device. PYTHON=/path/to/python3 names another." >&2
  exit 1
}
rm -rf "$tree"
mkdir -p "$tree/logitless"
ln -s "$root"/logitless/* "$root"/kernels "$root"/fused "$root"/bench "$tree/logitless/"

if command -v "${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" >/dev/null; then
  arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  LOGITLESS_EXT=cuda LOGITLESS_CUDA_ARCHS=$arch "$python" setup.py -q build_ext --inplace >&2
else
  echo "there is no nvcc, on PATH or in CUDA_HOME: the backend cuda takes no part" >&2
fi
echo "$tree"
