#!/usr/bin/env bash
# Any ringctx command on the ranks of one machine or of several, through torchrun.
#   launch/torchrun.sh generate configs/smollm2_cpu.yaml --document FILE --question TEXT
#   RANKS=8 launch/torchrun.sh ...                                  8 processes on this machine
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 launch/torchrun.sh ...   on host0; NODE_RANK=1 on the other machine, same MASTER_ADDR
# torchrun itself always returns 1 on failure; the rank's own exit code is in the error file that torchrun names.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
VENV=${VENV:-.venv}
[ -e "$VENV/.ready" ] || make setup VENV="$VENV"

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
if [ "$gpus" -gt 0 ]; then RANKS=${RANKS:-$gpus}; else RANKS=${RANKS:-2}; fi
# without this torchrun gives every rank one thread; on CPUs the cores are shared out instead
share=$(($(nproc) / RANKS))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((share > 0 ? share : 1))}
# glibc's caches of small blocks split the room of large tensors: ringctx/runtime/launch.py, ENVIRONMENT
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.tcache_count=0}

if [ "${NNODES:-1}" -gt 1 ]; then
  : "${NODE_RANK:?NODE_RANK: which machine this is, from 0}" "${MASTER_ADDR:?MASTER_ADDR: the name of machine 0}"
  where=(--nnodes="$NNODES" --node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}")
else
  where=(--standalone)
fi
exec "$VENV/bin/python" -m torch.distributed.run "${where[@]}" --nproc-per-node="$RANKS" -m ringctx "$@"
