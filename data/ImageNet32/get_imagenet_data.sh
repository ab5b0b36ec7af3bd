#!/usr/bin/env bash
# ImageNet32: downloads Glow's archive imagenet-oord-tfr.tar and converts it to train.lmdb and validation.lmdb.
#
#   bash data/ImageNet32/get_imagenet_data.sh
#
# Interrupted, the same command goes on. Environment:
#   SDN_DATA_ROOT  the folder of all data sets, what train.py calls --root (default: data/ of this repository); the
#                  files are put into $SDN_DATA_ROOT/ImageNet32
#   SDN_DATA_URL   another address of the archive
#   SDN_PYTHON     the interpreter (default: .venv/bin/python of this repository, else python3)
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
mkdir -p "${SDN_DATA_ROOT:-$repository/data}/ImageNet32"
root=$(cd "${SDN_DATA_ROOT:-$repository/data}" && pwd)
folder=$root/ImageNet32
archive=$folder/imagenet-oord-tfr.tar
python=${SDN_PYTHON:-$([ -x "$repository/.venv/bin/python" ] && echo "$repository/.venv/bin/python" || echo python3)}
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
cd "$repository"
if [ -f "$folder/train.lmdb/data.mdb" ] && [ -f "$folder/validation.lmdb/data.mdb" ]; then
    echo "$folder has train.lmdb and validation.lmdb already"
else
    "$python" -m data.download "${SDN_DATA_URL:-https://openaipublic.azureedge.net/glow-demo/data/imagenet-oord-tfr.tar}" "$archive"
    "$python" -m data.tfrecords_to_lmdb ImageNet32 --source "$archive" --target "$folder"
fi
[ ! -e "$archive" ] || echo "no longer needed: $archive"
[ "$root" = "$repository/data" ] && flags= || flags=" --root '$root'"
echo "next: cd '$repository' && bash train_imagenet.sh$flags"
