#!/usr/bin/env bash
# Tests the layers with the oldest version of torch that is supported, in a virtual environment of
# its own: the folder in the first argument, by default .venv-oldest (4 GB with torch's CUDA build;
# it is made where it is missing). Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-oldest}
shift $(($# > 0))
if ! [ -e "$folder/complete" ]; then
    echo "installing torch 2.6 into $folder ..."
    python3 -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.6.*" numpy pytest
    touch "$folder/complete"
fi
export OMP_NUM_THREADS=1
exec "$folder/bin/python" -m pytest -q -p no:cacheprovider tests/test_nn.py tests/sweeps "$@"
