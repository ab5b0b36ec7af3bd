#!/usr/bin/env bash
# CelebAHQ256 density estimation and synthesis, 5 bits per colour (paper, section 5 and Table 1).
# First: bash data/CelebAHQ256/get_celeb_data.sh
#
#   bash train_celeb.sh [sdn|cnn] [flags of train.py ...]
#
#   variant                 paper, bits/dim   hardware of the authors
#   sdn  (SDN-VAE)          0.70              8 V100 32 GB, batch 8 x 4, for days
#   cnn  (IAF-VAE+)         expected: unknown the same
#
# The figure is recalled from Table 1, which is lost from our copy of the paper. Another version of the recipe has
# `--sdn_nfeat_0 360 --sdn_nfeat_diff 0` and `--z_size 4`. The paper's pictures use temperatures 0.6 to 1.0. Flags given
# here come last and win, so a run can be shrunk: with one GPU, `--gpus 1 --accumulate_grad_batches 8` keeps the global
# batch. Training goes on until --iters 1000000 or until stopped; the same command with --use_checkpoint resumes.
set -euo pipefail
. "$(dirname "$0")/recipe.sh"
exec "$python" train.py --dataset CelebAHQ256 --exp_name "celebahq256_$variant" --make_checkpoint \
    --gpus 8 --batch 4 --depth 17 --ds_list 4 7 9 11 13 15 --lrate 0.001 --lrate_decay 0.999 \
    --sdn_max_scale 64 --sdn_num_dirs 2 --sdn_nfeat_0 400 --sdn_nfeat_diff 80 \
    --obs_model DML --mix_components 30 --nbits 5 --z_size 8 --h_size 200 \
    --free_bits 0.01 --ema_coef 0.999 --random_seed 1234 --sampling_temperature 0.85 --figsize 4 "$@"
