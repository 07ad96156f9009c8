"""`AutoencoderModel`: arrays, files and streams to latents and back, with the signatures of the reference's class."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
from typing import TYPE_CHECKING, Any

from samekit.arrays import sample_rates
from samekit.audio import AudioReader, AudioWriter, to_channels
from samekit.backends.base import BackendOptions
from samekit.backends.selection import AUTO, open_backend
from samekit.batches import CHUNK_SIZE, OVERLAP, Autoencoder
from samekit.errors import InputError, LatentsFileError
from samekit.files.latents import MODEL_DIGEST, LatentsReader, LatentsWriter, require_replaceable
from samekit.files.overwriting import require_no_recording, require_other_file
from samekit.files.paths import expanded, expanded_text

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from samekit.backends.base import Backend
    from samekit.engine.spec import EngineSpec
    from samekit.streaming import StreamDecoder, StreamEncoder

logger = logging.getLogger(__name__)


def _placed(device: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Options with a device, which may number the GPU as PyTorch does.

    Raises:
        InputError: `device_id` says another number.
    """
    if device is None:
        return options
    kind, _, number = str(device).partition(":")
    if kind not in ("cpu", "cuda") or not re.fullmatch(r"\d{1,9}", number, re.ASCII):
        return options | {"device": str(device)}
    given = options.get("device_id", int(number))
    if kind == "cuda" and (type(given) is not int or given != int(number)):
        raise InputError(f"device {device} and device_id {options['device_id']} differ; pass one of them")
    return options | {"device": kind} | ({"device_id": int(number)} if kind == "cuda" else {})


# What `from_pretrained` takes besides fields of BackendOptions.
_OPENING = ("backend", "window")


@functools.cache
def _tell_of_random_weights(name: str) -> None:
    """Warn of a model, once a process."""
    logger.warning("%s has random weights: good for tests and speed only", name)


