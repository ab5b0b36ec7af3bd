#!/usr/bin/env bash
# Disentanglement on 3D-Shapes (paper, section 6).
echo "train_3dshapes.sh: error: the disentanglement task is not part of this version; train_cifar.sh, train_imagenet.sh and train_celeb.sh are" >&2
exit 2
