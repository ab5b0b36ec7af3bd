#!/usr/bin/env bash
# Sets up .venv, trains a small SDN-VAE on photographs on the CPU, evaluates it and draws samples.
# Interrupted, it goes on where it was. `rm -r checkpoints/quickstart figs/quickstart` starts anew.
set -euo pipefail
cd "$(dirname "$0")"
. ./setup.sh
promised=0
"$python" -m data.histogram Photos32
"$python" train.py --dataset Photos32 --exp_name quickstart --make_checkpoint --use_checkpoint --logger none --gpus 0 \
    --iters 500 --batch 16 --batch_val 64 --num_workers 0 --lrate 0.004 --lrate_decay 1 --ema_coef 0.98 \
    --downsample_first --depth 3 --ds_list 1 2 --h_size 32 --z_size 4 --mix_components 3 \
    --sdn_nfeat_0 32 --sdn_num_dirs 2 --random_seed 1234
"$python" evaluate.py --model quickstart --elbo --sampling --temperatures 0.7 1.0 --batch 64 --device cpu
measured=$("$python" -c "import json; print('%.2f' % json.load(open('figs/quickstart/results.json'))['elbo']['bits_per_dim'])")
cat <<TEXT

-ELBO on validation photographs: $measured bits/dim (README: $promised, within 0.15)
samples:                         figs/quickstart/samples_t1.00.png
next:                            $python evaluate.py --model quickstart --likelihood --importance_samples 64 --limit 64
TEXT
