#!/usr/bin/env bash
# ImageNet32: downloads Glow's archive imagenet-oord-tfr.tar and converts it to train.lmdb and validation.lmdb.
#
#   bash data/ImageNet32/get_imagenet_data.sh
#
# Interrupted, the same command goes on. Environment:
#   SDN_DATA_ROOT  the folder of all data sets, what train.py calls --root (default: data/ of this repository); the
#                  files are put into $SDN_DATA_ROOT/ImageNet32
#   SDN_DATA_URL   another address of the archive
#   SDN_PYTHON     the interpreter (default: .venv/bin/python of this repository, else python3)
name=ImageNet32 archive_name=imagenet-oord-tfr.tar train_script=train_imagenet.sh
. "$(dirname "${BASH_SOURCE[0]}")/../get_glow_archive.sh"
