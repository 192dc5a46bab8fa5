#!/usr/bin/env bash
# Ends the SLURM that slurm_up.sh started in DIR: its jobs, then its daemons.
set -uo pipefail
dir=$(realpath "$1")
export SLURM_CONF=$dir/slurm.conf
scancel --user="$(id -un)" 2>/dev/null
for _ in $(seq 60); do
    [ -z "$(squeue -h 2>/dev/null)" ] && break
    sleep 0.5
done
for file in "$dir"/run/slurmd-n1.pid "$dir"/run/slurmd-n2.pid "$dir"/run/slurmctld.pid "$dir"/run/munged.pid; do
    [ -f "$file" ] || continue
    pid=$(cat "$file")
    kill "$pid" 2>/dev/null
    for _ in $(seq 50); do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.2
    done
done
exit 0
