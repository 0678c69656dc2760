#!/usr/bin/env bash
# A ringctx command on ranks that only a slow link joins: each in a network namespace of its own, what it sends limited to RATE.
# Needs root and iproute2 (apt-get install iproute2). What was made is removed at the end. From the repository's root:
#   launch/shaped-ring.sh RANKS RATE COMMAND...     launch/shaped-ring.sh 2 200mbit bench --length 2048 --transport rotate --floors
# NODES=n: n equal runs of ranks in a namespace each, so that ranks of a run talk as on one machine.
# PYTHON is the interpreter, .venv/bin/python by default. Standard output is rank 0's.
set -euo pipefail
if [ $# -lt 3 ]; then
  sed -n '2,6s/^# \?//p' "$0" >&2
  exit 2
fi
if [ "$(id -u)" != 0 ]; then
  echo "Network namespaces are made by root alone; run this as root." >&2
  exit 2
fi
ranks=$1 rate=$2
shift 2
nodes=${NODES:-$ranks}
if [ $((ranks % nodes)) != 0 ]; then
  echo "$ranks ranks do not sit on $nodes nodes in equal runs; give NODES that divides them." >&2
  exit 2
fi
python=$(realpath --no-symlinks "${PYTHON:-.venv/bin/python}")
bridge=rc$$ space=ringctx-$$

clean() {
  for ((i = 0; i < nodes; i++)); do ip netns del "$space-$i" 2>/dev/null || true; done
  ip link del "$bridge" 2>/dev/null || true
}
trap clean EXIT

ip link add "$bridge" type bridge
ip link set "$bridge" up
for ((i = 0; i < nodes; i++)); do
  ip netns add "$space-$i"
  ip link add "rc$$v$i" type veth peer name eth0 netns "$space-$i"
  ip link set "rc$$v$i" master "$bridge" up
  ip netns exec "$space-$i" sh -euc "
    ip link set lo up
    ip addr add 10.77.0.$((i + 1))/24 dev eth0
    ip link set eth0 up
    tc qdisc add dev eth0 root tbf rate $rate burst 256kb latency 400ms"
done

start() { # a node's ranks
  exec ip netns exec "$space-$1" env GLOO_SOCKET_IFNAME=eth0 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" \
    GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.tcache_count=0}" \
    "$python" -m torch.distributed.run --nnodes="$nodes" --node-rank="$1" --nproc-per-node=$((ranks / nodes)) \
    --master-addr=10.77.0.1 --master-port=29800 -m ringctx "${@:2}"
}
others=()
for ((i = 1; i < nodes; i++)); do
  (start "$i" "$@") >&2 &
  others+=($!)
done
status=0
(start 0 "$@") || status=$?
for other in "${others[@]}"; do wait "$other" || status=$?; done
exit "$status"
