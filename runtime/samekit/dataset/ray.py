"""Encode a dataset with actors on a Ray cluster. Ray is imported when a `RayExecutor` is opened.

    this process    tasks -> batches -> at most two per actor at a time -> outcomes
    actors          batch -> LocalExecutor -> files in the output

Ray places the actors and restarts those that die with their process or node. Their batches go to the next free actor,
so a node that never comes back does not delay the run.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from samekit.arguments import MOST_THREADS, check_whole
from samekit.backends.cpu import available_cpus
from samekit.backends.experimental import RAY, warn_experimental
from samekit.dataset.calls import ALL_LOST, BATCHES_PER_WORKER, Calls, WorkerDiedError, Workers, batches_of
from samekit.dataset.executor import Executor, ModelFacts
from samekit.dataset.worker import Worker
from samekit.errors import BackendError, InputError, SamekitError, last_line
from samekit.files.paths import expanded_text
from samekit.packages import install_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Self

    from samekit.arrays import Array
    from samekit.dataset.pipeline import Job, Outcome, Task

logger = logging.getLogger(__name__)
# The size of the largest Ray clusters.
_MOST_ACTORS: Final = 40_000
# Seconds for a host to accept a connection.
_CONNECT_SECONDS: Final = 10
# Seconds for a cluster to place the first actor, for which it may have to start a machine.
_PLACE_SECONDS: Final = 600
_LAST_PORT: Final = 65_535
# Environment variable that limits how often Ray tries to connect.
_TRIES_VARIABLE: Final = "RAY_gcs_server_port_wait_time_s"
# Calls carry names, outcomes and at most the latents of silence.
_OBJECT_STORE_BYTES: Final = 200 * 2**20


@dataclass(frozen=True)
class RayOptions:
    """Which cluster to use, and the resources of each actor."""

    address: str = ""
    """`HOST:PORT` of a cluster, or `local` to start one for this run. If empty: the address in RAY_ADDRESS, else a
    cluster that runs on this machine, else a new one."""
    actors: int | None = None
    """Number of actors; None starts as many as the cluster has room for now."""
    cpus_per_actor: int = 1
    """Cores of each actor, and threads of its encoder."""
    gpus_per_actor: float = 0
    """GPUs of each actor: a whole number, or a share of one GPU."""

    def __post_init__(self) -> None:
        if self.actors is not None:
            check_whole("actors", self.actors, least=1, most=_MOST_ACTORS)
        check_whole("cpus_per_actor", self.cpus_per_actor, least=1, most=MOST_THREADS)
        known = isinstance(self.gpus_per_actor, (int, float)) and 0 <= self.gpus_per_actor < math.inf
        if not known or (self.gpus_per_actor > 1 and self.gpus_per_actor % 1):
            raise InputError(f"gpus_per_actor is {self.gpus_per_actor!r}; pass a share of one GPU, or a whole number")

    def fitting(self, resources: dict[str, float]) -> int:
        """Return how many actors fit on a machine with these resources."""
        room, gpus, share = resources.get("CPU", 0) // self.cpus_per_actor, resources.get("GPU", 0), self.gpus_per_actor
        if share:
            # An actor cannot have shares of several GPUs. Floor division would be wrong: 1 // 0.1 is 9.
            room = min(room, gpus // share if share >= 1 else gpus * int(1 / share))
        return int(room)


class _Actors(Workers):
    """The actors of a run."""

    def __init__(self, ray: Any, actors: Sequence[Any], facts: ModelFacts, job: Job) -> None:
        self.handles = actors
        self._ray = ray
        self._facts = facts
        self._job = ray.put(job)

    def prepare(self, worker: Any) -> Any:
        return _retry_until_restarted(worker.facts).remote()

    def encode(self, worker: Any, tasks: list[Task]) -> Any:
        return worker.encode.remote(self._facts, self._job, tasks)

    def wait(self, calls: Sequence[Any], count: int, seconds: float | None = None) -> Any:
        return self._ray.wait(calls, num_returns=count, timeout=seconds)[0]

    def result(self, call: Any) -> Any:
        return _result_of(self._ray, call)

    def kill(self, worker: Any) -> None:
        """Kill an actor; Ray restarts it."""
        self._ray.kill(worker, no_restart=False)


class RayExecutor(Executor):
    """Encodes on a cluster. A context manager that starts the actors and ends them.

    Args:
        model: a name, an engine folder or a checkpoint folder, which every node must be able to find.
        ray: which cluster, and how many actors.
        backend: arguments of `AutoencoderModel.from_pretrained` for each actor. Actors without a GPU use the CPU.

    Raises:
        InputError: `backend` needs a GPU, but the actors get none.
    """

    def __init__(self, model: str | os.PathLike[str], ray: RayOptions | None = None, **backend: Any) -> None:
        self._model = expanded_text(model)
        self._options = ray or RayOptions()
        device = backend.get("device")
        if not self._options.gpus_per_actor:
            # Ray does not hide GPUs from actors that request none, so all of them would use the first GPU.
            if str(device).startswith("cuda") or backend.get("backend") == "tensorrt":
                raise InputError("actors get no GPU; pass --gpus-per-actor 1, or a share of one")
            device = "cpu"
        else:
            warn_experimental(RAY)
        self._backend = backend | {"device": device, "threads": backend.get("threads") or self._options.cpus_per_actor}
        self._ray: Any = None
        self._actors: list[Any] = []
        self._connected = False

    def __enter__(self) -> Self:
        """Connect, and wait for the first actor; raises SamekitError if that fails."""
        self._ray = _import_ray()
        try:
            self._connect()
            self._start_actors()
            _, self.facts = next(self._ready_actors(_PLACE_SECONDS))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors.clear()
        if self._connected:
            self._ray.shutdown()
            self._connected = False

    def silence(self, latents: int) -> Array:
        """Return the latents of silence, `[latent_width, latents]`, from the first actor that is ready."""
        for actor, _ in self._ready_actors():
            with suppress(WorkerDiedError):
                array: Array = _result_of(self._ray, _retry_until_restarted(actor.silence).remote(latents))
                return array
        raise BackendError(ALL_LOST)

    def encode(self, job: Job, tasks: Sequence[Task], finished: Callable[[Sequence[Outcome]], None]) -> None:
        actors = _Actors(self._ray, self._actors, self.facts, job)
        Calls(actors, batches_of(tasks, job.options.batch_size)).run(finished)

    def _connect(self) -> None:
        """Join a cluster, or start one."""
        if self._ray.is_initialized():
            return
        address = self._options.address or os.environ.get("RAY_ADDRESS", "")
        # This module logs lost actors itself.
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
        try:
            if address not in ("", "auto", "local"):
                _require_listener(address)
            if address != "local":
                with _one_try():
                    self._ray.init(address=address or "auto", **quiet)
                self._connected = True
                return
        except Exception as error:  # noqa: BLE001 Ray has no error class for this
            if address:
                raise InputError(
                    f"{address}: no Ray cluster answers ({' '.join(str(error).split())}); check HOST:PORT, or leave "
                    "it out and unset RAY_ADDRESS to start one here"
                ) from None
        cores = available_cpus()
        local = {"num_cpus": cores, "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        try:
            self._ray.init(address="local", **local, **quiet)
        except Exception as error:  # noqa: BLE001 Ray has no error class for this
            raise BackendError(
                f"Ray does not start here ({last_line(error)}); see /tmp/ray, or pass a cluster"
            ) from None
        self._connected = True
        resources = self._ray.cluster_resources()
        if self._options.fitting(resources) == 0:
            raise InputError(
                f"an actor of {self._options.cpus_per_actor} cores and {self._options.gpus_per_actor:g} GPUs does not "
                f"fit on this machine ({cores} cores, {resources.get('GPU', 0):g} GPUs); pass less, or a cluster"
            )

    def _start_actors(self) -> None:
        options = self._options
        room = sum(options.fitting(node["Resources"]) for node in self._ray.nodes() if node["Alive"])
        count = options.actors or max(1, room)
        if count > room:
            logger.warning("%d actors fit on the cluster now; %d more wait for room", room, count - room)
        remote = self._ray.remote(
            num_cpus=options.cpus_per_actor,
            num_gpus=options.gpus_per_actor,
            max_restarts=-1,
            max_concurrency=BATCHES_PER_WORKER,
        )(Worker)
        arguments = (self._model, self._backend, options.cpus_per_actor, str(Path.cwd()))
        self._actors = [remote.remote(*arguments) for _ in range(count)]

    def _ready_actors(self, seconds: float | None = None) -> Iterator[tuple[Any, ModelFacts]]:
        """Yield each actor with its facts when its model is open; leave out actors that are lost."""
        waiting = {_retry_until_restarted(actor.facts).remote(): actor for actor in self._actors}
        while waiting:
            done, _ = self._ray.wait(list(waiting), num_returns=1, timeout=seconds)
            if not done:
                raise InputError(
                    f"the cluster has no room for an actor of {self._options.cpus_per_actor} cores and "
                    f"{self._options.gpus_per_actor:g} GPUs; pass less, or add a node"
                )
            actor = waiting.pop(done[0])
            try:
                facts = _result_of(self._ray, done[0])
            except WorkerDiedError as error:
                if not waiting:
                    raise BackendError(f"no actor starts ({error}); install the same samekit on every node") from None
            else:
                yield actor, facts


def _import_ray() -> Any:
    # Disables Ray's usage statistics unless the user has set this variable.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise InputError(f"encoding on a cluster needs Ray ({error}); run: {install_command('ray')}") from None
    return ray


def _require_listener(address: str) -> None:
    """Raise OSError or ValueError if nothing listens at an address. Ray itself would need 41 s to find that out.

    Only Ray can tell whether the listener is a cluster, because a busy cluster answers late.
    """
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdecimal() or int(port) > _LAST_PORT:
        raise ValueError("it names no port")
    # A busy host may not accept the connection in time.
    with suppress(TimeoutError), socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS):
        pass


@contextmanager
def _one_try() -> Iterator[None]:
    """Limit Ray to one attempt to connect, of 41 s, instead of 20. Older versions of Ray ignore the limit."""
    if _TRIES_VARIABLE in os.environ:
        yield
        return
    os.environ[_TRIES_VARIABLE] = "1"
    try:
        yield
    finally:
        del os.environ[_TRIES_VARIABLE]


def _retry_until_restarted(method: Any) -> Any:
    """Return a method of an actor whose calls are repeated when the actor has been restarted."""
    return method.options(max_task_retries=-1)


def _result_of(ray: Any, call: Any) -> Any:
    """Return the result of a call, or raise the SamekitError that it raised, or WorkerDiedError."""
    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SamekitError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise WorkerDiedError(last_line(error)) from error
