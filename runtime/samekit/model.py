"""`AutoencoderModel`: arrays, files and streams to latents and back, with the signatures of the reference's class."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
from typing import TYPE_CHECKING, Any

from samekit.arrays import sample_rates, without_gradient
from samekit.audio import AudioReader, AudioWriter, checked_policy, format_of, write_blocks
from samekit.backends.base import BackendOptions
from samekit.backends.selection import AUTO, open_backend
from samekit.batches import CHUNK_SIZE, OVERLAP, Autoencoder
from samekit.engine.hub import with_revision
from samekit.engine.spec import DECODER, ENCODER
from samekit.errors import InputError, LatentsFileError
from samekit.files.latents import MODEL_DIGEST, LatentsReader, LatentsWriter, require_replaceable
from samekit.files.overwriting import require_no_recording, require_other_file
from samekit.files.paths import expanded
from samekit.streaming import StreamDecoder, StreamEncoder
from samekit.vae import Vae

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Self

    from samekit.arrays import Array
    from samekit.backends.base import Backend

logger = logging.getLogger(__name__)


def _device_options(device: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return `options` with a device added; `cuda:N`, as PyTorch names a GPU, sets `device_id` too."""
    if device is None:
        return options
    match = re.fullmatch(r"(cpu|cuda):(\d{1,9})", str(device), re.ASCII)
    if not match:
        return options | {"device": str(device)}
    kind, number = match[1], int(match[2])
    if kind == "cpu":
        return options | {"device": kind}
    given = options.get("device_id", number)
    if type(given) is not int or given != number:
        raise InputError(f"device {device} and device_id {given} differ; pass one of them")
    return options | {"device": kind, "device_id": number}


@functools.cache
def _warn_of_random_weights(name: str) -> None:
    """Log a warning, once per process and model."""
    logger.warning("%s has random weights: good for tests and speed only", name)


