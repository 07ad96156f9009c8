"""Encode and decode batches of prepared audio in exact windows, or in the reference's chunks."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from samekit.arguments import check_whole
from samekit.arrays import AUDIO, LATENTS, as_clip, is_tensor, sample_rates, to_float32, to_kind_of
from samekit.audio import pad_to, prepare
from samekit.engine.spec import DECODER, ENCODER, Direction, opposite
from samekit.errors import InputError
from samekit.streaming import run_windows
from samekit.windows import ExactWindows, reference_chunks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from samekit.backends.base import Backend


# The reference's defaults for chunked processing, in latents.
CHUNK_SIZE, OVERLAP = 128, 32

# Default windows have at least this many latents, unless the backend takes fewer.
_LEAST_WINDOW = 128


class Autoencoder:
    """Prepares audio, and encodes and decodes batches; `AutoencoderModel.autoencoder` is one."""

    def __init__(self, backend: Backend, window: int | None = None) -> None:
        if window is not None:
            check_whole("window", window, least=1)
        spec = backend.spec
        self.backend = backend
        """Runs the model; closing it closes the model."""
        self.spec = spec
        """Every fact about the model."""
        self.sample_rate = spec.sample_rate
        """Sample rate of the model's audio in Hz."""
        self.io_channels = spec.channels
        """Audio channels."""
        self.downsampling_ratio = spec.hop
        """Samples per latent."""
        self.latent_dim = spec.latent_width
        """Features of a latent."""
        self.min_length = spec.hop
        """Samples of the shortest audio; lengths are padded to multiples of it."""
        self._plans: dict[str, ExactWindows] = {}
        # The wider context comes first: the least window that a refusal names must suit both directions.
        for direction, context in sorted(spec.contexts.items(), key=lambda item: item[1], reverse=True):
            size = window
            if size is None:
                # At this length the context, which is computed and dropped, costs at most a sixteenth.
                size = spec.alignment * math.ceil(max(_LEAST_WINDOW, 32 * context) / spec.alignment)
                if backend.longest_window is not None:
                    size = min(size, backend.longest_window - backend.longest_window % spec.alignment)
            self._plans[direction] = ExactWindows(size, context, spec.alignment)

    def windows(self, direction: Direction) -> ExactWindows:
        """Return the windows of `spec.ENCODER` or `spec.DECODER`."""
        return self._plans[direction]

    def preprocess_audio_for_encoder(self, audio: Any, in_sr: Any) -> Any:
        """Prepare one clip for `encode_audio`: `preprocess_audio_list_for_encoder` of a list of one."""
        return self.preprocess_audio_list_for_encoder([audio], in_sr)

    def preprocess_audio_list_for_encoder(self, audio_list: Sequence[Any], in_sr_list: Any) -> Any:
        """Prepare several clips as one batch for `encode_audio`.

        Args:
            audio_list: clips `[channels, samples]`, `[samples]` or `[1, channels, samples]`, NumPy or PyTorch.
            in_sr_list: their sample rates in Hz, one for all or one each: numbers, a list, NumPy or PyTorch.

        Returns:
            `[clips, io_channels, samples]` at the model's rate, zero-padded at the end to the longest clip and to whole
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
        """Encode prepared audio `[batch, io_channels, samples]` to latents `[batch, latent_dim, latents]`.

        A length that is not a multiple of `downsampling_ratio` is padded with zeros. The other arguments and the errors
        are those of `AutoencoderModel.encode`.
        """
        return self._run(ENCODER, audio, AUDIO, (chunk_size, overlap) if chunked else None)

    def decode_audio(
        self, latents: Any, chunked: bool = False, chunk_size: int = CHUNK_SIZE, overlap: int = OVERLAP
    ) -> Any:
        """Decode latents `[batch, latent_dim, latents]` to audio `[batch, io_channels, samples]`.

        The other arguments and the errors are those of `AutoencoderModel.decode`.
        """
        return self._run(DECODER, latents, LATENTS, (chunk_size, overlap) if chunked else None)

    def _run(self, direction: Direction, value: Any, name: str, chunks: tuple[int, int] | None) -> Any:
        """Run one direction over a whole batch in memory."""
        features, unit = self.spec.layout(direction)
        stays = self.stays_on_device(value)
        if stays:
            batch = value
            if not bool(batch.isfinite().all()):
                raise InputError("the input holds NaN or infinity; repair the input")
        else:
            batch = to_float32(value, name)
            _check_batch(batch, features, name)
        batch = _whole_latents(batch, unit)
        latents = batch.shape[-1] // unit
        windows = reference_chunks(latents, *chunks) if chunks else self._plans[direction].over(latents)
        pieces = ((window, batch[:, :, window.start * unit : window.stop * unit]) for window in windows)
        features_out, unit_out = self.spec.layout(opposite(direction))
        shape = (batch.shape[0], features_out, latents * unit_out)
        out = batch.new_empty(shape) if stays else np.empty(shape, np.float32)
        done = 0
        for kept in run_windows(self.backend, direction, pieces):
            out[:, :, done : done + kept.shape[-1]] = kept
            done += kept.shape[-1]
        return out if stays else to_kind_of(out, value, self.backend.torch_device)

    def stays_on_device(self, value: Any) -> bool:
        """Return whether a value is a batch in device memory that the backend accepts; its result stays there too."""
        return self.backend.accepts(value) and value.ndim == 3 and value.numel() > 0


def _check_batch(array: np.ndarray[Any, Any], features: int, name: str) -> None:
    if array.ndim == 3 and array.shape[1] == features:
        return
    cure = f"pass {name} of this model"
    if array.ndim == 2:
        cure = "pass one clip as array[None]"
    elif array.ndim == 3 and array.shape[2] == features:
        cure = "transpose it: array.transpose(0, 2, 1)"
    raise InputError(f"{name} must be [batch, {features}, length], got {list(array.shape)}; {cure}")


def _whole_latents(batch: Any, unit: int) -> Any:
    """Pad an array or a tensor with zeros to whole latents of `unit` values."""
    missing = -batch.shape[-1] % unit
    if missing and is_tensor(batch):
        return sys.modules["torch"].nn.functional.pad(batch, (0, missing))
    return pad_to(batch, unit)
