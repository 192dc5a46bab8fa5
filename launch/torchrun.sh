#!/usr/bin/env bash
# One node, all its GPUs. Edit the paths; run it again to go on after any interruption.
#
#   bash launch/torchrun.sh [key=value ...]
#
# Stop it with Ctrl-C or SIGTERM: the iteration is finished and saved.
set -euo pipefail

gpus=$(nvidia-smi --list-gpus | wc -l)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

exec torchrun --standalone --nproc-per-node "$gpus" -m kl_f8_train train ft_ema \
    init.weights=model.ckpt \
    data.sources.aesthetics='/data/aesthetics/{00000..09999}.tar' \
    data.sources.humans='/data/humans/{00000..09999}.tar' \
    run_dir=runs/ft_ema \
    "$@"
