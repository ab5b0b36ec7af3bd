#!/usr/bin/env bash
# Sets up .venv, trains a small SDN-VAE on photographs on the CPU, evaluates it and draws samples.
# Interrupted, it goes on where it was. `rm -r checkpoints/quickstart figs/quickstart` starts anew.
set -euo pipefail
cd "$(dirname "$0")"
. ./setup.sh
promised=4.88
"$python" -m data.histogram Photos32
"$python" train.py --dataset Photos32 --exp_name quickstart --make_checkpoint --use_checkpoint --logger none --gpus 0 \
    --iters 700 --check_val_every_n_epoch 100 --batch 16 --batch_val 64 --num_workers 0 \
    --lrate 0.004 --lrate_decay 1 --ema_coef 0.98 --downsample_first --depth 4 --ds_list 0 2 --h_size 32 --z_size 4 \
    --mix_components 3 --sdn_max_scale 16 --sdn_nfeat_0 32 --sdn_num_dirs 2 --random_seed 1234
"$python" evaluate.py --model quickstart --elbo --sampling --temperatures 0.7 1.0 --batch 64 --device cpu
"$python" - "$promised" "$python" <<'PYTHON'
import json, sys

promised, python = float(sys.argv[1]), sys.argv[2]
measured = json.load(open("figs/quickstart/results.json"))["elbo"]["bits_per_dim"]
verdict = "as promised" if abs(measured - promised) <= 0.15 else "NOT as promised: please report it with your versions"
print(f"""
-ELBO on validation photographs: {measured:.2f} bits/dim; the README promises {promised} within 0.15: {verdict}
samples: figs/quickstart/samples_t1.00.png
next:    {python} evaluate.py --model quickstart --likelihood --importance_samples 64 --limit 64""")
PYTHON
