#!/usr/bin/env bash
# On a machine with one or more NVIDIA GPUs: sets up, says what can run, holds every GPU path against float64, measures, and runs the
# example over all GPUs. All of it is printed and kept in runs/gpu_check.txt, which is what a report of a GPU problem
# should hold; runs/gpu_check.xml is for docs/gpu.md (python -m tests.gpu.paths).
# PYTHON=python3 launch/gpu_check.sh uses that interpreter and what it has installed, and sets nothing up. QUICK=1 measures less.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
nvidia-smi -L || { echo "no NVIDIA GPU is visible here; on CPUs run: make test" >&2; exit 2; }
gpus=$(nvidia-smi -L | grep -c '^GPU')
if [ -z "${PYTHON:-}" ]; then
    VENV=${VENV:-.venv}
    make setup VENV="$VENV"
    PYTHON=$VENV/bin/python
fi
export PYTHONPATH=${PYTHONPATH:-}${PYTHONPATH:+:}$PWD TRITON_DEFAULT_FP_FUSION=1
mkdir -p runs

check() {
    "$PYTHON" - <<'PYTHON' || return
import sys, torch
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPU visible to torch")
if not torch.cuda.is_available():
    sys.exit("torch sees no GPU: the driver and this build of torch do not fit. Choose a build: make clean; make setup TORCH_ARGS='--index-url ...'")
PYTHON
    printf '\n== what is here\n'
    "$PYTHON" -m ringctx doctor
    printf '\n== tests marked gpu\n'
    local status=0
    "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider -o junit_family=xunit1 --junitxml=runs/gpu_check.xml tests/gpu || status=$?
    printf '\n== measured\n'
    "$PYTHON" -m tests.gpu.measured ${QUICK:+--quick} || status=$?
    printf '\n== the example, one rank a GPU\n'
    OMP_NUM_THREADS=1 "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node="$gpus" launch/examples/attend.py || status=$?
    return "$status"
}

check 2>&1 | tee runs/gpu_check.txt
