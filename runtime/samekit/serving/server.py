"""Serve a model over HTTP with Ray Serve: on this machine, or as an application for a cluster.

`run` starts Ray and Serve on this machine. On a cluster, `serve run samekit.serving.server:app model=same-s` starts the
same application, and so does a configuration with `import_path: samekit.serving.server:app` and the fields of
`ServeOptions` as `args`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import signal
import socket
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from samekit.backends.base import count_gpus
from samekit.backends.cpu import available_cpus
from samekit.backends.experimental import SERVE, warn_experimental
from samekit.engine.folder import find_engine
from samekit.errors import BackendError, InputError, SamekitError
from samekit.packages import import_package
from samekit.serving.flow import IMPORT_PATH
from samekit.serving.options import ServeOptions
from samekit.serving.service import open_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi import FastAPI

TOKEN_VARIABLE: Final = "SAMEKIT_TOKEN"  # noqa: S105 a name
"""Environment variable with the token that clients must send."""
INSTALL: Final = "pip install 'samekit[serve]'"
_NAME: Final = "samekit"
# Requests that a replica takes beyond `max_queue`, so that it can refuse them at once and answer probes.
_SPARE_REQUESTS: Final = 32
_DRAIN_SECONDS: Final = 60
# A busy machine can make one check fail.
_WATCH_SECONDS: Final = 5
_WATCH_FAILURES: Final = 3
_OBJECT_STORE_BYTES: Final = 200 * 2**20
# Set before Ray starts; its processes inherit them. No statistics are sent, and bodies do not fill the memory. Ray's
# own metrics have no reader here. The controller looks at the replicas twice a second instead of ten times: on two
# cores, an idle server then takes 3 % of the processor time instead of 5 %.
_ENVIRONMENT: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": IMPORT_PATH,
}


def app(arguments: dict[str, Any]) -> Any:
    """Return the application for `serve run` and configurations: `arguments` are fields of `ServeOptions`.

    Raises:
        ValueError: an unknown field or value, as pydantic reports it.
    """
    from pydantic import TypeAdapter, with_config

    return deployment(TypeAdapter(with_config(extra="forbid")(ServeOptions)).validate_python(arguments))


def deployment(options: ServeOptions, folder: Path | None = None) -> Any:
    """Return the application of Ray Serve that serves a model, for `serve.run`.

    If the environment variable SAMEKIT_TOKEN is set now, requests need this token.

    Args:
        options: which model, replicas, batches and limits.
        folder: folder for the files of requests, on each machine; by default a new one in the folder for temporary
            files.

    Raises:
        BackendUnavailableError: Ray Serve is not installed.
        InputError: the token is blank.
    """
    serve = import_package("ray.serve", INSTALL)
    digest = _token_sha256()
    folder = folder or Path(tempfile.gettempdir(), f"samekit-serve-{uuid.uuid4().hex}")

    def build_app() -> FastAPI:
        return _replica(options, folder, digest)

    return serve.deployment(
        name=_NAME,
        num_replicas=options.replicas,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus_per_replica},
        max_ongoing_requests=options.max_queue + _SPARE_REQUESTS,
        max_queued_requests=options.max_queue + _SPARE_REQUESTS,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=_DRAIN_SECONDS,
    )(serve.ingress(build_app)()).bind()


def _token_sha256() -> str | None:
    """Return the SHA-256 of the token that requests need; None if the environment names none."""
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        return None
    # A token that was read from a file can end with a line break, which no header can hold.
    if not (token := token.strip()):
        raise InputError(f"{TOKEN_VARIABLE} is blank; unset it, or set it to the token that clients must send")
    return hashlib.sha256(os.fsencode(token)).hexdigest()


def _replica(options: ServeOptions, folder: Path, token_sha256: str | None) -> FastAPI:
    """Return the application of a replica, in its process."""
    counts = folder / "metrics"
    for each in (folder, counts):
        each.mkdir(mode=0o700, exist_ok=True)
    # prometheus_client reads it when it is imported.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(counts)
    from samekit.serving import metrics
    from samekit.serving.http import create_app
    from samekit.serving.service import Service

    return create_app(Service(options, folder, metrics.batch_ran), token_sha256)


@contextmanager
def run(options: ServeOptions, host: str = "127.0.0.1", port: int = 8000) -> Iterator[str]:
    """Start Ray Serve on this machine and serve a model while the `with` block runs; yield the URL.

    At the end, requests in work are completed first, for up to a minute; new ones are refused with status 503.

    Args:
        options: which model, replicas, batches and limits.
        host: the address to listen on.
        port: the TCP port; 0 takes a free one.

    Raises:
        BackendUnavailableError: Ray Serve is not installed.
        InputError: nothing can listen on the address, the replicas do not fit on this machine, or the token is blank.
        BackendError: Ray or a replica does not start.
    """
    if options.replicas * options.cpus > available_cpus() and options.cpus_per_replica:
        raise InputError(
            f"{options.replicas} replicas of {options.cpus} cores do not fit on the {available_cpus()} cores of this "
            "machine; pass less"
        )
    # A replica cannot have shares of several GPUs. Floor division would be wrong: 1 // 0.1 is 9.
    if (share := options.gpus_per_replica) and options.replicas > (gpus := count_gpus()) * int(1 / share):
        raise InputError(
            f"{options.replicas} replicas of {share:g} GPUs do not fit on the {gpus} GPUs of this machine; pass less"
        )
    _token_sha256()
    port = _checked_port(host, port)
    if options.gpus_per_replica:
        warn_experimental(SERVE)
    _check_model(options)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_MODE" not in os.environ:
        # Ray's own ports are open on every interface. Its processes inherit this token, which no file holds.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    ray = import_package("ray", INSTALL)
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    cores = max(available_cpus(), options.replicas * options.cpus)
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="samekit-serve-", ignore_cleanup_errors=True))
        )
        try:
            stack.callback(ray.shutdown)
            # Ray's processes need seconds to start. The import of Serve takes one second, beside them.
            with _kept_signal_handlers(), ThreadPoolExecutor(1) as beside:
                imported = beside.submit(import_package, "ray.serve", INSTALL)
                ray.init(
                    "local",
                    num_cpus=cores,
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    **quiet,
                )
            serve = imported.result()
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
            serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
            serve.run(deployment(options, folder), name=_NAME, route_prefix="/")
        except SamekitError:
            raise
        except Exception as error:  # noqa: BLE001 Ray has no error class for this
            raise BackendError(
                f"the server does not start ({_cause(error)}); see /tmp/ray/session_latest/logs"
            ) from None
        try:
            yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
        finally:
            # If Ray has died, there is nothing to drain, and Serve would wait for it.
            if _ray_lives():
                serve.delete(_NAME)


def watch() -> NoReturn:
    """Wait until an exception, such as that of a signal, ends the block of `run`.

    Raises:
        BackendError: Ray's own process on this machine died. Serve replaces replicas and proxies, but not this one.
    """
    failed = 0
    while failed < _WATCH_FAILURES:
        failed = 0 if _ray_lives() else failed + 1
        time.sleep(_WATCH_SECONDS)
    raise BackendError("the server ended, because Ray's process on this machine died; start it again")


def _ray_lives() -> bool:
    try:
        return any(node["Alive"] for node in import_package("ray", INSTALL).nodes())
    except Exception:  # noqa: BLE001 Ray has no error class for this
        return False


def _check_model(options: ServeOptions) -> None:
    """Raise the error of a model that does not open, before Ray starts. Opening it on a GPU is left to the replicas."""
    if options.gpus_per_replica:
        find_engine(options.model).check(options.precision)
    else:
        open_model(options).close()


def _cause(error: Exception) -> str:
    """Return the line of Ray's message that names the error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "Error: " in line]
    return (named or lines or [type(error).__name__])[-1]


def _checked_port(host: str, port: int) -> int:
    """Return the port, or a free one for 0; raise InputError if nothing can listen there. Ray would report it late."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            free: int = listener.getsockname()[1]
            return free
    except OSError as error:
        raise InputError(
            f"{host}:{port} cannot be used ({error.strerror or error}); pass another --host or --port"
        ) from None


@contextmanager
def _kept_signal_handlers() -> Iterator[None]:
    """Keep Python's signal handlers, which Ray replaces by some that print a stack or change the exit code."""
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
