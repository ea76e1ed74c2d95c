#!/usr/bin/env bash
# Check the style and run the tests.
#
#   ./run_tests.sh [--slow] [flags of pytest]
#
# --slow includes the tests that take minutes. -n 0 runs all in one process. The first run makes .venv.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

case " $* " in
  *" -h "* | *" --help "*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit ;;
esac

chosen=(-m "not slow")
if [ "${1:-}" = "--slow" ]; then
  chosen=()
  shift
fi

REQUIREMENTS="requirements.txt tests/requirements.txt"
. "$root/pruning/environment.sh"
cd "$root"
"$PYTHON" -m ruff check .
# One worker a core and one thread a worker: the threads of several workers would wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m pytest -n logical --maxprocesses 8 --dist worksteal ${chosen[@]+"${chosen[@]}"} "$@"
