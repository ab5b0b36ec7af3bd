#!/usr/bin/env bash
# Checks and measures everything that a GPU changes, in under ten minutes, on a machine with torch, Triton and numpy.
#
#   bash benchmarks/gpu_check.sh FOLDER [--cpu]
#
# Writes into FOLDER: log.txt, and the JSON file of each benchmark. The kernels are checked first; if they are wrong,
# nothing is timed. What fails after that does not stop the rest; the exit status is the number of what failed.
# What needs packages that are missing (the tests pytest, the loaders Lightning and lmdb) is skipped and
# says so. --cpu: the same steps at sizes of seconds, without a GPU, to see that the script is ready.
# PYTHON: the interpreter, default python3.
set -uo pipefail
folder=${1:?usage: bash benchmarks/gpu_check.sh FOLDER [--cpu]}
python=${PYTHON:-python3}
device=cuda quick=() collect=() no_memory=() precision=bfloat16
if [ "${2:-}" = --cpu ]; then
    device=cpu quick=(--quick) no_memory=(--no_memory) precision=float32 # its memory takes a process for each layer
fi
mkdir -p "$folder" || exit 1
folder=$(cd "$folder" && pwd)
cd "$(dirname "$0")/.." || exit 1
exec > >(tee "$folder/log.txt") 2>&1
failed=0

step() { # NAME SECONDS COMMAND...: runs a command for at most so long, and not beyond the ten minutes of all
    local name=$1 limit=$2 start=$SECONDS status=0 left=$((590 - SECONDS))
    shift 2
    limit=$((left < limit ? left : limit))
    if [ "$limit" -le 0 ]; then
        echo "== $name: not run, the ten minutes are over"
        failed=$((failed + 1))
        return 1
    fi
    echo "== $name: $*"
    timeout "$limit" "$@" || status=$?
    echo "== $name: $((SECONDS - start)) s, exit status $status"
    [ "$status" = 0 ] || failed=$((failed + 1))
    return "$status"
}
bench() { # NAME SECONDS FLAGS...: a benchmark that takes --quick and --output
    local name=$1 limit=$2 module=${1%%-*}
    shift 2
    step "$name" "$limit" "$python" -m "benchmarks.$module" "${quick[@]}" "$@" --output "$folder/$name.json"
}
has() { "$python" -c "import $1" 2>/dev/null; }

"$python" -c "import torch; print('torch', torch.__version__); assert '$device' == 'cpu' or torch.cuda.is_available(), \
'there is no CUDA device'; print(torch.cuda.get_device_name() if '$device' == 'cuda' else 'no GPU')" || exit 1
bench kernel_check 240 --device "$device" || { # most of it is compiling
    [ $? = 124 ] && echo "the kernels' check has not finished: nothing is timed" || echo "the kernels are wrong: nothing is timed"
    exit 1
}
if has pytest; then
    [ "$device" = cuda ] || collect=(--collect-only) # in the interpreter they take half a minute
    step tests 120 "$python" -m pytest -q -p no:cacheprovider "${collect[@]}" tests/test_sweep_triton.py
else
    echo "== tests: skipped, there is no pytest; kernel_check has compared the kernels with the reference"
fi
bench table5_parameters 30
bench train_step 120 --device "$device" --precision "$precision" --steps 100 \
    --contenders auto torch checkpointed yardstick cnn
bench table6_runtime 90 --device "$device" --precision "$precision" "${no_memory[@]}"
if [ "$device" = cuda ]; then
    step sdn_layer 90 "$python" -m benchmarks.sdn_layer --device cuda --precision bfloat16 --directions 2 --batch 128 \
        --backends torch triton yardstick --repeats 20 --output "$folder/sdn_layer.json"
    bench table6_runtime-replayed 60 --device cuda --precision "$precision" --replay --no_memory
    step sdn_layer-replayed 60 "$python" -m benchmarks.sdn_layer --device cuda --precision bfloat16 --directions 2 \
        --batch 128 --backends triton --repeats 20 --replay --no_memory --output "$folder/sdn_layer-replayed.json"
    # Compiling the yardstick takes minutes at large scales.
    step sdn_layer-compiled 90 "$python" -m benchmarks.sdn_layer --device cuda --precision bfloat16 --directions 2 \
        --batch 128 --scales 4 8 --backends triton yardstick compiled-yardstick --repeats 20 --slow_repeats 20 \
        --no_memory --output "$folder/sdn_layer-compiled.json"
else
    step sdn_layer 120 "$python" -m benchmarks.sdn_layer --channels 8 --batch 2 --scales 4 --directions 2 \
        --repeats 2 --output "$folder/sdn_layer.json"
fi
if [ "$device" = cuda ]; then
    bench sweep_plans 120 --device cuda --precision "$precision" --scales 4 16 32
elif has triton; then
    TRITON_INTERPRET=1 bench sweep_plans 120 --device cpu --precision "$precision"
fi
if has pytorch_lightning && has lmdb; then
    bench loader 60 --epochs 2
else
    echo "== loader: skipped, it needs pytorch_lightning and lmdb"
fi
if [ "$device" = cuda ]; then
    bench train_step-compiled 240 --device cuda --precision "$precision" --contenders auto compiled torch replayed
else
    echo "== train_step-compiled: not run on a CPU, where compiling takes minutes"
fi
echo "== done in $SECONDS s, $failed failed; results are in $folder"
exit "$failed"
