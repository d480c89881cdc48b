#!/usr/bin/env bash
# Set up an environment with the package and some of its extras. Usage: setup.sh ENVIRONMENT EXTRA,...
#
# A torch that is already in the environment is kept. Otherwise macOS and machines with an NVIDIA GPU get the default build of
# torch 2.13.0. Other machines get its CPU build, from the first of these that has it:
#   1. the index that pip is configured with,
#   2. PyTorch's own index of CPU builds (LOGITLESS_TORCH_INDEX names another),
# and otherwise the default build, after a sentence on its size.
set -euo pipefail

environment=$1
extras=$2
torch_version=2.13.0
torch_index=${LOGITLESS_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
python=${PYTHON:-python3}
# Python compiles what it imports; compiling all of every package first takes longer than the whole installation
export PIP_NO_COMPILE=1

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

stage() { printf '[%3d s] %s\n' "$SECONDS" "$*"; }

tried=()

# install_torch REQUIREMENT SOURCE [OPTION...]: false if no index has it; any other failure of pip ends the script.
install_torch() {
  local requirement=$1 source=$2
  shift 2
  stage "installing $requirement from $source ..."
  tried+=("$requirement from $source")
  if "${pip[@]}" install -q "$requirement" "$@" 2>"$work/pip.log"; then
    return 0
  fi
  if grep -q "No matching distribution found for torch==" "$work/pip.log"; then
    stage "there is no $requirement"
    return 1
  fi
  cat "$work/pip.log" >&2
  exit 1
}

if [ ! -x "$environment/bin/python" ]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "logitless needs Python >= 3.10; $python is $("$python" --version 2>&1). Set PYTHON=/path/to/python3." >&2
    exit 1
  }
  stage "making the environment in $environment ..."
  "$python" -m venv "$environment"
fi
pip=("$environment/bin/python" -m pip --disable-pip-version-check)

if ! "$environment/bin/python" -c 'import torch' 2>/dev/null; then
  configured="the index that pip is configured with"
  if [ "$(uname -s)" = Darwin ] || { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }; then
    install_torch "torch==$torch_version" "$configured" && found=yes || found=
  elif install_torch "torch==$torch_version+cpu" "$configured" ||
    install_torch "torch==$torch_version+cpu" "$torch_index" --extra-index-url "$torch_index" --retries 2 --timeout 15; then
    found=yes
  else
    cat <<EOF
No CPU build of torch $torch_version was found, and the default build is a download of several GB, most of it CUDA libraries;
to avoid it, stop here (Ctrl-C) and either set LOGITLESS_TORCH_INDEX to an index of CPU builds or activate a virtual
environment that has torch >= 2.9.
EOF
    install_torch "torch==$torch_version" "$configured" && found=yes || found=
  fi
  if [ -z "$found" ]; then
    {
      echo "torch $torch_version was not found for $("$environment/bin/python" --version) on $(uname -sm). Tried:"
      printf '  %s\n' "${tried[@]}"
      echo "Check the network and pip's configuration (python3 -m pip config list), or install torch >= 2.9 in a virtual"
      echo "environment and activate it. Then run make again."
    } >&2
    exit 1
  fi
fi

# pip must not replace that torch on behalf of another package
"$environment/bin/python" -c 'import torch; print("torch==" + torch.__version__)' >"$work/constraints"
stage "installing the package and its extras ${extras//,/, } ..."
# the kernels are built by `make ext`, against the torch that is here
LOGITLESS_EXT=none "${pip[@]}" install -q -c "$work/constraints" -e ".[$extras]"
stage "$environment is set up"
