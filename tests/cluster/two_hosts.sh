#!/bin/sh
# Two hosts of this machine's own: network namespaces h1 and h2 on a bridge.  two_hosts.sh up | down | cut HOST
# As mpirun's remote shell (plm_ssh_agent): two_hosts.sh [ssh options] HOST COMMAND…
set -eu
down() {
    for host in h1 h2; do
        for pid in $(ip netns pids $host 2>/dev/null || true); do kill -9 "$pid" 2>/dev/null || true; done
        ip netns del $host 2>/dev/null || true
        ip link del vd${host#h} 2>/dev/null || true
        rm -rf /etc/netns/$host
    done
    ip link del brdistrib 2>/dev/null || true
}
case ${1:-} in
up)
    down
    ip link add brdistrib type bridge
    ip addr add 10.80.0.1/24 dev brdistrib
    ip link set brdistrib up
    for i in 1 2; do
        ip netns add h$i
        ip link add vd$i type veth peer name eth0 netns h$i
        ip link set vd$i master brdistrib up
        ip -n h$i addr add 10.80.0.1$i/24 dev eth0
        ip -n h$i link set eth0 up
        ip -n h$i link set lo up
        mkdir -p /etc/netns/h$i
        printf '127.0.0.1 localhost\n10.80.0.1 %s\n10.80.0.11 h1\n10.80.0.12 h2\n' "$(hostname)" > /etc/netns/h$i/hosts
    done ;;
down) down ;;
cut) ip link set "vd${2#h}" down ;;
*)
    while [ "${1#-}" != "$1" ]; do shift; done
    host=$1
    shift
    exec ip netns exec "$host" unshare --uts sh -c "hostname $host; $*" ;;
esac
