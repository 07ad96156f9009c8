"""How a model is served over HTTP: replicas, batches and limits."""

from __future__ import annotations

from dataclasses import dataclass

from samekit.arguments import MOST_INT32, MOST_THREADS, check_whole
from samekit.backends.cpu import available_cpus
from samekit.backends.selection import AUTO
from samekit.errors import InputError


@dataclass(frozen=True)
class ServeOptions:
    """How a model is served. Values that cannot be used raise InputError."""

    model: str
    """A name, an engine folder or a checkpoint folder, which every node must be able to find."""
    backend: str = AUTO
    """As `AutoencoderModel.from_pretrained` takes it."""
    precision: str = "fp32"
    """As `AutoencoderModel.from_pretrained` takes it."""
    replicas: int = 1
    """Processes that each open the model."""
    cpus_per_replica: int | None = None
    """Cores of a replica, and threads of its model; None divides the cores of this machine."""
    gpus_per_replica: float = 0
    """GPUs of a replica: 0 for the CPU, 1, or a share of one GPU."""
    max_batch: int = 8
    """Most windows that share a batch on a GPU. On a CPU, windows run one by one."""
    max_wait_ms: int = 5
    """Most milliseconds that a window on a GPU waits for others of its length."""
    max_queue: int = 64
    """Most requests of a replica that are received, wait or run. Further ones are refused with status 429."""
    max_seconds: int = 600
    """Longest audio of a request in seconds."""
    max_bytes: int = 2**28
    """Longest body of a request in bytes."""

    def __post_init__(self) -> None:
        check_whole("replicas", self.replicas, least=1, most=MOST_THREADS)
        if self.cpus_per_replica is not None:
            check_whole("cpus_per_replica", self.cpus_per_replica, least=1, most=MOST_THREADS)
        gpus = self.gpus_per_replica
        if not isinstance(gpus, (int, float)) or not 0 <= gpus <= 1:
            raise InputError(f"gpus_per_replica is {gpus!r}; pass 0, 1, or a share of one GPU")
        check_whole("max_batch", self.max_batch, least=1, most=MOST_THREADS)
        check_whole("max_wait_ms", self.max_wait_ms, least=0, most=10_000)
        check_whole("max_queue", self.max_queue, least=1, most=100_000)
        check_whole("max_seconds", self.max_seconds, least=1, most=MOST_INT32)
        check_whole("max_bytes", self.max_bytes, least=1)

    @property
    def cpus(self) -> int:
        """Cores of a replica."""
        return self.cpus_per_replica or max(1, available_cpus() // self.replicas)
