#!/usr/bin/env bash
#SBATCH --job-name=ringctx
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=01:00:00
#SBATCH --output=ringctx-%j.log
# One torchrun a node; all ranks of all nodes share the sequence. Not yet run on a Slurm cluster by this project.
#   sbatch launch/slurm.sh generate configs/smollm2_cpu.yaml --document FILE --question TEXT
# Submit from the project's folder, on a file system that the nodes share, after `make setup` on a node with a GPU.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit with sbatch, from the folder of the project}"
[ $# -gt 0 ] || { echo "give a ringctx command, as in: sbatch launch/slurm.sh generate configs/smollm2_cpu.yaml --document FILE --question TEXT" >&2; exit 2; }

export MASTER_ADDR MASTER_PORT NNODES
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
NNODES=$SLURM_JOB_NUM_NODES
# shellcheck disable=SC2016  # SLURM_NODEID is expanded on each node
exec srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec launch/torchrun.sh "$@"' torchrun "$@"
