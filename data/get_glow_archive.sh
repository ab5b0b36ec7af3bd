# Sourced by get_imagenet_data.sh and get_celeb_data.sh, which set $name, $archive_name and $train_script.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "${SDN_DATA_ROOT:-$repository/data}/$name"
root=$(cd "${SDN_DATA_ROOT:-$repository/data}" && pwd)
folder=$root/$name
archive=$folder/$archive_name
python=${SDN_PYTHON:-$([ -x "$repository/.venv/bin/python" ] && echo "$repository/.venv/bin/python" || echo python3)}
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
cd "$repository"
if [ -f "$folder/train.lmdb/data.mdb" ] && [ -f "$folder/validation.lmdb/data.mdb" ]; then
    echo "$folder has train.lmdb and validation.lmdb already"
else
    "$python" -m data.download "${SDN_DATA_URL:-https://openaipublic.azureedge.net/glow-demo/data/$archive_name}" "$archive"
    "$python" -m data.convert.tfrecords "$name" --source "$archive" --target "$folder"
fi
[ ! -e "$archive" ] || echo "no longer needed: $archive"
[ "$root" = "$repository/data" ] && flags= || flags=" --root '$root'"
echo "next: cd '$repository' && bash $train_script$flags"
