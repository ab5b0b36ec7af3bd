#!/usr/bin/env bash
# The paper's claims on density models at a scale that two CPU cores reach; RESULTS.md says what came of it.
#
#   bash experiments/claims.sh [--study reach] [--jobs 2] [--seeds "0 1 2"] [--arms "iaf sdn2"] [--output_dir .] [--root data] [flags of train.py ...]
#
# The study `reach` asks the same on pictures whose structure reaches farther than the convolutions (kaleidoscope.py).
#
# Trains small models on Photos32, all with the same data, steps, batch, optimizer, latents and seeds; only the top-down
# path differs, see `flags_of`. `iaf-time` is the baseline with as many steps as take it the time of `sdn2`, `iaf-wide`
# with as many channels as give it the parameters of `sdn2`. Each run has one thread, so that times compare. The same
# command goes on after an interruption; what is finished is left alone. After it, -log p(x) of 64 patches with 16
# importance samples. Then: `experiments.gather`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${SDN_PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
jobs=2 seeds="0 1 2" arms=
study=claims folder=. root=data
rest=()
while [ $# -gt 0 ]; do
    case $1 in
    --study | --jobs | --seeds | --arms | --output_dir | --root)
        [ $# -gt 1 ] || { echo "claims.sh: error: $1 needs a value" >&2 && exit 2; }
        case $1 in
        --study) study=$2 ;;
        --jobs) jobs=$2 ;;
        --seeds) seeds=$2 ;;
        --arms) arms=$2 ;;
        --output_dir) folder=$2 ;;
        --root) root=$2 ;;
        esac
        shift 2
        ;;
    *) rest+=("$1") && shift ;;
    esac
done
[[ $jobs =~ ^[1-9][0-9]*$ ]] || { echo "claims.sh: error: --jobs must be at least 1; got $jobs" >&2 && exit 2; }
common="--gpus 0 --num_workers 0 --logger none --make_checkpoint --use_checkpoint --keep_last 1 --batch 16 --batch_val 64
    --epoch_images 1600 --val_images 512 --figsize 4 --lrate 0.004 --lrate_decay 1 --ema_coef 0.99 --free_bits 0.01
    --downsample_first --z_size 4 --mix_components 3 --sdn_nfeat_diff 0 --root $root"
case $study in
claims)
    arms=${arms:-iaf sdn2 iaf-wide conv5-highway conv3x2 sdn1 sdn4 sdn2-low iaf-time}
    steps=1200 time_steps=2400 wide=48 scale=16
    common="$common --dataset Photos32 --depth 4 --ds_list 0 2 --h_size 32 --sdn_nfeat_0 32"
    ;;
reach) # features at scale 32, halved once; latents at 32, 16 and 16
    arms=${arms:-iaf sdn4 iaf-wide iaf-time sdn2}
    steps=1000 time_steps=2000 wide=37 scale=32
    common="$common --dataset kaleidoscope --depth 3 --ds_list 1 --h_size 24 --sdn_nfeat_0 24"
    ;;
*) echo "claims.sh: error: --study is claims or reach; got $study" >&2 && exit 2 ;;
esac
flags_of() { # ARM
    case $1 in
    iaf) echo "--iters $steps --sdn_max_scale 0" ;;                # the baseline, IAF-VAE+
    iaf-time) echo "--iters $time_steps --sdn_max_scale 0" ;;      # (a) at equal time
    iaf-wide) echo "--iters $steps --sdn_max_scale 0 --h_size $wide" ;; # (a) at equal parameters
    sdn1) echo "--iters $steps --sdn_num_dirs 1" ;;                # (d)
    sdn2) echo "--iters $steps --sdn_num_dirs 2" ;;                # SDN-VAE
    sdn4) echo "--iters $steps --sdn_num_dirs 4" ;;                # (d)
    sdn2-low) echo "--iters $steps --sdn_num_dirs 2 --sdn_max_scale 8" ;; # (e) not at the largest scale, 16
    conv5-highway) echo "--iters $steps --block conv5 --highway on" ;; # (b)
    conv3x2) echo "--iters $steps --block conv3x2" ;;              # (b)
    *) echo "claims.sh: error: there is no arm $1" >&2 && return 2 ;;
    esac
}
commands=()
for seed in $seeds; do # outermost, so that what is finished can be compared
    for arm in $arms; do
        flags=$(flags_of "$arm")
        commands+=("--exp_name ${study}_${arm}_seed$seed --random_seed $seed --sdn_max_scale $scale $flags")
    done
done
one() { # FLAGS [flags of train.py ...]: a run and its likelihood, with their output in a log
    flags=$1 && shift
    name=$(sed 's/.*--exp_name \([^ ]*\).*/\1/' <<<"$flags")
    log=$folder/checkpoints/$name.log
    # shellcheck disable=SC2086 - several words
    if OMP_NUM_THREADS=1 "$python" train.py $common $flags --output_dir "$folder" "$@" >>"$log" 2>&1 &&
        OMP_NUM_THREADS=1 "$python" evaluate.py --model "$name" --output_dir "$folder" --likelihood \
            --importance_samples 16 --limit 64 >>"$log" 2>&1; then
        echo "$name: $(tr '\r' '\n' <"$log" | grep -o 'validation -ELBO [0-9.]*' | tail -1)"
    else
        echo "$name: failed or stopped, see $log" && return 1
    fi
}
[ "$study" != reach ] || "$python" -m experiments.kaleidoscope --root "$root"
mkdir -p "$folder/checkpoints"
export -f one
export python common folder
printf '%s\0' "${commands[@]}" | xargs -0 -P "$jobs" -I{} bash -c 'one "$@"' one {} ${rest[@]+"${rest[@]}"} || exit 1
