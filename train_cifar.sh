#!/usr/bin/env bash
# CIFAR10 density estimation (paper, section 5 and Table 1).
#
#   bash train_cifar.sh [sdn|cnn] [flags of train.py ...]
#
#   variant                 paper, bits/dim   hardware of the authors
#   sdn  (SDN-VAE)          2.85              8 V100 32 GB, batch 8 x 32, for days
#   cnn  (IAF-VAE+)         expected: unknown the same
#
# The figure is recalled from Table 1, which is lost from our copy of the paper. Flags given here come last and win, so
# a run can be shrunk: with one GPU, `--gpus 1 --accumulate_grad_batches 8` keeps the global batch; on a CPU,
# `--gpus 0 --depth 3 --ds_list 1 2 --h_size 32 --sdn_nfeat_0 32 --batch 8` at least runs.
# Training goes on until --iters 1000000 or until stopped; the same command with --use_checkpoint resumes.
set -euo pipefail
. "$(dirname "$0")/recipe.sh"
exec "$python" train.py --dataset CIFAR10 --exp_name "cifar10_$variant" --make_checkpoint \
    --gpus 8 --batch 32 --depth 15 --ds_list 5 10 --lrate 0.002 --lrate_decay 0.999 \
    --sdn_max_scale 32 --sdn_num_dirs 2 --sdn_nfeat_0 360 --sdn_nfeat_diff 128 \
    --obs_model DML --mix_components 5 --nbits 8 --z_size 4 --h_size 200 \
    --free_bits 0.01 --ema_coef 0.999 --random_seed 1234 --sampling_temperature 0.85 "$@"
