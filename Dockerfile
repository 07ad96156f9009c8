# samekit in a container, without PyTorch, for a CPU:    docker build --tag samekit .
# For NVIDIA GPUs (with the NVIDIA Container Toolkit):  docker build --tag samekit-gpu --build-arg EXTRAS=gpu,av,serve .
#
# Engines are mounted, and the root file system can be read-only:
#   docker run --rm --read-only --tmpfs /tmp --volume "$PWD/engines:/engines:ro" samekit info same-s
#   docker run --rm --read-only --tmpfs /tmp --shm-size 1g --publish 8000:8000 --volume "$PWD/engines:/engines:ro" \
#       samekit serve same-s --host 0.0.0.0
#
# The image was never built: no base image could be fetched. A test runs its installation in an empty environment.
FROM python:3.13-slim AS build
ARG EXTRAS=cpu,av,serve
WORKDIR /src
COPY . .
RUN python -m venv /opt/samekit \
    && /opt/samekit/bin/pip install --no-cache-dir --constraint constraints.txt ".[$EXTRAS]"

FROM python:3.13-slim
COPY --from=build /opt/samekit /opt/samekit
ENV PATH=/opt/samekit/bin:$PATH \
    SAMEKIT_CACHE=/engines \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# A number, so that Kubernetes can check that it is not root.
USER 10001:10001
WORKDIR /work
EXPOSE 8000
# Other commands than `serve` answer no requests.
HEALTHCHECK --start-period=60s --timeout=5s CMD ["sh", "-c", "! grep -qz '^serve$' /proc/1/cmdline || \
    python -c \"from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/healthz', timeout=4)\""]
ENTRYPOINT ["samekit"]
CMD ["--help"]
