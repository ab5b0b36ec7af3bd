#!/usr/bin/env bash
# Ablation of the spatial dependency layer on CIFAR10 (paper, A.2, Figure 8 and Table 4): is it the parameters?
#
#   bash train_ablation.sh [BLOCK ...] [flags of train.py ...]
#
#   BLOCK                     on the top-down path, in place of IAF-VAE+'s 3x3 convolutions       learning rate
#   sdn                       ResSDN layers: SDN-VAE                                              0.002
#   conv3                     nothing else: IAF-VAE+                                              0.002
#   conv5   conv5-highway     5x5 convolutions                                                    0.0005
#   conv3x2 conv3x2-highway   two 3x3 convolutions with ELU between                               0.001
#   conv3x4 conv3x4-highway   four                                                                0.0005
#
# "-highway": gated with a 3x3 convolution, as the ResSDN layer is. Without a block: all, one after another. The rates are
# the paper's, halved after ten validations without a better one; which of its blocks B1, B2, B4 had which is lost with
# Figure 8, so that the order is our reading. This takes the place of train_cifar.sh's decay; all else is as there. A run is
# called ablation_BLOCK_seedSEED (--random_seed, 1234 if not given). expected: the paper's Table 4 is lost, too; it
# says that no block, whatever its parameters, comes near ResSDN. hardware: 8 V100 32 GB, for days, for each block.
# The same command goes on after an interruption. `python -m experiments.gather checkpoints` makes the table.
set -euo pipefail
cd "$(dirname "$0")"
all="sdn conv3 conv5 conv5-highway conv3x2 conv3x2-highway conv3x4 conv3x4-highway"
blocks=()
while [ $# -gt 0 ] && [[ $1 != -* ]]; do
    case " $all " in
    *" $1 "*) blocks+=("$1") && shift ;;
    *) echo "train_ablation.sh: error: there is no block $1; blocks are $all" >&2 && exit 2 ;;
    esac
done
[ ${#blocks[@]} -gt 0 ] || read -ra blocks <<<"$all"
seed=1234
for ((i = 1; i <= $#; i++)); do
    case ${!i} in
    --random_seed) next=$((i + 1)) && seed=${!next:-} ;;
    --random_seed=*) seed=${!i#*=} ;;
    --exp_name | --exp_name=*)
        echo "train_ablation.sh: error: --exp_name is chosen for each block: ablation_BLOCK_seedSEED" >&2 && exit 2
        ;;
    esac
done
for block in "${blocks[@]}"; do
    case $block in
    sdn | conv3) lrate=0.002 ;;
    conv3x2*) lrate=0.001 ;;
    *) lrate=0.0005 ;;
    esac
    highway=()
    case $block in *-highway) highway=(--highway on) ;; esac
    bash train_cifar.sh --exp_name "ablation_${block}_seed$seed" --use_checkpoint --lrate "$lrate" --lrate_decay 1 \
        --lrate_patience 10 --block "${block%-highway}" "${highway[@]}" "$@"
done
