#!/usr/bin/env bash
# Set up an environment with the package and some of its extras. Usage: setup.sh ENVIRONMENT EXTRA,...
#
# torch: one that is already there is kept. Otherwise a machine with an NVIDIA GPU gets the default build, any other one the
# CPU build of torch 2.13.0; nothing here ever downloads CUDA libraries for a machine that cannot use them.
set -euo pipefail

environment=$1
extras=$2
torch_version=2.13.0
python=${PYTHON:-python3}

if [ ! -x "$environment/bin/python" ]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "logitless needs Python >= 3.10; $python is $("$python" --version 2>&1). Set PYTHON=/path/to/python3." >&2
    exit 1
  }
  "$python" -m venv "$environment"
fi
pip=("$environment/bin/python" -m pip --disable-pip-version-check)
# Python compiles what it imports; compiling all of every package first takes longer than the whole installation
export PIP_NO_COMPILE=1

if ! "$environment/bin/python" -c 'import torch' 2>/dev/null; then
  if [ "$(uname -s)" = Darwin ] || { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }; then
    "${pip[@]}" install -q "torch==$torch_version"
  elif ! "${pip[@]}" install -q "torch==$torch_version+cpu"; then
    cat >&2 <<EOF
pip found no CPU build of torch $torch_version. Two ways on:
  - point pip at PyTorch's index of CPU builds (PIP_EXTRA_INDEX_URL; PyTorch's "Start Locally" page names it), or
  - install any torch >= 2.9 yourself in an active virtual environment.
Then run make again.
EOF
    exit 1
  fi
fi

# pip must not replace that torch on behalf of another package
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
"$environment/bin/python" -c 'import torch; print("torch==" + torch.__version__)' >"$constraints"
# the kernels are built by `make ext`, against the torch that is here
LOGITLESS_EXT=none "${pip[@]}" install -q -c "$constraints" -e ".[$extras]"
