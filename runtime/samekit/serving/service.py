"""Do the work of a replica: one model, a few threads that encode and decode files, and a limited number of requests."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from samekit.audio import AudioReader
from samekit.engine.spec import DIRECTIONS
from samekit.errors import InputError, SamekitError
from samekit.files.latents import MODEL_DIGEST
from samekit.files.pairs import npy_header
from samekit.model import AutoencoderModel, open_to_decode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future
    from pathlib import Path

    from samekit.serving.options import ServeOptions


class RefusedError(SamekitError):
    """A request is refused with an HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        """The HTTP status."""


class StoppedError(Exception):
    """The client of a request has gone, so its work was stopped."""


class EncodedAudio(NamedTuple):
    """The answer to a request that encodes."""

    npy: bytes
    metadata: dict[str, Any]


class Service:
    """Encodes and decodes files for the requests of one replica."""

    def __init__(self, options: ServeOptions) -> None:
        self.options = options
        self.model = AutoencoderModel.from_pretrained(
            options.model,
            "cuda" if options.gpus_per_replica else "cpu",
            backend=options.backend,
            precision=options.precision,
            threads=options.cpus,
        )
        backend = self.model.autoencoder.backend
        for direction in DIRECTIONS:
            # Equal requests get equal answers, bit for bit.
            backend.use_packed_weights(direction)
        # On a CPU, one thread reads a file while another one computes.
        workers = 2 if backend.device == "cpu" else 2 * options.max_batch
        self._pool = ThreadPoolExecutor(workers)
        self.active = 0
        """Requests that are received, wait or run."""

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

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request while it is in work; raise RefusedError if there are too many."""
        if self.active >= self.options.max_queue:
            raise RefusedError(429, f"{self.active} requests are in work; try again later")
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    def encode(self, path: Path, stop: threading.Event) -> Future[EncodedAudio]:
        """Encode an audio file; `stop` ends the work early."""
        return self._pool.submit(self._encode, path, stop)

    def decode(
        self, path: Path, audio: Path, subtype: str, peak: str | None, samples: int | None, stop: threading.Event
    ) -> Future[None]:
        """Decode a `.npy` file to an audio file; `samples` is the exact length."""
        return self._pool.submit(self._decode, path, audio, subtype, peak, samples, stop)

    def _encode(self, path: Path, stop: threading.Event) -> EncodedAudio:
        stopping = self._stopping(stop)
        with AudioReader(path) as reader:
            rate = reader.info.sample_rate
            self._check_seconds((reader.info.frames or 0) / rate)
            encoder = self.model.stream_encoder(rate)
            blocks, frames = [], 0
            for block in reader.views():
                stopping(0)
                frames += block.shape[-1]
                self._check_seconds(frames / rate)
                blocks.append(encoder.push_checked(block))
            blocks.append(encoder.finish())
            latents = np.concatenate(blocks, axis=-1)
            facts = self.facts()
            metadata = {key: facts[key] for key in ("model", MODEL_DIGEST, "precision", "sample_rate")} | {
                "decoder": reader.info.decoder,
                "samples": encoder.samples,
                "latents": latents.shape[-1],
            }
        return EncodedAudio(npy_header(latents.dtype, latents.shape) + latents.tobytes(), metadata)

    def _decode(
        self, path: Path, audio: Path, subtype: str, peak: str | None, samples: int | None, stop: threading.Event
    ) -> None:
        if samples is not None:
            path.with_suffix(".json").write_text(json.dumps({"samples": samples}))
        reader = open_to_decode(path, audio, subtype, peak)
        self._check_seconds(self.model.spec.samples(reader.latents) / self.model.sample_rate)
        if samples is not None and self.model.spec.latents(samples) != reader.latents:
            raise InputError(f"{reader.latents} latents do not stand for {samples} samples; leave out samples")
        self.model.decode_reader(reader, path, audio, subtype, peak, self._stopping(stop))

    def _stopping(self, stop: threading.Event) -> Callable[[int], None]:
        """Return a function that ends the work of a request whose client has gone."""

        def check(_done: int) -> None:
            if stop.is_set():
                raise StoppedError

        return check

    def _check_seconds(self, seconds: float) -> None:
        if seconds > self.options.max_seconds:
            raise RefusedError(413, f"the audio is longer than {self.options.max_seconds} s; send it in parts")
