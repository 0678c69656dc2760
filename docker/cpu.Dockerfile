# ringctx on CPUs. NOT YET BUILT: no machine of the project has a container builder, so treat this file as a draft and report what breaks.
#   docker build -f docker/cpu.Dockerfile -t ringctx:cpu --build-arg TORCH_ARGS='--index-url <the index of torch CPU wheels>' .
#   docker run --rm ringctx:cpu                       the quick start
#   docker run --rm -e RANKS=4 ringctx:cpu launch/quickstart.sh --json
FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/ringctx
ARG TORCH_ARGS=""
COPY . .
RUN make setup TORCH_ARGS="$TORCH_ARGS"
ENV PATH="/opt/ringctx/.venv/bin:$PATH"
# the weights; mount a volume there to keep them
ENV HOME=/opt/home
VOLUME ["/opt/home/.cache/ringctx"]
CMD ["make", "run"]
