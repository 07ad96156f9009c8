"""Do the work of a replica: one model, a few threads that encode and decode files, and a limited number of requests."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from samekit.audio import AudioReader
from samekit.backends.shared import SharedBackend
from samekit.engine.spec import DIRECTIONS
from samekit.errors import InputError, SamekitError
from samekit.files.latents import MODEL_DIGEST
from samekit.files.pairs import npy_header
from samekit.model import AutoencoderModel, open_to_decode
from samekit.serving.limits import BODY_RATE, BODY_SECONDS, RefusedError, disk_error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from concurrent.futures import Future
    from typing import Self

    from samekit.engine.spec import Direction
    from samekit.serving.options import ServeOptions

T = TypeVar("T")


class StoppedError(Exception):
    """The client of a request has gone, so its work was stopped."""


@dataclass(frozen=True)
class EncodedAudio:
    """The answer to a request that encodes."""

    npy: bytes
    metadata: dict[str, Any]


class DecodedAudio(NamedTuple):
    """How to write the answer to a request that decodes."""

    format: str
    """`wav` or `flac`."""
    subtype: str
    """As `AutoencoderModel.decode_file` takes it."""
    peak: str | None
    """As `AutoencoderModel.decode_file` takes it."""
    samples: int | None
    """The exact length; None for whole latents."""


def open_model(options: ServeOptions) -> AutoencoderModel:
    """Open the model of a replica; raises what `AutoencoderModel.from_pretrained` raises."""
    return AutoencoderModel.from_pretrained(
        options.model,
        "cuda" if options.gpus_per_replica else "cpu",
        backend=options.backend,
        precision=options.precision,
        threads=options.cpus,
    )


class Service:
    """Encodes and decodes files for the requests of one replica.

    Args:
        options: which model, and the limits.
        folder: an existing folder for the files of requests.
        ran: called with the direction and the size of each batch.
    """

    def __init__(
        self, options: ServeOptions, folder: str | os.PathLike[str], ran: Callable[[Direction, int], object]
    ) -> None:
        self.options = options
        self.folder = Path(folder)
        self._remove_abandoned()
        backend = open_model(options).autoencoder.backend
        for direction in DIRECTIONS:
            # Equal requests get equal answers, bit for bit.
            backend.use_packed_weights(direction)
        on_cpu = backend.device == "cpu"
        batch = 1 if on_cpu else options.max_batch
        self.model = AutoencoderModel(SharedBackend(backend, batch, options.max_wait_ms / 1000, ran))
        # On a CPU, one thread reads a file while another one computes.
        self.pool = ThreadPoolExecutor(2 if on_cpu else 2 * options.max_batch)
        self.in_work = 0
        """Requests that are received, wait or run."""

    def close(self) -> None:
        """Wait for the requests in work, and close the model."""
        self.pool.shutdown()
        self.model.close()

    def facts(self) -> dict[str, Any]:
        """Return what a client needs to know about the model and the limits."""
        model, options = self.model, self.options
        return {
            "model": model.spec.name,
            MODEL_DIGEST: model.spec.source_sha256,
            "precision": model.autoencoder.backend.precision,
            "backend": model.autoencoder.backend.name,
            "device": model.device,
            "sample_rate": model.sample_rate,
            "channels": model.spec.channels,
            "samples_per_latent": model.downsampling_ratio,
            "latent_width": model.latent_dim,
            "random_weights": model.spec.is_random,
            "max_seconds": options.max_seconds,
            "max_bytes": options.max_bytes,
        }

    def encode(self, path: Path, stop: threading.Event) -> EncodedAudio:
        """Encode an audio file, as `AutoencoderModel.encode_file` does.

        Raises:
            StoppedError: `stop` was set.
            RefusedError: the audio is too long.
            SamekitError: as `AutoencoderModel.encode_file`.
        """
        with AudioReader(path) as reader:
            rate = reader.info.sample_rate
            self._check_seconds((reader.info.frames or 0) / rate)
            encoder = self.model.stream_encoder(rate)
            blocks, frames = [], 0
            for block in reader.views():
                _check_going(stop)
                frames += block.shape[-1]
                self._check_seconds(frames / rate)
                blocks.append(encoder.push_checked(block))
            blocks.append(encoder.finish())
            latents = np.concatenate(blocks, axis=-1)
            facts = self.facts()
            metadata = {name: facts[name] for name in ("model", MODEL_DIGEST, "precision", "sample_rate")} | {
                "decoder": reader.info.decoder,
                "samples": encoder.samples,
                "latents": latents.shape[-1],
            }
        return EncodedAudio(npy_header(latents.dtype, latents.shape) + latents.tobytes(), metadata)

    def decode(self, path: Path, stop: threading.Event, wanted: DecodedAudio) -> tuple[Path, int]:
        """Decode a `.npy` file; return the audio file beside it, and its samples a channel.

        Raises:
            StoppedError, RefusedError: as `encode`.
            SamekitError: as `AutoencoderModel.decode_file`.
        """
        spec, audio = self.model.spec, path.with_name(f"answer.{wanted.format}")
        reader = open_to_decode(path, audio, wanted.subtype, wanted.peak)
        self._check_seconds(spec.samples(reader.latents) / spec.sample_rate)
        if wanted.samples is not None:
            if spec.latents(wanted.samples) != reader.latents:
                cause = f"{reader.latents} latents do not stand for {wanted.samples} samples"
                raise InputError(f"{cause}; leave out samples")
            reader.metadata["samples"] = wanted.samples
        peak, check = wanted.peak, lambda _done: _check_going(stop)
        return audio, self.model.decode_reader(reader, path, audio, wanted.subtype, peak, check)

    def _check_seconds(self, seconds: float) -> None:
        if seconds > self.options.max_seconds:
            raise RefusedError(413, f"the audio is longer than {self.options.max_seconds} s; send it in parts")

    def _remove_abandoned(self) -> None:
        """Remove the files of replicas that were killed."""
        for folder in self.folder.iterdir():
            process = folder.name.partition("-")[0]
            try:
                os.kill(int(process), 0)
            except ValueError:
                continue
            except OSError:
                shutil.rmtree(folder, ignore_errors=True)


class Request:
    """A request in work, with a folder for its files; an asynchronous context manager.

    Raises:
        RefusedError: too many requests are in work.
    """

    def __init__(self, service: Service) -> None:
        options = service.options
        if service.in_work >= options.max_queue:
            raise RefusedError(429, f"{service.in_work} requests are in work; try again later")
        self._service = service
        self._stop = threading.Event()
        self._job: Future[Any] | None = None

    async def __aenter__(self) -> Self:
        try:
            self._folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=self._service.folder))
        except OSError as error:
            raise disk_error(error) from error
        self._service.in_work += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        if self._job is None or self._job.done():
            self._end()
        else:
            # The client has gone, and a thread still uses the files.
            loop = asyncio.get_running_loop()
            self._job.add_done_callback(lambda _: loop.call_soon_threadsafe(self._end))

    def _end(self) -> None:
        self._service.in_work -= 1
        shutil.rmtree(self._folder, ignore_errors=True)

    async def receive(self, body: AsyncIterator[bytes], announced: int, name: str) -> Path:
        """Write a body to a file of this name.

        Raises:
            RefusedError: the body is empty, too long, or arrives too slowly; or the disk is full.
        """
        most, path, size = self._service.options.max_bytes, self._folder / name, 0
        too_long = RefusedError(413, f"the body is longer than {most} bytes; send less at once, or compressed audio")
        if announced > most:
            raise too_long
        begin = asyncio.get_running_loop().time() + BODY_SECONDS
        try:
            with path.open("wb") as file:
                async with asyncio.timeout_at(begin) as limit:
                    async for chunk in body:
                        size += len(chunk)
                        if size > most:
                            raise too_long
                        file.write(chunk)
                        limit.reschedule(begin + size / BODY_RATE)
        except TimeoutError:
            raise RefusedError(408, f"the body arrives too slowly ({size} bytes so far); send it faster") from None
        except OSError as error:
            raise disk_error(error) from error
        if not size:
            raise RefusedError(400, "the body is empty; send the file itself as the body")
        return path

    async def run(self, function: Callable[..., T], path: Path, *arguments: Any) -> T:
        """Call a method of the service in one of its threads.

        Raises:
            SamekitError: as the method, without the folder in its message.
        """
        self._job = self._service.pool.submit(function, path, self._stop, *arguments)
        try:
            return await asyncio.wrap_future(self._job)
        except SamekitError as error:
            error.args = tuple(str(each).replace(f"{self._folder}{os.sep}", "") for each in error.args)
            raise


def _check_going(stop: threading.Event) -> None:
    if stop.is_set():
        raise StoppedError
