#!/usr/bin/env bash
# A real Slurm on one machine, as root, from Debian's packages, without systemd: slurm_cluster.sh install | up [NODES] | down | crash NODE | env
#
# Each node is a slurmd in a network namespace with a host name of its own (node1, node2, ...) on the bridge
# 10.79.0.0/24, where this machine is 10.79.0.1. Its GPUs are device files that nobody opens. Munge has its own key
# and socket. Everything but the namespaces and /etc/netns lies in $SLURM_CLUSTER_DIR.
set -euo pipefail
D=${SLURM_CLUSTER_DIR:-/tmp/distrib-slurm}
CPUS=4 # of a node, whatever the machine has
GPUS=4 # of a node, pretended
NET=10.79.0
BRIDGE=brslurm0
export SLURM_CONF=$D/slurm.conf

fail() { echo "slurm_cluster.sh: $*" >&2; exit 1; }

lacking() { # the programs that are not there
    local tool
    for tool in slurmctld slurmd munged srun sbatch ip; do command -v "$tool" >/dev/null || echo -n " $tool"; done
}

install() { # Debian's packages, where a program is missing
    [ -n "$(lacking)" ] || return 0
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        slurmctld slurmd slurm-client munge libpmix2 iproute2
}

link_pmix() {
    local pmix
    for pmix in /usr/lib/*/pmix2/lib/libpmix.so.2; do # Slurm's plugin opens a name that only libpmix-dev has
        [ -e "${pmix%.2}" ] || ln -s libpmix.so.2 "${pmix%.2}"
    done
}

start() { # NAME COMMAND...: in the background, with its id in $D/pids
    local name=$1
    shift
    setsid "$@" </dev/null >"$D/log/$name.out" 2>&1 &
    echo $! >>"$D/pids"
}

configure() { # NODES
    local i
    for i in $(seq 0 $((GPUS - 1))); do mknod "$D/gpu$i" c 195 "$i"; done
    echo "Name=gpu File=$D/gpu[0-$((GPUS - 1))]" >"$D/gres.conf"
    printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' >"$D/cgroup.conf"
    cat >"$SLURM_CONF" <<CONF
ClusterName=distrib
SlurmctldHost=$(hostname -s)($NET.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits as long as a credential lives, 5 s at least.
AuthInfo=socket=$D/munge/socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
GresTypes=gpu
SlurmctldPort=6927
SlurmdPort=6928
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd.%n.pid
SlurmdSpoolDir=$D/spool/%n
# Of each node's own, else the PMIx servers of two nodes meet in one folder.
TmpFS=$D/tmp/%n
StateSaveLocation=$D/state
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
KillWait=5
SchedulerParameters=batch_sched_delay=0,sched_interval=1
JobRequeue=0
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
NodeName=node[1-$1] NodeAddr=$NET.[11-$((10 + $1))] CPUs=$CPUS RealMemory=1000 Gres=gpu:$GPUS State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

namespaces() { # NODES
    local i j
    ip link add "$BRIDGE" type bridge
    ip addr add "$NET.1/24" dev "$BRIDGE"
    ip link set "$BRIDGE" up
    for i in $(seq "$1"); do
        ip netns add "slurm-node$i"
        ip link add "vslurm$i" type veth peer name eth0 netns "slurm-node$i"
        ip link set "vslurm$i" master "$BRIDGE" up
        ip -n "slurm-node$i" addr add "$NET.$((10 + i))/24" dev eth0
        ip -n "slurm-node$i" link set eth0 up
        ip -n "slurm-node$i" link set lo up
        mkdir -p "/etc/netns/slurm-node$i"
        {
            echo "127.0.0.1 localhost"
            echo "$NET.1 $(hostname -s)"
            for j in $(seq "$1"); do echo "$NET.$((10 + j)) node$j"; done
        } >"/etc/netns/slurm-node$i/hosts"
    done
}

node() { # I: start its slurmd
    start "slurmd$1" ip netns exec "slurm-node$1" unshare --uts sh -c "hostname node$1 && exec slurmd -D -N node$1"
}

crash() { # I: all that runs on it is gone at once, as when its power fails; then it is rebooted, some seconds later
    local pid
    for pid in $(ip netns pids "slurm-node$1"); do kill -KILL "$pid" 2>/dev/null || true; done
    sleep "${2:-10}"
    rm -rf "$D/spool/node$1" "$D/tmp/node$1"
    mkdir -p "$D/spool/node$1" "$D/tmp/node$1"
    node "$1"
}

up() { # NODES
    [ "$(id -u)" = 0 ] || fail "needs root, for network namespaces and packages"
    [ ! -s "$D/pids" ] || fail "is already up in $D"
    mkdir -p "$D"/{state,log,spool,tmp,munge}
    [ -z "$(lacking)" ] || fail "missing:$(lacking): $0 install brings them"
    link_pmix
    local i
    for i in $(seq "$1"); do mkdir -p "$D/tmp/node$i" "$D/spool/node$i"; done
    head -c 1024 /dev/urandom >"$D/munge/key"
    chmod 400 "$D/munge/key"
    chmod 755 "$D" "$D/munge"
    configure "$1"
    namespaces "$1" 2>"$D/log/ip.out" || fail "cannot make network namespaces: $(tail -n 1 "$D/log/ip.out")"
    start munged munged --foreground --force --key-file="$D/munge/key" --socket="$D/munge/socket" \
        --pid-file="$D/munge/pid" --log-file="$D/log/munged.log" --seed-file="$D/munge/seed"
    for i in $(seq 600); do [ ! -S "$D/munge/socket" ] || break; sleep 0.1; done
    start slurmctld slurmctld -c -D
    for i in $(seq 600); do ! scontrol ping 2>/dev/null | grep -q 'is UP' || break; sleep 0.1; done # else slurmd asks again late
    for i in $(seq "$1"); do node "$i"; done
    for i in $(seq 1200); do
        [ "$(sinfo -h -t idle -o %D 2>/dev/null)" != "$1" ] || return 0
        sleep 0.1
    done
    fail "nodes are not idle after 120 s: $(sinfo -h -N -o '%N %T %E' | tr '\n' ' ') $(grep -h error "$D"/log/*.log | tail -n 1)"
}

down() {
    local pid name
    if [ -s "$D/pids" ]; then
        scancel --user=root --signal=KILL --full 2>/dev/null || true
        scancel --user=root 2>/dev/null || true
        for _ in $(seq 100); do [ -n "$(squeue -h 2>/dev/null)" ] || break; sleep 0.1; done
        for pid in $(tac "$D/pids"); do kill "$pid" 2>/dev/null || true; done
        for pid in $(tac "$D/pids"); do
            for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
            kill -KILL "$pid" 2>/dev/null || true
        done
    fi
    for name in $(ip netns list 2>/dev/null | sed -n 's/^\(slurm-node[0-9]*\).*/\1/p'); do
        for pid in $(ip netns pids "$name"); do kill -KILL "$pid" 2>/dev/null || true; done
        ip netns del "$name"
        rm -rf "/etc/netns/$name"
    done
    ip link del "$BRIDGE" 2>/dev/null || true
    rm -rf "$D"
}

case ${1:-} in
    install) install ;;
    up) up "${2:-1}" ;;
    down) down ;;
    crash) crash "$2" "${3:-}" ;;
    env) echo "export SLURM_CONF=$SLURM_CONF" ;;
    *) echo "usage: $0 install | up [NODES] | down | crash NODE [SECONDS] | env" >&2; exit 2 ;;
esac
