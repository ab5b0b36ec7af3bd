# Sourced by train_cifar.sh, train_imagenet.sh and train_celeb.sh with their arguments: an optional variant, sdn or cnn,
# then flags of train.py. Sets $variant and $python, and the flags that come last and so win.
cd "$(dirname "$0")"
variant=sdn
case "${1:-}" in sdn | cnn) variant=$1 && shift ;; esac
[ "$variant" = sdn ] || set -- --sdn_max_scale 0 "$@"
case " $* " in *" --precision"* | *" --amp "*) ;; *) set -- --amp "$@" ;; esac
python=${SDN_PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
