"""Start `samekit serve` in a new process, and measure memory, processor time and files of all its processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click
import httpx
import psutil

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping, Sequence
    from pathlib import Path

START_SECONDS, REPLACE_SECONDS, FILES_SECONDS, STOP_SECONDS = 180, 60, 20, 90
REPLICA = "ray::ServeReplica"
"""How the command line of a replica begins."""
MIB = 1 << 20


@dataclass
class Sample:
    """What the server's processes use at one moment."""

    seconds: float
    """Since the server was started."""
    mib: float
    """Memory of all processes; pages that several of them share count once (PSS)."""
    replica_mib: float
    processes: int
    descriptors: int
    """Open files, pipes and connections."""
    files: int
    """Files in the server's folder for temporary files, without those of Ray."""


def free_port() -> int:
    """Return a port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Server:
    """A running server.

    Args:
        engine: what it serves.
        folder: an empty folder for its log and its temporary files. Its path must be short, because Ray puts sockets
            into it.
        options: further options of `samekit serve`.
        environment: further environment variables.

    Raises:
        click.ClickException: it is not ready after `START_SECONDS`.
    """

    engine: Path
    folder: Path
    options: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self.url = f"http://127.0.0.1:{self.port}"
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir()
        self.log = self.folder / "log.txt"
        self._cpu: dict[psutil.Process, float] = {}
        command = [sys.executable, "-m", "samekit", "serve", str(self.engine), "--port", str(self.port), *self.options]
        # Settings of the user's shell that would change what is measured.
        environment = {name: value for name, value in os.environ.items() if name != "SAMEKIT_TOKEN"}
        environment |= {"TMPDIR": str(self.temporary), "RAY_TMPDIR": str(self.temporary), **self.environment}
        self.started = time.perf_counter()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.perf_counter() - self.started

    def _wait_until_ready(self) -> None:
        while not self.is_ready():
            if self.process.poll() is not None or time.perf_counter() - self.started > START_SECONDS:
                said = self.log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
                raise click.ClickException(f"the server did not start: {said[-1]}")
            time.sleep(0.1)

    def is_ready(self) -> bool:
        """Return whether the server says that it is ready."""
        with suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/readyz", timeout=5, trust_env=False).is_success
        return False

    def processes(self) -> list[psutil.Process]:
        """Return the processes of the server that live now, and remember them."""
        found = []
        with suppress(psutil.Error):
            parent = psutil.Process(self.process.pid)
            found = [parent, *parent.children(recursive=True)]
        for process in found:
            self._cpu.setdefault(process, 0.0)
        return [process for process in found if process.is_running()]

    def replicas(self) -> list[psutil.Process]:
        """Return the processes that run replicas of deployments."""
        return [process for process in self.processes() if _title(process).startswith(REPLICA)]

    def wait_for_replicas(self, count: int) -> list[psutil.Process]:
        """Wait until so many replicas run, at most `REPLACE_SECONDS`, and return them."""
        end = time.perf_counter() + REPLACE_SECONDS
        while len(found := self.replicas()) < count and time.perf_counter() < end:
            time.sleep(0.5)
        return found

    def kill_replica(self, chance: random.Random) -> str | None:
        """Kill a replica by SIGKILL and return its title, or None if there is none at the moment."""
        replicas = self.replicas()
        if not replicas:
            return None
        victim = chance.choice(replicas)
        title = _title(victim)
        with suppress(psutil.Error):
            victim.kill()
        return title

    def cpu_seconds(self) -> float:
        """Return the processor time of all processes so far, also of those that ended since the last call."""
        for process in self.processes():
            with suppress(psutil.Error):
                times = process.cpu_times()
                self._cpu[process] = times.user + times.system
        return sum(self._cpu.values())

    def sample(self) -> Sample:
        """Measure what the processes use now."""
        total = replicas = 0.0
        descriptors, processes = 0, self.processes()
        for process in processes:
            with suppress(psutil.Error):
                memory = process.memory_full_info().pss / MIB
                total += memory
                replicas += memory if _title(process).startswith(REPLICA) else 0
                descriptors += process.num_fds()
        seconds = time.perf_counter() - self.started
        return Sample(seconds, total, replicas, len(processes), descriptors, len(self.temporary_files()))

    def temporary_files(self) -> list[str]:
        """Return the files in the folder for temporary files, without those of Ray."""
        found = []
        for folder, folders, files in os.walk(self.temporary):
            folders[:] = [name for name in folders if not (name == "ray" or name.startswith("session_"))]
            found += [os.path.join(folder, name) for name in files]
        return sorted(found)

    def wait_for_new_files(self, before: list[str]) -> list[str]:
        """Wait until the files of the last requests are deleted, at most `FILES_SECONDS`; return the other new ones."""
        end = time.perf_counter() + FILES_SECONDS
        while (new := sorted(set(self.temporary_files()) - set(before))) and time.perf_counter() < end:
            time.sleep(0.5)
        return new

    def stop(self) -> dict[str, Any]:
        """End the server by SIGTERM; return its exit code, the seconds it took, and which processes it left."""
        self.processes()
        begin = time.perf_counter()
        self.process.send_signal(signal.SIGTERM)
        try:
            code: int | str = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            code = "killed"
        seconds = time.perf_counter() - begin
        _, left = psutil.wait_procs(list(self._cpu), timeout=10)
        titles = [_title(process) for process in left]
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        return {"exit_code": code, "seconds": round(seconds, 2), "left_processes": titles}


def _title(process: psutil.Process) -> str:
    """Return the beginning of a process's command line."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())[:120]
    return ""
