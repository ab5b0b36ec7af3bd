#!/usr/bin/env bash
# Disentanglement on 3D-Shapes (paper, section 6, Table 2, Figures 7 and 12).
#
#   bash train_3dshapes.sh [--name NAME] [--betas ...] [--decoders cnn sdn] [--seeds ...] [--jobs N] [flags of train.py ...]
#
# Trains a beta-VAE for each beta of 1 32 100 300 500, decoder of cnn sdn and seed of 0 ... 9, evaluates each and gathers
# them: a table, Figure 7 and Figure 12 in figs/NAME. expected: unknown (the figures are lost from our copy of the paper;
# it says that SDN is better in ELBO and scores). hardware: one GPU with more than 10 GB, 100 runs of 300,000 steps.
# The same command goes on after an interruption; what is finished is skipped. `--help` lists the flags. Get the data with
# `bash data/3DShapes/get_3dshapes_data.sh`, or use our own pictures of the same scenes: `--dataset Shapes3DRendered`.
# Shrunken to minutes on a CPU (beta rises over the first third of the iterations unless --beta_rate is given):
#
#   bash train_3dshapes.sh --name small --dataset Shapes3DRendered --betas 1 32 --seeds 0 --gpus 0 --jobs 2 --num_workers 0 \
#       --iters 500 --batch 16 --lrate 0.004 --sdn_nfeat_0 32 --epoch_images 4000 --val_images 256 --limit 256 --levels 5 5 5 4 4 5
set -euo pipefail
cd "$(dirname "$0")"
python=${SDN_PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
exec "$python" -m experiments.disentanglement "$@"
