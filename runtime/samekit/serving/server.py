"""Serve a model over HTTP with Ray Serve."""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING, Any

from samekit.backends.cpu import available_cpus
from samekit.serving.options import ServeOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi import FastAPI
    from ray.serve import Application

from contextlib import contextmanager


def deployment(options: ServeOptions) -> Application:
    """Return the application of Ray Serve that serves a model, for `serve.run`."""
    from ray import serve

    def build_app() -> FastAPI:
        from samekit.serving.http import create_app
        from samekit.serving.service import Service

        return create_app(Service(options))

    return serve.deployment(
        name="samekit",
        num_replicas=options.replicas,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus_per_replica},
        max_ongoing_requests=options.max_queue + 32,
        max_queued_requests=options.max_queue,
        graceful_shutdown_timeout_s=60,
    )(serve.ingress(build_app)()).bind()


@contextmanager
def run(options: ServeOptions, host: str = "127.0.0.1", port: int = 8000) -> Iterator[None]:
    """Start Ray Serve on this machine and serve a model while the `with` block runs."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve

    cores = max(available_cpus(), options.replicas * options.cpus)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    ray.init("local", num_cpus=cores, include_dashboard=False, object_store_memory=200 * 2**20, **quiet)
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
        serve.run(deployment(options), name="samekit", route_prefix="/")
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def free_port(host: str) -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as listener:
        listener.bind((host, 0))
        port: int = listener.getsockname()[1]
        return port
