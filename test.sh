#!/usr/bin/env bash
# Sets up .venv and runs all tests. `bash test.sh --slow` also runs those that take minutes; further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")"
requirements="requirements.txt requirements-test.txt"
. ./setup.sh
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
"$python" -m pyright --pythonpath "$python"
export OMP_NUM_THREADS=1 WANDB_MODE=disabled # one thread in each of two test processes
if [ "${1:-}" = --slow ]; then
    shift
    set -- -m "slow or not slow" "$@"
fi
exec "$python" -m pytest -q -n 2 --dist worksteal --durations=10 "$@"
