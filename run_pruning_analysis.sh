#!/usr/bin/env bash
# Measure one pruning method at the rates 0.1 to 0.9, then draw the graphs.
#
#   ./run_pruning_analysis.sh [method] [num_images] [dataset] [flags of pruning/pruning_analysis.py]
#   ./run_pruning_analysis.sh magnitude 50 coco
#
# The defaults are magnitude, 32 and shapes. The first run makes .venv.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

for argument in "$@"; do
  case "$argument" in
    -h | --help)  # without any package
      sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
      exec cat "$root/pruning/flags.txt" ;;
  esac
done

flags=()
for name in method num_images dataset; do
  case "${1:-}" in
    "" | -*) break ;;
  esac
  flags+=("--$name" "$1")
  shift
done

REQUIREMENTS="requirements.txt"
. "$root/pruning/environment.sh"
exec "$PYTHON" "$root/pruning/pruning_analysis.py" ${flags[@]+"${flags[@]}"} "$@"