class AutoencoderModel:
    """A SAME autoencoder; takes the place of `stable_audio_3.AutoencoderModel`.

    NumPy in, NumPy out; PyTorch in, PyTorch out. Decoding adds none of the reference's random noise.
    """

    def __init__(self, backend: Backend, window: int | None = None) -> None:
        self.autoencoder = Autoencoder(backend, window)
        """Whole batches of prepared audio, as the reference's attribute of this name."""

    @classmethod
    def from_pretrained(
        cls,
        model_name: str | os.PathLike[str],
        device: Any = None,
        *,
        backend: str = AUTO,
        precision: str = "fp32",
        window: int | None = None,
        **options: Any,
    ) -> Self:
        """Open a model.

        Args:
            model_name: a name (`same-s`, `same-l`, `same-tiny`), looked up in `./engines` and in the user's cache; an
                engine folder; or a checkpoint folder, which runs in PyTorch.
            device: `cpu`, `cuda` or `cuda:N`, or a `torch.device` of these; the best there is unless given.
            backend: `auto`, `tensorrt`, `onnxruntime` or `torch`.
            precision: `fp32`, `fp16` (the reference's `.half()`) or `int8`.
            window: latents that are computed at once; bounds the memory, does not change the numbers, but for those of
                `int8`, whose ranges are measured in each window.
            options: further fields of `samekit.backends.base.BackendOptions`, such as `threads`.

        Raises:
            InputError: an unknown option or value.
            EngineNotFoundError: no engine of that name and no way around it.
            EngineError: the engine folder is damaged.
            BackendUnavailableError: the backend cannot be used here.
            CheckpointError: the checkpoint cannot be loaded.
        """
        known = [field.name for field in dataclasses.fields(BackendOptions)]
        for option in options:
            if option not in known:
                raise InputError(f"unknown option {option!r}; choose of {', '.join((*_OPENING, *known))}")
        opening = BackendOptions(precision, **_placed(device, options))
        model = cls(open_backend(expanded_text(model_name), backend, opening), window)
        if model.spec.is_random:
            _tell_of_random_weights(model.spec.name)
        return model

    @property
    def spec(self) -> EngineSpec:
        """Every fact about the model."""
        return self.autoencoder.spec

    @property
    def sample_rate(self) -> int:
        """Of the audio that the model takes and gives, in Hz."""
        return self.spec.sample_rate

    @property
    def downsampling_ratio(self) -> int:
        """Samples per latent."""
        return self.spec.hop

    @property
    def latent_dim(self) -> int:
        """Features of a latent."""
        return self.spec.latent_width

    @property
    def device(self) -> str:
        """Where the model computes, and where returned tensors lie: `cpu`, `cuda` (the first GPU) or `cuda:N`."""
        return self.autoencoder.backend.torch_device.removesuffix(":0")

    def encode(
        self,
        audio: Any,
        sr: Any,
        chunked: bool = False,
        chunk_size: int = CHUNK_SIZE,
        overlap: int = OVERLAP,
    ) -> Any:
        """Encode audio of any rate and length to latents.

        Args:
            audio: `[channels, samples]`, `[samples]`, `[batch, channels, samples]`, or a list of clips; floating point
                in -1 ... 1, NumPy or PyTorch. Mono is doubled, channels past the model's are dropped.
            sr: its sample rate in Hz; for a batch or list, one for all or one each: numbers, a list, NumPy or PyTorch.
            chunked: give the reference's chunked numbers; otherwise those of one pass over everything, which are
                computed in windows as well, so that memory stays flat either way.
            chunk_size: latents in a chunk; only with `chunked`.
            overlap: latents that neighbouring chunks share; only with `chunked`.

        Returns:
            Float32 latents `[batch, latent_dim, latents]`, `ceil(samples / downsampling_ratio)` of them for the longest
            clip (at the model's rate).

        Raises:
            InputError: wrong rank or dtype, NaN or infinity, rates that do not match, unusable chunks.
            NonFiniteError: the model overflowed.
            BackendError: the backend failed.
        """
        inner = self.autoencoder
        several = isinstance(audio, (list, tuple)) or getattr(audio, "ndim", 0) == 3
        clips = list(audio) if several else [audio]
        rates = sample_rates(sr, len(clips))
        is_ready = inner.on_device(audio) and audio.shape[1] == self.spec.channels
        if is_ready and all(rate == self.sample_rate for rate in rates):
            return inner.encode_audio(audio, chunked, chunk_size, overlap)
        ready = inner.preprocess_audio_list_for_encoder(clips, rates)
        return inner.encode_audio(ready, chunked, chunk_size, overlap)

    def decode(self, latents: Any, chunked: bool = False, chunk_size: int = CHUNK_SIZE, overlap: int = OVERLAP) -> Any:
        """Decode latents to audio.

        Args:
            latents: `[batch, latent_dim, latents]`, NumPy or PyTorch.
            chunked: give the reference's chunked numbers; otherwise those of one pass over everything.
            chunk_size: latents in a chunk; only with `chunked`.
            overlap: latents that neighbouring chunks share; only with `chunked`.

        Returns:
            Float32 audio `[batch, channels, latents * downsampling_ratio]`; not clipped.

        Raises:
            InputError: wrong shape or dtype, NaN or infinity, unusable chunks.
            NonFiniteError: the model overflowed.
            BackendError: the backend failed.
        """
        return self.autoencoder.decode_audio(latents, chunked, chunk_size, overlap)

    def stream_encoder(self, sr: Any) -> StreamEncoder:
        """An encoder of one stream at `sr` Hz: `push(samples)` as they arrive, then `finish()`.

        Raises:
            InputError: the rate is out of range.
        """
        return self.autoencoder.stream_encoder(sr)

    def stream_decoder(self) -> StreamDecoder:
        """A decoder of one stream: `push(latents)` as they arrive, then `finish()`."""
        return self.autoencoder.stream_decoder()

    def encode_file(
        self,
        audio_path: str | os.PathLike[str],
        latents_path: str | os.PathLike[str],
        progress: Callable[[int], object] | None = None,
    ) -> dict[str, Any]:
        """Encode an audio file to `.npy` latents `[latent_dim, latents]` and a `.json` beside them.

        Memory does not grow with the file, and the latents file appears whole or not at all.

        Args:
            audio_path: whatever soundfile reads.
            latents_path: ends in `.npy`.
            progress: called with the number of frames read since the last call.

        Returns:
            What the `.json` holds.

        Raises:
            AudioFileError: the file is no readable audio.
            InputError: its rate or channels cannot be converted, or `latents_path` has another suffix.
            OutputError: the latents cannot be written, or the audio file or the `.json` of something else would be
                replaced.
            NonFiniteError: the model overflowed.
            BackendError: the backend failed.
        """
        audio_path, latents_path = expanded(audio_path), expanded(latents_path)
        with AudioReader(audio_path) as reader:
            encoder = self.stream_encoder(reader.info.sample_rate)
            require_other_file(latents_path, audio_path)
            require_replaceable(latents_path)
            with LatentsWriter(latents_path, self.latent_dim, follow_links=True) as writer:
                for block in reader:
                    # Before the stream sees it: a file's last block may be shorter than its channels are many.
                    writer.write(encoder.push(to_channels(block, self.spec.channels)))
                    if progress:
                        progress(block.shape[-1])
                writer.write(encoder.finish())
                writer.metadata = {
                    "model": self.spec.name,
                    MODEL_DIGEST: self.spec.source_sha256,
                    "precision": self.autoencoder.backend.precision,
                    "source": os.path.abspath(audio_path),  # noqa: PTH100 links are not resolved
                    "sample_rate": self.sample_rate,
                    "samples": encoder.samples,
                    "latents": self.spec.latents(encoder.samples),
                }
        return writer.metadata

    def decode_file(
        self,
        latents_path: str | os.PathLike[str],
        audio_path: str | os.PathLike[str],
        subtype: str = "PCM_16",
        clip: bool = False,
        progress: Callable[[int], object] | None = None,
        force: bool = False,
    ) -> int:
        """Decode a `.npy` latents file to a `.wav` or `.flac` file.

        Memory does not grow with the file, and the audio file appears whole or not at all.

        Args:
            latents_path: `[latent_dim, latents]`; the `.json` beside it, if there, gives the exact length.
            audio_path: ends in `.wav` or `.flac`.
            subtype: `PCM_16`, `PCM_24`, `PCM_32` or `FLOAT`.
            clip: clip floating-point samples to -1 ... 1; integers always are.
            progress: called with the number of latents decoded since the last call.
            force: replace `audio_path` even if it is, or may be, the recording that the latents were made of.

        Returns:
            Samples written.

        Raises:
            LatentsFileError: the file holds no latents of this model.
            InputError: `audio_path` has another suffix, or its format does not hold the subtype.
            OutputError: the audio cannot be written, or would replace such a recording.
            NonFiniteError: the model overflowed.
            BackendError: the backend failed.
        """
        latents_path, audio_path = expanded(latents_path), expanded(audio_path)
        reader = LatentsReader(latents_path, self.latent_dim)
        metadata = reader.metadata
        made_by = metadata.get(MODEL_DIGEST, self.spec.source_sha256)
        if made_by != self.spec.source_sha256:
            raise LatentsFileError(
                f"{latents_path}: latents of another model ({metadata.get('model')}), not of this {self.spec.name}; "
                "decode with the model that made them, or remove the .json if you know better"
            )
        length = self._exact_length(metadata, reader.latents, latents_path)
        require_other_file(audio_path, latents_path)
        if not force:
            require_no_recording(audio_path, latents_path, metadata)
        decoder = self.stream_decoder()
        rate, channels, step = self.sample_rate, self.spec.channels, decoder.latency
        with AudioWriter(audio_path, rate, channels, subtype, frames=length, clip=clip) as writer:
            for block in reader.blocks(step):
                writer.write(decoder.push(block))
                if progress:
                    progress(block.shape[-1])
            # The padding of the last latent comes out here, and goes.
            writer.write(decoder.finish()[:, : length - writer.frames])
        return length

    def _exact_length(self, metadata: dict[str, Any], latents: int, path: str | os.PathLike[str]) -> int:
        """Samples of the original audio if the metadata know them, else whole latents."""
        samples = metadata.get("samples", self.spec.samples(latents))
        if type(samples) is not int or self.spec.latents(samples) != latents:
            raise LatentsFileError(
                f"{path}: holds {latents} latents, but the .json beside it says {samples!r} samples; encode again"
            )
        return samples

    def close(self) -> None:
        """Free what the backend holds."""
        self.autoencoder.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
