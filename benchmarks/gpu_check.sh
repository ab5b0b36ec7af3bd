#!/usr/bin/env bash
# Checks and measures everything that a GPU changes, in at most eight minutes, on a machine with torch, Triton and numpy.
#
#   bash benchmarks/gpu_check.sh FOLDER [--cpu]
#
# Writes into FOLDER: log.txt, and the JSON file of each benchmark, each row as soon as it is there; what decides comes
# first. If a backend of the sweeps is wrong, nothing is timed. What fails after that does not stop the rest; the exit
# status is the number of what failed. --cpu: the same steps at sizes of seconds, without a GPU, to see that the script
# is ready. PYTHON: the interpreter, default python3.
set -uo pipefail
folder=${1:?usage: bash benchmarks/gpu_check.sh FOLDER [--cpu]}
python=${PYTHON:-python3}
device=cuda
[ "${2:-}" != --cpu ] || device=cpu
mkdir -p "$folder" || exit 1
folder=$(cd "$folder" && pwd)
cd "$(dirname "$0")/.." || exit 1
exec > >(tee "$folder/log.txt") 2>&1
export PYTHONUNBUFFERED=1
failed=0

step() { # NAME SECONDS MODULE FLAGS...: runs a benchmark for at most so long, and not beyond the eight minutes of all
    local name=$1 limit=$2 module=$3 start=$SECONDS status=0 left=$((475 - SECONDS))
    shift 3
    limit=$((left < limit ? left : limit))
    if [ "$limit" -le 0 ]; then
        echo "== $name: not run, the eight minutes are over"
        failed=$((failed + 1))
        return 1
    fi
    echo "== $name: python -m benchmarks.$module $*"
    timeout "$limit" "$python" -m "benchmarks.$module" "$@" --output "$folder/$name.json" || status=$?
    echo "== $name: $((SECONDS - start)) s, exit status $status"
    [ "$status" = 0 ] || failed=$((failed + 1))
    return "$status"
}

"$python" -c "import torch; print('torch', torch.__version__); assert '$device' == 'cpu' or torch.cuda.is_available(), \
'there is no CUDA device'; print(torch.cuda.get_device_name() if '$device' == 'cuda' else 'no GPU')" || exit 1
step gpu_check 140 gpu_check --device "$device"
case $? in
    0) ;;
    124) echo "the race has not finished; its rows so far are kept" ;;
    *) echo "a backend is wrong: nothing is timed" && exit 1 ;;
esac
if [ "$device" = cuda ]; then
    layer=(--device cuda --precision bfloat16 --batch 128 --directions 2)
    step layer_replayed 70 layer "${layer[@]}" --scales 16 64 8 32 4 --replay --no_memory --backends auto
    step train_step 90 train_step --device cuda --precision bfloat16 --contenders auto yardstick cnn --rounds 3
    step layer 70 layer "${layer[@]}" --repeats 5 --backends auto yardstick
    step train_step_celeb 60 train_step --device cuda --precision bfloat16 --model celeb --batch 4 --rounds 1 \
        --contenders auto checkpointed
    step layer_compiled 60 layer "${layer[@]}" --scales 8 16 --no_memory --backends auto yardstick compiled-yardstick
    step evaluation 45 evaluation --device cuda
else
    step layer 60 layer --channels 8 --batch 2 --scales 4 --directions 2 --repeats 2 --no_memory
    step train_step 120 train_step --device cpu --quick --contenders auto yardstick cnn --steps 20
fi
echo "== done in $SECONDS s, $failed failed; results are in $folder"
exit "$failed"
