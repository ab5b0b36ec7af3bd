#!/usr/bin/env bash
# CelebAHQ256: downloads Glow's archive celeba-tfr.tar and converts it to train.lmdb and validation.lmdb.
#
#   bash data/CelebAHQ256/get_celeb_data.sh
#
# Interrupted, the same command goes on. Environment:
#   SDN_DATA_ROOT  the folder of all data sets, what train.py calls --root (default: data/ of this repository); the
#                  files are put into $SDN_DATA_ROOT/CelebAHQ256
#   SDN_DATA_URL   another address of the archive
#   SDN_PYTHON     the interpreter (default: .venv/bin/python of this repository, else python3)
name=CelebAHQ256 archive_name=celeba-tfr.tar train_script=train_celeb.sh
. "$(dirname "${BASH_SOURCE[0]}")/../get_glow_archive.sh"
