# ringctx on NVIDIA GPUs. NOT YET BUILT: no machine of the project has a container builder, so treat this file as a draft and report what breaks.
#   docker build -f docker/cuda.Dockerfile -t ringctx:cuda .
#   docker run --rm --gpus all --ipc=host ringctx:cuda
# torch's wheel brings its own CUDA libraries; the devel image is there for nvcc, which flash-attn needs when it is compiled.
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends make python3 python3-venv python3-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/ringctx
COPY . .
# a build sees no GPU, so the torch that belongs to GPUs is named
RUN make setup TORCH='torch>=2.13'
ARG FLASH=0
RUN if [ "$FLASH" = 1 ]; then .venv/bin/pip install --no-build-isolation 'flash-attn>=2.8'; fi
ENV PATH="/opt/ringctx/.venv/bin:$PATH"
# the weights; mount a volume there to keep them
ENV HOME=/opt/home
VOLUME ["/opt/home/.cache/ringctx"]
CMD ["launch/gpu_check.sh"]
