#!/usr/bin/env bash
# On a machine with one or more NVIDIA GPUs: sets up, says what can run, runs the tests marked gpu, then the example over all GPUs.
# What is printed is what a report of a GPU problem should hold.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}
nvidia-smi -L || { echo "no NVIDIA GPU is visible here; on CPUs run: make test" >&2; exit 2; }
gpus=$(nvidia-smi -L | grep -c '^GPU')

make setup VENV="$VENV"
"$VENV/bin/python" - <<'PYTHON'
import sys, torch
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPU visible to torch")
if not torch.cuda.is_available():
    sys.exit("torch sees no GPU: the driver and this build of torch do not fit. Choose a build: make clean; make setup TORCH_ARGS='--index-url ...'")
PYTHON
printf '\n== kernels for a causal bfloat16 call with 8 heads of width 64\n'
"$VENV/bin/python" - <<'PYTHON'
import torch
from ringctx.kernels import REGISTRY, Call
call = Call("cuda", torch.bfloat16, h=8, g=8, d=64, e=64, causal=True, backward=True)
for kernel in REGISTRY:
    print(f"{kernel.name:10} {kernel.why_not(call) or 'takes it'}")
PYTHON
printf '\n== tests marked gpu\n'
status=0
"$VENV/bin/python" -m pytest -q -m gpu tests || status=$?
[ "$status" -ne 5 ] || { echo "no test is marked gpu yet"; status=0; }
printf '\n== the example, one rank a GPU\n'
OMP_NUM_THREADS=1 "$VENV/bin/python" -m torch.distributed.run --standalone --nproc-per-node="$gpus" launch/examples/attend.py
exit "$status"
