#!/usr/bin/env bash
# The benchmarks of docs/speed.md, one after the other; one that fails does not stop the rest, and is named at the end.
#
#   benchmarks/all.sh [cpu|cuda] [FOLDER]    the JSON goes to FOLDER, or replaces that in benchmarks/
#
# OFFICIAL=~/XDLM adds the official code (a checkout of github.com/MzeroMiko/XDLM); liger-kernel and cut-cross-entropy
# stand beside ours on a GPU where they are installed. The machine should do nothing else meanwhile. block_sizes.py, which
# says whether the sizes in the code suit a machine, and those that judge images are not among them.
set -uo pipefail
case "${1:-}" in
    cpu | cuda) device=$1 ;;
    "") device=$(python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")') ;;
    *) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
here=$(dirname "$0")
folder=${2:-$here}
mkdir -p "$folder"
failed=()

bench() { # script and its options
    local script=$1
    shift
    echo "== $script $*"
    python "$here/$script.py" --device "$device" --output "$folder/${script}_$device.json" "$@" || failed+=("$script")
}

case "$device" in
    cuda) bench fused_head --compile --shapes 1024x256 16384x768x16384 16387x768x16384 --dtype bfloat16 ;;
    cpu) bench fused_head --compile ;;
esac
bench loss --compile
bench sampling_step
[ -z "${OFFICIAL:-}" ] || bench official --checkout "$OFFICIAL"
bench compiled_training
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
