#!/usr/bin/env bash
# One node with all its GPUs, or several nodes by rendezvous.
#
# Edit: the variables and settings below, or give them in front and behind:
#   bash launch/torchrun.sh [key=value ...]                                      # one node
#   NNODES=2 RDZV_ENDPOINT=first-node:29400 bash launch/torchrun.sh [key=value ...]   # on each node
# 16 GPUs x 12 = 192; with fewer GPUs the batch stays 192, by accumulation.
#
# Stop: Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP to this script: this iteration and the next, then it saves.
# Go on: the same command again, on every node; run_dir must be one folder that all nodes see.
set -euo pipefail

RECIPE=${RECIPE:-ft_ema}
RUN_DIR=${RUN_DIR:-runs/ft_ema}              # one folder that all nodes see
NNODES=${NNODES:-1}                          # 2, or 1:2 to go on with fewer nodes
RDZV_ENDPOINT=${RDZV_ENDPOINT:-}             # host:port of the first node
GPUS_PER_NODE=${GPUS_PER_NODE:-}             # all that torch sees
MAX_RESTARTS=${MAX_RESTARTS:-3}              # of the processes, after a crash
JOIN_TIMEOUT=${JOIN_TIMEOUT:-600}            # seconds that a node waits for the others to come
settings=(
    init.weights=model.ckpt
    run_dir="$RUN_DIR"
)
case " $* " in
    *" data.sources"* | *" --data.sources"*) ;;   # yours, in place of all of these
    *) settings+=(
        data.sources.aesthetics='/data/aesthetics/{00000..09999}.tar'
        data.sources.humans='/data/humans/{00000..09999}.tar'
    ) ;;
esac
settings+=("$@")

: "${GPUS_PER_NODE:=$(python3 -c 'import torch; print(torch.cuda.device_count())')}"
if [ "${GPUS_PER_NODE:-0}" = 0 ]; then
    echo "launch/torchrun.sh: torch sees no GPUs here; fix the driver, or give GPUS_PER_NODE" >&2
    exit 2
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
# Compiled kernels, beside run_dir, which all nodes see: a restart has them in seconds.
for setting in "${settings[@]}"; do
    case $setting in run_dir=*) RUN_DIR=${setting#run_dir=} ;; esac
done
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$(dirname "$RUN_DIR")/compiled}
# A store for each start of the processes: torchrun's shared one mixes up restarts of two nodes
# (pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}  # older torch: 30, fixed

if [ "$NNODES" = 1 ]; then
    rendezvous=(--standalone)
else
    rendezvous=(
        --nnodes="$NNODES" --rdzv-backend=c10d --rdzv-id=kl-f8-train
        --rdzv-endpoint="${RDZV_ENDPOINT:?host:port of the first node}"
        --rdzv-conf="join_timeout=$JOIN_TIMEOUT"
    )
fi

# A session of its own: Ctrl-C reaches this script alone, which signals torchrun once.
setsid torchrun "${rendezvous[@]}" --nproc-per-node="$GPUS_PER_NODE" \
    --max-restarts="$MAX_RESTARTS" -m kl_f8_train train "$RECIPE" "${settings[@]}" &
torchrun=$!
stopped=0
trap 'stopped=1' HUP  # a closed terminal; not under nohup
trap 'stopped=2' INT
trap 'stopped=10' USR1
trap 'stopped=15' TERM

code=0
wait "$torchrun" || code=$?  # a signal ends the wait
if [ "$stopped" != 0 ]; then
    trap '' HUP INT USR1 TERM
    kill -TERM "$torchrun" || true
    code=0
    wait "$torchrun" || code=$((128 + stopped))  # torchrun itself says 1
fi
exit "$code"
