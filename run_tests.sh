#!/usr/bin/env bash
# Check the style and run the tests.
#
#   ./run_tests.sh [--slow] [flags of pytest]
#
# --slow includes the tests that take minutes. The first run makes .venv.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

chosen=(-m "not slow")
if [ "${1:-}" = "--slow" ]; then
  chosen=()
  shift
fi

REQUIREMENTS="requirements.txt tests/requirements.txt"
. "$root/pruning/environment.sh"
cd "$root"
"$PYTHON" -m ruff check .
exec "$PYTHON" -m pytest ${chosen[@]+"${chosen[@]}"} "$@"
