"""Find, start and stop a `tritonserver` on this machine, for tests and measurements on the loopback interface."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from samekit.errors import BackendError, BackendUnavailableError

if TYPE_CHECKING:
    from typing import Self

_HOST: Final = "127.0.0.1"
_START_SECONDS: Final = 120
_STOP_SECONDS: Final = 40
_BINARY: Final = "tritonserver"
_STUB: Final = "triton_python_backend_stub"
# Where the package nvidia-pytriton has the server and the libraries.
_PYTRITON: Final = "pytriton"
_PYTRITON_LIBRARIES: Final = "nvidia_pytriton.libs"


@dataclass(frozen=True)
class FoundServer:
    """A server program: `tritonserver` of PATH, or that of the package nvidia-pytriton."""

    binary: Path
    package: Path | None = None
    """Folder of the package nvidia-pytriton if the server is a part of it."""

    def backends(self, folder: Path) -> list[str]:
        """Return the server's options for its backends, which are prepared in an empty folder if necessary.

        Raises:
            BackendUnavailableError: the package has no Python backend for this version of Python.
        """
        if self.package is None:
            return []
        # The package has one stub for each version of Python, in folders where the server does not look.
        server, version = self.package / _BINARY, f"{sys.version_info[0]}.{sys.version_info[1]}"
        stub = server / "python_backend_stubs" / version / _STUB
        if not stub.exists():
            raise BackendUnavailableError(
                f"{self.package}: has no Python backend for Python {version}; use Python 3.11 to 3.13"
            )
        (folder / "python").mkdir()
        for path in (*(server / "backends" / "python").iterdir(), stub):
            if path.name != _STUB or path == stub:
                (folder / "python" / path.name).symlink_to(path)
        return ["--backend-directory", str(folder)]

    def environment(self) -> dict[str, str]:
        """Return the environment in which the server and its Python backend find their libraries and this Python."""
        environment = dict(os.environ)
        if self.package is not None:
            # The Python backend loads libpython, and uses the environment of the first python3 of PATH.
            libraries = [self.package.parent / _PYTRITON_LIBRARIES, sysconfig.get_config_var("LIBDIR")]
            environment |= {
                "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]),
                "LD_LIBRARY_PATH": os.pathsep.join(
                    [*filter(None, [os.environ.get("LD_LIBRARY_PATH")]), *map(str, filter(None, libraries))]
                ),
            }
        return environment


def find_server() -> FoundServer:
    """Return the server of this machine: `tritonserver` of PATH, else that of the package nvidia-pytriton.

    Raises:
        BackendUnavailableError: there is none.
    """
    if binary := shutil.which(_BINARY):
        return FoundServer(Path(binary))
    # The package is not imported: it needs others that samekit does not need.
    found = find_spec(_PYTRITON)
    for package in map(Path, (found and found.submodule_search_locations) or ()):
        if (binary := shutil.which(package / _BINARY / "bin" / _BINARY)) is not None:
            return FoundServer(Path(binary), package)
    raise BackendUnavailableError(
        "there is no tritonserver on this machine; run this in Triton's container, "
        "or on x86-64 Linux: pip install --no-deps nvidia-pytriton"
    )


class TritonServer:
    """A running server that serves one model repository on free ports of the loopback interface.

    Args:
        repository: the model repository.
        server: the program; that of `find_server` by default.

    Raises:
        BackendUnavailableError: there is no server, or it has no Python backend for this version of Python.
        BackendError: it ended, or was not ready in two minutes; the message has the first error of its log.
    """

    def __init__(self, repository: Path, server: FoundServer | None = None) -> None:
        server = server or find_server()
        self._binary = server.binary
        http, grpc, metrics = _free_ports(3)
        self.http = f"{_HOST}:{http}"
        """HOST:PORT of the HTTP service."""
        self.grpc = f"{_HOST}:{grpc}"
        """HOST:PORT of the gRPC service."""
        self.metrics = f"{_HOST}:{metrics}"
        """HOST:PORT of the metrics."""
        self._stack = ExitStack()
        try:
            scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="samekit-")))
            self.log_path = scratch / "log"
            """The log of the server."""
            (scratch / "backends").mkdir()
            options = server.backends(scratch / "backends")
            for name, port in (("http", http), ("grpc", grpc), ("metrics", metrics)):
                options += [f"--{name}-address", _HOST, f"--{name}-port", str(port)]
            command = [str(server.binary), "--model-repository", str(repository), *options]
            with self.log_path.open("wb") as log:
                self.process = subprocess.Popen(command, stdout=log, stderr=log, env=server.environment())
                """The process of the server."""
            self._stack.callback(self._stop)
            self._wait_ready()
        except BaseException:
            self._stack.close()
            raise

    def _wait_ready(self) -> None:
        until = time.monotonic() + _START_SECONDS
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() > until:
                lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
                # If no model failed, the last line says why the server ended.
                reason = next((line for line in lines if "failed to load" in line), [*lines[-1:], "no message"][0])
                raise BackendError(f"{self._binary}: did not start ({reason}); repair that and start again")
            time.sleep(0.1)

    def is_ready(self) -> bool:
        """Return whether the server and all its models are ready."""
        connection = HTTPConnection(self.http, timeout=5)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()

    def _stop(self) -> None:
        """End the process: it finishes the requests in work first."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        """Stop the server."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _free_ports(count: int) -> list[int]:
    """Return different ports that were free just now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((_HOST, 0))
        return [each.getsockname()[1] for each in sockets]
