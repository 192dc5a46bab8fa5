#!/usr/bin/env bash
# The published chain: kl-f8 -> ft-EMA -> export -> ft-MSE -> export -> evaluate.
#
# Edit: the variables below, and the data in the script that trains (LAUNCH).
#   bash launch/chain.sh [key=value ...]      # settings of both stages
#   LAUNCH="sbatch --wait launch/slurm.sbatch" bash launch/chain.sh
#
# Stop: Ctrl-C, or SIGTERM to its process group (kill -- -PID): the stage saves and ends.
# Go on: the same command again. What is done is skipped; a stage resumes from its checkpoint.
set -euo pipefail
trap 'exit 143' TERM  # once the stage has ended

KL_F8=${KL_F8:-model.ckpt}
RUNS=${RUNS:-runs}
IMAGES=${IMAGES:-/data/coco/val2017}
LAUNCH=${LAUNCH:-bash launch/torchrun.sh}
FT_EMA=${FT_EMA:-ft_ema}                     # recipes
FT_MSE=${FT_MSE:-ft_mse}
EVALUATE=${EVALUATE:-}                       # flags, such as --size 512

stage() {  # stage NAME RECIPE WEIGHTS [key=value ...]: trains and exports into $RUNS/NAME
    local run_dir=$RUNS/$1 recipe=$2 weights=$3
    shift 3
    if [ -e "$run_dir/export/README.md" ]; then
        echo "chain: $run_dir/export is there"
        return
    fi
    # shellcheck disable=SC2086  # LAUNCH is words
    RECIPE=$recipe RUN_DIR=$run_dir $LAUNCH init.weights="$weights" run_dir="$run_dir" "$@"
    python -m kl_f8_train export "$run_dir"
}

stage ft_ema "$FT_EMA" "$KL_F8" "$@"
stage ft_mse "$FT_MSE" "$RUNS/ft_ema" "$@"
if [ -e "$RUNS/evaluation/per_image.csv" ]; then
    echo "chain: $RUNS/evaluation is there"
else
    # shellcheck disable=SC2086  # EVALUATE is words
    python -m kl_f8_train evaluate kl-f8="$KL_F8" ft-EMA="$RUNS/ft_ema/export/diffusers" \
        ft-MSE="$RUNS/ft_mse/export/diffusers" --images "$IMAGES" --out "$RUNS/evaluation" $EVALUATE
fi
