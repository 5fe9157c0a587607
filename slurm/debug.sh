#!/usr/bin/env bash
# A few steps of a recipe on one node, with your terminal attached: breakpoint() asks you, Ctrl-C ends it.
#
#   slurm/debug.sh [--partition debug --gpus-per-node 1 ...] configs/X.yaml [configs/hardware/Y.yaml] [--key value ...]
#
# What stands before the first config file is for salloc; then as for slurm/train.sh, which runs it in the same
# environment, with configs/hardware/debug.yaml as the last config file.
set -euo pipefail

here=$(dirname "$(realpath "$0")")
place=(--job-name=trainer-debug --nodes=1)
while (($#)) && [[ $1 != *.yaml && $1 != *.yml ]]; do
    place+=("$1")
    shift
done
configs=()
while [[ ${1:-} == *.yaml || ${1:-} == *.yml ]]; do
    configs+=("$1")
    shift
done
if ((${#configs[@]} == 0)); then
    echo "debug.sh: no config file given; usage: slurm/debug.sh [--gpus-per-node 1 ...] configs/X.yaml [--key value ...]" >&2
    exit 2
fi
exec salloc "${place[@]}" "$here/train.sh" "${configs[@]}" "$here/../configs/hardware/debug.yaml" "$@"
