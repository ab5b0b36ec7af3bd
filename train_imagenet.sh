#!/usr/bin/env bash
# ImageNet32 density estimation (paper, section 5 and Table 1). First: bash data/ImageNet32/get_imagenet_data.sh
#
#   bash train_imagenet.sh [sdn|cnn] [flags of train.py ...]
#
#   variant                 paper, bits/dim   hardware of the authors
#   sdn  (SDN-VAE)          3.85              8 V100 32 GB, batch 8 x 32, for days
#   cnn  (IAF-VAE+)         expected: unknown the same
#
# The figure is recalled from Table 1, which is lost from our copy of the paper. The images are Glow's 32x32
# downsampling, not that of other papers, so bits/dim compare only with results on the same files. Flags given here come
# last and win, so a run can be shrunk: with one GPU, `--gpus 1 --accumulate_grad_batches 8` keeps the global batch.
# Without --precision the authors' --amp is used.
# Training goes on until --iters 1000000 or until stopped; the same command with --use_checkpoint resumes.
set -euo pipefail
. "$(dirname "$0")/recipe.sh"
exec "$python" train.py --dataset ImageNet32 --exp_name "imagenet32_$variant" --make_checkpoint \
    --gpus 8 --batch 32 --depth 16 --ds_list 3 7 11 --lrate 0.002 --lrate_decay 1 \
    --sdn_max_scale 32 --sdn_num_dirs 3 --sdn_nfeat_0 424 --sdn_nfeat_diff 0 \
    --obs_model DML --mix_components 10 --nbits 8 --z_size 4 --h_size 200 \
    --free_bits 0.01 --ema_coef 0.9995 --random_seed 13 --sampling_temperature 1.0 "$@"