class AutoencoderModel:
    """A SAME autoencoder that takes the place of `stable_audio_3.AutoencoderModel`.

    NumPy in, NumPy out; PyTorch in, PyTorch out. Unlike the reference, decoding adds no random noise.
    """

    def __init__(self, backend: Backend, window: int | None = None) -> None:
        self.autoencoder = Autoencoder(backend, window)
        """Prepares audio and runs batches, as the reference's attribute of this name."""
        self.spec = backend.spec
        """Every fact about the model."""
        self.sample_rate = backend.spec.sample_rate
        """Sample rate of the model's audio in Hz."""
        self.downsampling_ratio = backend.spec.hop
        """Samples per latent."""
        self.latent_dim = backend.spec.latent_width
        """Features of a latent."""

    @classmethod
    def from_pretrained(
        cls,
        model_name: str | os.PathLike[str],
        device: Any = None,
        *,
        backend: str = AUTO,
        precision: str = "fp32",
        window: int | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> Self:
        """Open a model.

        Args:
            model_name: a name (`same-s`, `same-l`, `same-tiny`, or a full model such as `medium-base`), looked up in
                `./engines` and in the user's cache; an engine folder; a repository `owner/name` on the hub, from which
                the graphs of the directions and the precision that are used are fetched; or a checkpoint folder, which
                runs in PyTorch. A local folder is preferred to a repository.
            device: `cpu`, `cuda` or `cuda:N`, or a `torch.device` of these; by default the best that is available.
                `webgpu` is any GPU with Vulkan, Metal or Direct3D 12. `intel-gpu` and `npu` are for OpenVINO.
            backend: `auto`, `tensorrt`, `onnxruntime`, `openvino` or `torch`.
            precision: `fp32`, `fp16` (the reference's `.half()`), `int8`, or `bf16` for OpenVINO.
            window: latents that are computed at once, which bounds the memory. It changes the numbers of `int8` only,
                whose activation ranges are computed in each window.
            revision: branch, tag or commit of a repository on the hub, which `owner/name@REVISION` gives too.
            options: further fields of `samekit.backends.base.BackendOptions`, such as `threads`.

        Raises:
            InputError: an unknown option or value.
            EngineNotFoundError: there is no engine of that name, and no checkpoint that can run instead.
            EngineError, CheckpointError: the engine folder is damaged, or the checkpoint cannot be loaded.
            HubError: the repository on the hub cannot be reached, or refuses.
            BackendUnavailableError: the backend cannot be used here.
        """
        known = [field.name for field in dataclasses.fields(BackendOptions)]
        for option in options:
            if option not in known:
                raise InputError(
                    f"unknown option {option!r}; choose one of {', '.join(('backend', 'window', 'revision', *known))}"
                )
        opening = BackendOptions(precision, **_device_options(device, options))
        model = cls(open_backend(with_revision(model_name, revision), backend, opening), window)
        if model.spec.is_random:
            _warn_of_random_weights(model.spec.name)
        return model

    @property
    def device(self) -> str:
        """Where the model computes, and where returned tensors lie: `cpu`, `cuda` (the first GPU) or `cuda:N`."""
        return self.autoencoder.backend.torch_device.removesuffix(":0")

    def encode(
        self, audio: Any, sr: Any, chunked: bool = False, chunk_size: int = CHUNK_SIZE, overlap: int = OVERLAP
    ) -> Any:
        """Encode audio of any rate and length to latents.

        Args:
            audio: `[channels, samples]`, `[samples]`, `[batch, channels, samples]`, or a list of clips; floating point
                in -1 ... 1, NumPy or PyTorch. Mono is doubled; channels that the model lacks are dropped.
            sr: its sample rate in Hz; for a batch or list, one for all or one each: numbers, a list, NumPy or PyTorch.
            chunked: compute the chunks of the reference's `chunked=True`. Otherwise the result equals that of one pass
                over everything, but is computed in windows, which bounds the memory of the backend.
            chunk_size: latents in a chunk; only with `chunked`.
            overlap: latents that neighbouring chunks share; only with `chunked`.

        Returns:
            Latents `[batch, latent_dim, latents]`, `ceil(samples / downsampling_ratio)` of them for the longest clip
            (at the model's rate). They are float32, or float16 after `autoencoder.half()`.

        Raises:
            InputError: wrong rank or dtype, NaN or infinity, rates that do not match, unusable chunks.
            NonFiniteError: the model overflowed.
            BackendError: the backend failed.
        """
        inner = self.autoencoder
        several = isinstance(audio, (list, tuple)) or getattr(audio, "ndim", 0) == 3
        clips = list(audio) if several else [audio]
        rates = sample_rates(sr, len(clips))
        is_ready = inner.stays_on_device(audio) and audio.shape[1] == inner.io_channels
        if not is_ready or any(rate != inner.sample_rate for rate in rates):
            audio = inner.preprocess_audio_list_for_encoder(clips, rates)
        return inner.encode_audio(without_gradient(audio), chunked, chunk_size=chunk_size, overlap=overlap)

    def decode(self, latents: Any, chunked: bool = False, chunk_size: int = CHUNK_SIZE, overlap: int = OVERLAP) -> Any:
        """Decode latents `[batch, latent_dim, latents]`, NumPy or PyTorch, to audio.

        `chunked`, `chunk_size` and `overlap` are those of `encode`.

        Returns:
            Audio `[batch, channels, latents * downsampling_ratio]`, of the dtype that `encode` returns; not clipped.

        Raises:
            InputError, NonFiniteError, BackendError: as `encode`.
        """
        return self.autoencoder.decode_audio(without_gradient(latents), chunked, chunk_size=chunk_size, overlap=overlap)

    def as_vae(self) -> Vae:
        """Return an object that takes the place of `pipe.vae` in the Stable Audio 3 pipelines of diffusers.

        It shares this model's engine.
        """
        vae = Vae(self.autoencoder.backend, self.autoencoder.window)
        vae.returns_half = self.autoencoder.returns_half
        return vae

    def stream_encoder(self, sr: Any) -> StreamEncoder:
        """Return an encoder of one stream at `sr` Hz: `push(samples)` as they arrive, then `finish()`.

        Raises:
            InputError: the rate is out of range.
        """
        (rate,) = sample_rates(sr, 1)
        return StreamEncoder(self.autoencoder.backend, self.autoencoder.windows(ENCODER), rate)

    def stream_decoder(self) -> StreamDecoder:
        """Return a decoder of one stream: `push(latents)` as they arrive, then `finish()`."""
        return StreamDecoder(self.autoencoder.backend, self.autoencoder.windows(DECODER))

    def encode_file(
        self,
        audio_path: str | os.PathLike[str],
        latents_path: str | os.PathLike[str],
        progress: Callable[[int], object] | None = None,
    ) -> dict[str, Any]:
        """Encode an audio file to `.npy` latents `[latent_dim, latents]` and a `.json` beside them.

        Memory does not grow with the length of the file. The outputs are written atomically.

        Args:
            audio_path: any file that soundfile reads, or FFmpeg if PyAV is installed.
            latents_path: ends in `.npy`.
            progress: called with the number of frames read since the last call.

        Returns:
            The contents of the `.json`.

        Raises:
            AudioFileError: the file is no readable audio.
            InputError: its rate or channels cannot be converted, or `latents_path` has another suffix.
            OutputError: the latents cannot be written, or would replace the audio file or a `.json` of something else.
            NonFiniteError, BackendError: as `encode`.
        """
        audio_path, latents_path = expanded(audio_path), expanded(latents_path)
        with open_to_encode(audio_path, latents_path) as reader:
            return self.encode_reader(reader, latents_path, progress)

    def encode_reader(
        self, reader: AudioReader, latents_path: Path, progress: Callable[[int], object] | None = None
    ) -> dict[str, Any]:
        """Do the work of `encode_file` with a file that `open_to_encode` has opened."""
        encoder = StreamEncoder(self.autoencoder.backend, self.autoencoder.windows(ENCODER), reader.info.sample_rate)
        with LatentsWriter(latents_path, self.latent_dim, follow_links=True) as writer:
            for block in reader.views():
                writer.write(encoder.push_checked(block))
                if progress:
                    progress(block.shape[-1])
            writer.write(encoder.finish())
            writer.metadata = {
                "model": self.spec.name,
                MODEL_DIGEST: self.spec.source_sha256,
                "precision": self.autoencoder.backend.precision,
                "source": os.path.abspath(reader.path),
                "decoder": reader.info.decoder,
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
        peak: str | None = None,
        progress: Callable[[int], object] | None = None,
        force: bool = False,
    ) -> int:
        """Decode a `.npy` latents file to a `.wav` or `.flac` file.

        Memory does not grow with the length of the file. The output is written atomically.

        Args:
            latents_path: `[latent_dim, latents]`; the `.json` beside it, if there is one, gives the exact length.
            audio_path: ends in `.wav` or `.flac`.
            subtype: `PCM_16`, `PCM_24`, `PCM_32` or `FLOAT`.
            peak: what happens if samples exceed full scale. `attenuate`, the default for integers, scales the whole
                file, so that its peak is full scale, and logs a warning. It needs room for the samples as floats in the
                folder of the output. `limit` applies `samekit.audio.Limiter`, `clip` clips to -1 ... 1. `raw`, the
                default for `FLOAT`, changes nothing.
            progress: called with the number of latents decoded since the last call.
            force: replace `audio_path` even if it is, or may be, the recording from which the latents were made.

        Returns:
            Samples written.

        Raises:
            LatentsFileError: the file holds no latents of this model.
            InputError: `audio_path` has another suffix, its format does not hold the subtype, or `peak` does not
                fit it.
            OutputError: the audio cannot be written, or would replace such a recording.
            NonFiniteError, BackendError: as `encode`.
        """
        latents_path, audio_path = expanded(latents_path), expanded(audio_path)
        reader = open_to_decode(latents_path, audio_path, subtype, peak, force=force)
        return self.decode_reader(reader, latents_path, audio_path, subtype, peak, progress)

    def decode_reader(
        self,
        reader: LatentsReader,
        latents_path: Path,
        audio_path: Path,
        subtype: str = "PCM_16",
        peak: str | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> int:
        """Do the work of `decode_file` with a file that `open_to_decode` has opened."""
        length = self._exact_length(reader, latents_path)

        def decoded() -> Iterator[Array]:
            """Yield blocks of `length` samples altogether."""
            decoder, left = self.stream_decoder(), length
            for block in reader.blocks(decoder.latency):
                audio = decoder.push(block)
                left -= audio.shape[-1]
                yield audio
                if progress:
                    progress(block.shape[-1])
            # The last latent may stand for padding, which is cut off here.
            yield decoder.finish()[:, :left]

        with AudioWriter(audio_path, self.sample_rate, self.spec.channels, subtype, frames=length) as writer:
            write_blocks(writer, decoded(), checked_policy(peak, subtype))
        return length

    def _exact_length(self, reader: LatentsReader, path: Path) -> int:
        """Return the samples that latents stand for, after checking that this model made them."""
        if reader.width != self.latent_dim:
            raise LatentsFileError(
                f"{path}: its latents are {reader.width} wide, the model's {self.latent_dim}; "
                "use the model that made them"
            )
        metadata = reader.metadata
        if metadata.get(MODEL_DIGEST, self.spec.source_sha256) != self.spec.source_sha256:
            raise LatentsFileError(
                f"{path}: latents of another model ({metadata.get('model')}), not of this {self.spec.name}; "
                "decode with the model that made them, or remove the .json if you know better"
            )
        samples = metadata.get("samples", self.spec.samples(reader.latents))
        if type(samples) is not int or self.spec.latents(samples) != reader.latents:
            raise LatentsFileError(
                f"{path}: holds {reader.latents} latents, but the .json beside it says {samples!r} samples; "
                "encode again"
            )
        return samples

    def close(self) -> None:
        """Free what the backend holds."""
        self.autoencoder.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_to_encode(audio_path: Path, latents_path: Path) -> AudioReader:
    """Open an audio file, and refuse an output that must not be replaced. This needs no model.

    Raises:
        AudioFileError, InputError, OutputError: as `AutoencoderModel.encode_file`.
    """
    require_other_file(latents_path, audio_path)
    require_replaceable(latents_path)
    return AudioReader(audio_path)


def open_to_decode(
    latents_path: Path, audio_path: Path, subtype: str, peak: str | None = None, *, force: bool = False
) -> LatentsReader:
    """Open a latents file, and refuse an output that cannot be written or must not be replaced. This needs no model.

    Raises:
        LatentsFileError, InputError, OutputError: as `AutoencoderModel.decode_file`.
    """
    reader = LatentsReader(latents_path)
    format_of(audio_path, subtype)
    checked_policy(peak, subtype)
    require_other_file(audio_path, latents_path)
    if not force:
        require_no_recording(audio_path, latents_path, reader.metadata)
    return reader
