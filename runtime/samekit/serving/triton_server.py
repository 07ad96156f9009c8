"""Find, start and stop a `tritonserver` on this machine, for tests and measurements on the loopback interface."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from importlib.util import find_spec
from pathlib import Path
from sysconfig import get_config_var
from typing import TYPE_CHECKING, Final

from samekit.errors import BackendError, BackendUnavailableError, first_line

if TYPE_CHECKING:
    from typing import Self

_HOST: Final = "127.0.0.1"
_START_SECONDS: Final = 120
_STOP_SECONDS: Final = 40
_BINARY: Final = "tritonserver"
_STUB: Final = "triton_python_backend_stub"
# The module of the package nvidia-pytriton, and the folder beside it that has the libraries of the server.
_PYTRITON: Final = "pytriton"
_LIBRARIES: Final = "nvidia_pytriton.libs"
_SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 the folder in which Linux shows shared memory


@dataclass(frozen=True)
class FoundServer:
    """A server program: `tritonserver` of PATH, or that of the package nvidia-pytriton."""

    binary: Path
    package: Path | None = None
    """Folder of the package nvidia-pytriton if the server is a part of it."""

    @property
    def stub(self) -> Path | None:
        """The program that runs models in this version of Python. In the package, the server does not find it."""
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        return self.package and self.package / _BINARY / "python_backend_stubs" / version / _STUB

    def backends(self, folder: Path) -> list[str]:
        """Return the server's options for its backends, which are prepared in an empty folder if necessary."""
        if self.package is None or self.stub is None:
            return []
        (folder / "python").mkdir()
        files = {path.name: path for path in (self.package / _BINARY / "backends" / "python").iterdir()}
        for name, path in (files | {_STUB: self.stub}).items():
            (folder / "python" / name).symlink_to(path)
        return ["--backend-directory", str(folder)]

    def environment(self) -> dict[str, str]:
        """Return the environment in which the server and its Python backend find their libraries and this Python."""
        if self.package is None:
            return dict(os.environ)
        # The Python backend loads libpython, and uses the environment of the first python3 of PATH.
        libraries = (os.environ.get("LD_LIBRARY_PATH"), self.package.parent / _LIBRARIES, get_config_var("LIBDIR"))
        programs = (os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath))
        return os.environ | {
            "PATH": os.pathsep.join(programs),
            "LD_LIBRARY_PATH": os.pathsep.join(str(each) for each in libraries if each),
        }

    def check_stub(self) -> None:
        """Raise BackendUnavailableError if the package cannot run models in this Python."""
        if self.stub is None:
            return
        try:
            # Without arguments it ends at once.
            done = subprocess.run([self.stub], env=self.environment(), capture_output=True, text=True, check=False)
        except OSError:
            raise BackendUnavailableError(
                f"nvidia-pytriton has no Python backend {self.stub.parent.name}; use Python 3.11, 3.12 or 3.13"
            ) from None
        # As shells, the loader of shared libraries ends with this code if it fails.
        if done.returncode == 127:
            raise BackendUnavailableError(
                f"the Python backend of nvidia-pytriton does not start ({first_line(RuntimeError(done.stderr))}); "
                f"on Debian and Ubuntu run: apt install libpython{self.stub.parent.name}"
            )


def find_server() -> FoundServer:
    """Return the server of this machine: `tritonserver` of PATH, else that of the package nvidia-pytriton.

    Raises:
        BackendUnavailableError: there is none, or it cannot run models in this version of Python.
    """
    if path := shutil.which(_BINARY):
        return FoundServer(Path(path))
    # The package is not imported: it needs others that samekit does not need.
    package = find_spec(_PYTRITON)
    for folder in (package and package.submodule_search_locations) or ():
        if path := shutil.which(os.path.join(folder, _BINARY, "bin", _BINARY)):
            server = FoundServer(Path(path), Path(folder))
            server.check_stub()
            return server
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
        BackendUnavailableError: as `find_server`.
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
            # The server exchanges tensors with its models in shared memory, which it leaves behind if it is killed.
            self._regions = f"{scratch.name}-"
            options = server.backends(scratch / "backends")
            options += ["--backend-config", f"python,shm-region-prefix-name={self._regions}"]
            for name, port in (("http", http), ("grpc", grpc), ("metrics", metrics)):
                options += [f"--{name}-address", _HOST, f"--{name}-port", str(port)]
            command = [str(server.binary), "--model-repository", str(repository), *options]
            with self.log_path.open("wb") as log:
                self.process = subprocess.Popen(
                    command, stdout=log, stderr=log, env=server.environment(), start_new_session=True
                )
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
        """End the process: it finishes the requests in work first, unless this wait is interrupted."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOP_SECONDS)
        finally:
            # If the server was killed, processes of its models can wait for it for ever.
            if sys.platform != "win32":
                with suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            for region in _SHARED_MEMORY.glob(f"{self._regions}*"):
                region.unlink(missing_ok=True)

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
