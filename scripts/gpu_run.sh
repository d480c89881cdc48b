#!/usr/bin/env bash
# Runs Python on a checkout as if the package were installed (scripts/gpu_tree.sh), beside what the caller's PYTHONPATH brings.
# Usage: scripts/gpu_run.sh PYTHON ARGUMENT...
set -euo pipefail
python=$1
shift
tree=$(bash "$(dirname "$0")/gpu_tree.sh" "$python")
# without the safe path, python -m puts this folder first, where logitless is not a whole package
PYTHONPATH=$tree${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 exec "$python" "$@"
