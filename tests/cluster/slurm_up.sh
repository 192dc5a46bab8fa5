#!/usr/bin/env bash
# A private SLURM of two virtual nodes on this host, as root, without systemd: munged, slurmctld,
# and a slurmd a node, all below DIR. Installs them by apt where they are missing.
#
#   bash tests/cluster/slurm_up.sh DIR      # then: export SLURM_CONF=DIR/slurm.conf
#   bash tests/cluster/slurm_down.sh DIR
set -euo pipefail
dir=$(realpath -m "$1")
port=${2:-26800}
host=$(hostname -s)

if ! command -v slurmctld slurmd srun munged >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update
    # Their services stay off: the package would start them where systemd runs.
    apt-get -qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends \
        slurmctld slurmd slurm-client munge
fi

mkdir -p "$dir"/{state,spool/n1,spool/n2,log,run}
chmod 755 "$dir" "$dir/run"
(umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
# cred_expire: a requeued job waits for twice its length (2 minutes by default).
cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.sock,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=sched_interval=2,bf_interval=2
JobRequeue=1
ReturnToService=2
KillWait=30
SlurmdTimeout=30
SlurmdParameters=config_overrides
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + 2))] CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$dir/slurm.conf

munged --force --key-file="$dir/munge.key" --socket="$dir/run/munge.sock" \
    --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/run/munged.seed"
slurmctld
slurmd -N n1
slurmd -N n2
for _ in $(seq 300); do
    [ "$(sinfo -h -N -o %t | sort -u)" = idle ] && exit 0
    sleep 0.2
done
sinfo -N
exit 1
