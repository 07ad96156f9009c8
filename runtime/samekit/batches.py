"""Encode and decode batches of prepared audio in exact windows, or in the reference's chunks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from samekit.arguments import check_whole
from samekit.arrays import AUDIO, LATENTS, is_tensor, sample_rates, to_float32, to_kind_of
from samekit.audio import pad_to, prepare
from samekit.engine.spec import DECODER, ENCODER, Direction
from samekit.errors import InputError
from samekit.streaming import StreamDecoder, StreamEncoder, WindowRunner, as_clip
from samekit.windows import ExactWindows, reference_chunks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from samekit.arrays import Array
    from samekit.backends.base import Backend
    from samekit.engine.spec import EngineSpec


# The reference's defaults for chunked processing, in latents.
CHUNK_SIZE, OVERLAP = 128, 32


def default_window(context: int, alignment: int, longest: int | None = None) -> int:
    """Latents in a window: long enough that the context that is computed and dropped costs a sixteenth, at least 128.

    Args:
        context: latents dropped at each inner edge.
        alignment: the window is a multiple of it.
        longest: what the backend likes at most; None for no limit.
    """
    size = alignment * math.ceil(max(128, 32 * context) / alignment)
    return size if longest is None else min(size, longest - longest % alignment)


class Autoencoder:
    """The model behind `AutoencoderModel.autoencoder`: whole batches of prepared audio, and the preparation."""

    def __init__(self, backend: Backend, window: int | None = None) -> None:
        if window is not None:
            check_whole("window", window, least=1)
        self.backend = backend
        """What computes; closing it closes the model."""
        self.spec: EngineSpec = backend.spec
        """Every fact about the model."""
        # The wider context first: the least window that a refusal names has to do for both halves.
        self._plans = {
            direction: ExactWindows(
                window or default_window(context, self.spec.alignment, backend.longest_window),
                context,
                self.spec.alignment,
            )
            for direction, context in sorted(self.spec.contexts.items(), key=lambda item: item[1], reverse=True)
        }

    @property
    def sample_rate(self) -> int:
        """Of the audio that the model takes and gives, in Hz."""
        return self.spec.sample_rate

    @property
    def io_channels(self) -> int:
        """Audio channels."""
        return self.spec.channels

    @property
    def downsampling_ratio(self) -> int:
        """Samples per latent."""
        return self.spec.hop

    @property
    def latent_dim(self) -> int:
        """Features of a latent."""
        return self.spec.latent_width

    @property
    def min_length(self) -> int:
        """Samples of the shortest audio; lengths are padded to multiples of it."""
        return self.spec.hop

    def windows(self, direction: Direction) -> ExactWindows:
        """How sequences of a half are cut: `spec.ENCODER` or `spec.DECODER`."""
        return self._plans[direction]

    def preprocess_audio_for_encoder(self, audio: Any, in_sr: Any) -> Any:
        """One clip, ready for `encode_audio`.

        Args:
            audio: `[channels, samples]`, `[samples]` or `[1, channels, samples]`, NumPy or PyTorch.
            in_sr: its sample rate in Hz.

        Returns:
            `[1, io_channels, samples]` at the model's rate, zero-padded at the end to whole latents; same kind.

        Raises:
            InputError: wrong rank or dtype, NaN, infinity, no samples, or a rate out of range.
        """
        return self.preprocess_audio_list_for_encoder([audio], in_sr)

    def preprocess_audio_list_for_encoder(self, audio_list: Sequence[Any], in_sr_list: Any) -> Any:
        """Several clips as one batch, ready for `encode_audio`.

        Args:
            audio_list: clips as `preprocess_audio_for_encoder` takes them.
            in_sr_list: their sample rates in Hz, one for all or one each: numbers, a list, NumPy or PyTorch.

        Returns:
            `[clips, io_channels, samples]`, each zero-padded at the end to the longest clip, rounded up to whole
            latents; of the kind of the first clip.

        Raises:
            InputError: no clips, numbers of clips and rates that differ, or a clip that cannot be used: rank, dtype,
                NaN, infinity, no samples, or a rate out of range.
        """
        clips = list(audio_list)
        rates = sample_rates(in_sr_list, len(clips))
        ready = [
            prepare(as_clip(clip), rate, self.sample_rate, self.io_channels)
            for clip, rate in zip(clips, rates, strict=True)
        ]
        longest = max(clip.shape[-1] for clip in ready)
        batch = np.zeros((len(ready), self.io_channels, longest), np.float32)
        for row, clip in zip(batch, ready, strict=True):
            row[:, : clip.shape[-1]] = clip
        return to_kind_of(pad_to(batch, self.min_length), clips[0], self.backend.torch_device)

    def encode_audio(
        self, audio: Any, chunked: bool = False, chunk_size: int = CHUNK_SIZE, overlap: int = OVERLAP
    ) -> Any:
        """Prepared audio `[batch, io_channels, samples]` to latents `[batch, latent_dim, latents]`.

        Args:
            audio: a length that is no multiple of `downsampling_ratio` is padded with zeros.
            chunked: give the reference's chunked numbers; otherwise those of one pass over everything.
            chunk_size: latents in a chunk; only with `chunked`.
            overlap: latents that neighbouring chunks share; only with `chunked`.

        Raises:
            InputError: wrong shape or dtype, NaN or infinity, unusable chunks.
            NonFiniteError: the model overflowed.
            BackendError: the backend failed.
        """
        if self.on_device(audio):
            return self._run(
                ENCODER, self._ready_on_device(audio, self.spec.hop), (chunk_size, overlap) if chunked else None
            )
        array = to_float32(audio, AUDIO)
        self._check_batch(array, self.io_channels, AUDIO)
        out = self._run(ENCODER, pad_to(array, self.spec.hop), (chunk_size, overlap) if chunked else None)
        return to_kind_of(out, audio, self.backend.torch_device)

    def decode_audio(
        self, latents: Any, chunked: bool = False, chunk_size: int = CHUNK_SIZE, overlap: int = OVERLAP
    ) -> Any:
        """Latents `[batch, latent_dim, latents]` to audio `[batch, io_channels, latents * downsampling_ratio]`.

        Args:
            latents: any number of them.
            chunked: as of `encode_audio`.
            chunk_size: as of `encode_audio`.
            overlap: as of `encode_audio`.

        Raises:
            InputError, NonFiniteError, BackendError: as of `encode_audio`.
        """
        if self.on_device(latents):
            return self._run(DECODER, self._ready_on_device(latents, 1), (chunk_size, overlap) if chunked else None)
        array = to_float32(latents, LATENTS)
        self._check_batch(array, self.latent_dim, LATENTS)
        out = self._run(DECODER, array, (chunk_size, overlap) if chunked else None)
        return to_kind_of(out, latents, self.backend.torch_device)

    def _check_batch(self, array: Array, features: int, name: str) -> None:
        if array.ndim != 3 or array.shape[1] != features:
            if array.ndim == 2:
                cure = "pass one clip as array[None]"
            elif array.ndim == 3 and array.shape[2] == features:
                cure = "transpose it: array.transpose(0, 2, 1)"
            else:
                cure = f"pass {name} of this model"
            raise InputError(f"{name} must be [batch, {features}, length], got {list(array.shape)}; {cure}")

    def _run(self, direction: Direction, batch: Any, chunks: tuple[int, int] | None) -> Any:
        """One half over a whole batch in memory, an array or `on_device`: exact windows, or the reference's chunks."""
        runner = WindowRunner(self.backend, direction)
        latents = batch.shape[-1] // runner.unit_in
        windows = reference_chunks(latents, *chunks) if chunks else self._plans[direction].over(latents)
        shape = (batch.shape[0], runner.features_out, latents * runner.unit_out)
        out = batch.new_empty(shape) if is_tensor(batch) else np.empty(shape, np.float32)
        done = 0
        for core in runner.valid_regions(runner.cut(batch, windows)):
            out[:, :, done : done + core.shape[-1]] = core
            done += core.shape[-1]
        return out

    def on_device(self, value: Any) -> bool:
        """Whether a value is a batch that the backend reads where it lies, and whose result stays there."""
        return self.backend.accepts(value) and value.ndim == 3 and value.numel() > 0

    def _ready_on_device(self, tensor: Any, unit: int) -> Any:
        """A batch `on_device`, finite and padded with zeros to whole latents of `unit` values."""
        if not bool(tensor.isfinite().all()):
            raise InputError("the input holds NaN or infinity; repair the input")
        missing = -tensor.shape[-1] % unit
        if not missing:
            return tensor
        padded = tensor.new_zeros((*tensor.shape[:2], tensor.shape[-1] + missing))
        padded[:, :, : tensor.shape[-1]] = tensor
        return padded

    def stream_encoder(self, sample_rate: Any) -> StreamEncoder:
        """An encoder of one stream at `sample_rate` Hz.

        Raises:
            InputError: the rate is out of range.
        """
        (rate,) = sample_rates(sample_rate, 1)
        return StreamEncoder(self.backend, self._plans[ENCODER], rate)

    def stream_decoder(self) -> StreamDecoder:
        """A decoder of one stream."""
        return StreamDecoder(self.backend, self._plans[DECODER])
