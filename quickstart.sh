#!/usr/bin/env bash
# Sets up .venv, trains a small SDN-VAE on the CPU, evaluates it and draws samples:
#   bash quickstart.sh          on handwritten digits
#   bash quickstart.sh photos   on photographs
# Interrupted, it goes on where it was. `rm -r checkpoints/quickstart figs/quickstart` starts anew.
set -euo pipefail
cd "$(dirname "$0")"
what=${1:-digits}
case $what in
digits)
    name=quickstart dataset=Digits8 nbits=4 promised=1.88 within=0.05 temperatures="0.7 1.0"
    flags="--iters 1300 --check_val_every_n_epoch 13 --batch 64 --batch_val 180 --nbits 4 --ema_coef 0.99
        --depth 3 --ds_list 1 2 --z_size 8 --post_model IsoGaussian --sdn_max_scale 8 --sdn_num_dirs 1 --sdn_nfeat_diff 0"
    ;;
photos)
    name=photos dataset=Photos32 nbits=8 promised=4.88 within=0.15 temperatures="0.7 1.0"
    flags="--iters 700 --check_val_every_n_epoch 100 --batch 16 --batch_val 64 --ema_coef 0.98
        --depth 4 --ds_list 0 2 --z_size 4 --sdn_max_scale 16 --sdn_num_dirs 2"
    ;;
*)
    echo "quickstart.sh: error: the data are digits or photos, not $what" >&2
    exit 2
    ;;
esac
. ./setup.sh
"$python" -m data.histogram $dataset --nbits $nbits
# shellcheck disable=SC2086  # the flags are words
"$python" train.py --dataset $dataset --exp_name $name --make_checkpoint --use_checkpoint --logger none --gpus 0 \
    --num_workers 0 --lrate 0.004 --lrate_decay 1 --downsample_first --h_size 32 --mix_components 3 --sdn_nfeat_0 32 \
    --random_seed 1234 $flags
"$python" evaluate.py --model $name --elbo --sampling --reconstruction --temperatures $temperatures --device cpu
"$python" - $name $promised $within "$python" <<'PYTHON'
import json, sys

name, promised, within, python = sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
measured = json.load(open(f"figs/{name}/results.json"))["elbo"]["bits_per_dim"]
kept = abs(measured - promised) <= within
verdict = "as promised" if kept else "NOT as promised: please report it with your versions"
print(f"""
-ELBO on validation images: {measured:.2f} bits/dim; the README promises {promised:.2f} within {within}: {verdict}
samples: figs/{name}/samples_t0.70.png
next:    {python} evaluate.py --model {name} --likelihood --importance_samples 64 --limit 64""")
sys.exit(not kept)
PYTHON
