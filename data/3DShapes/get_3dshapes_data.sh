#!/usr/bin/env bash
# 3DShapes: downloads 3dshapes.h5 of DeepMind (about 255 MB), checks it and writes its images uncompressed (5.9 GB).
#
#   bash data/3DShapes/get_3dshapes_data.sh
#
# Interrupted, the same command goes on. Environment:
#   SDN_DATA_ROOT  the folder of all data sets, what train.py calls --root (default: data/ of this repository); the
#                  files are put into $SDN_DATA_ROOT/3DShapes
#   SDN_DATA_URL   another address of the file
#   SDN_PYTHON     the interpreter (default: .venv/bin/python of this repository, else python3)
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
mkdir -p "${SDN_DATA_ROOT:-$repository/data}/3DShapes"
root=$(cd "${SDN_DATA_ROOT:-$repository/data}" && pwd)
file=$root/3DShapes/3dshapes.h5
python=${SDN_PYTHON:-$([ -x "$repository/.venv/bin/python" ] && echo "$repository/.venv/bin/python" || echo python3)}
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
cd "$repository"
url=https://storage.googleapis.com/3d-shapes/3dshapes.h5
sha256=0a0f6ed98baff276a50f3a081a7434d788da63cb135a98189b2a5b5769be1785 # of that file, in TensorFlow Datasets' list
if [ -n "${SDN_DATA_URL:-}" ]; then url=$SDN_DATA_URL sha256=; fi
[ -f "${file%.h5}.uncompressed.h5" ] || "$python" -m data.download "$url" "$file" ${sha256:+--sha256 "$sha256"}
"$python" -m data.convert.shapes3d convert "$file"
[ "$root" = "$repository/data" ] && flags= || flags=" --root '$root'"
echo "next: bash '$repository/train_3dshapes.sh'$flags"
