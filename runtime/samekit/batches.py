"""Encode and decode batches of prepared audio in exact windows, or in the reference's chunks."""

from __future__ import annotations

import functools
import logging
import math
import sys
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from samekit.arguments import check_whole
from samekit.arrays import AUDIO, LATENTS, as_clip, is_tensor, needs_gradient, sample_rates, to_float32, to_kind_of
from samekit.audio import pad_to, prepare
from samekit.engine.spec import DECODER, ENCODER, Direction, opposite
from samekit.errors import InputError
from samekit.frozen_module import FrozenModule
from samekit.streaming import run_windows
from samekit.windows import ExactWindows, reference_chunks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from samekit.backends.base import Backend

logger = logging.getLogger(__name__)

# The reference's defaults for chunked processing, in latents.
CHUNK_SIZE, OVERLAP = 128, 32


# Arguments of the reference's `encode` and `decode` that change what is computed or returned.
_NOT_SUPPORTED = ("return_info", "return_pretransform", "return_loss", "skip_pretransform")
# An argument of theirs that changes nothing here: one clip at a time takes less memory, which windows bound anyway.
_WITHOUT_EFFECT = "iterate_batch"


class Autoencoder(FrozenModule):
    """Prepares audio, and encodes and decodes batches; `AutoencoderModel.autoencoder` is one.

    It takes the place of the reference's `AudioAutoencoder`, for scripts that do not train it.
    """

    is_discrete: Literal[False] = False
    """The latents are continuous: there are no tokens."""
    bottleneck = None
    """The engine contains the bottleneck."""
    pretransform = None
    """The engine contains the patching."""

    def __init__(self, backend: Backend, window: int | None = None) -> None:
        if window is not None:
            check_whole("window", window, least=1)
        spec = backend.spec
        self.window = window
        """Latents that are computed at once; None for the default of the backend."""
        self.spec = spec
        """Every fact about the model."""
        self.sample_rate = spec.sample_rate
        """Sample rate of the model's audio in Hz."""
        self.io_channels = self.in_channels = self.out_channels = spec.channels
        """Audio channels."""
        self.downsampling_ratio = spec.hop
        """Samples per latent."""
        self.latent_dim = spec.latent_width
        """Features of a latent."""
        self.min_length = spec.hop
        """Samples of the shortest audio; lengths are padded to multiples of it."""
        self.soft_clip = spec.soft_clip
        """Whether the model's last step is tanh, which keeps decoded audio in -1 ... 1."""
        super().__init__(backend)

    def _use(self, backend: Backend) -> None:
        spec = backend.spec
        plans: dict[str, ExactWindows] = {}
        # The wider context comes first: the least window that a refusal names must suit both directions.
        for direction, context in sorted(spec.contexts.items(), key=lambda item: item[1], reverse=True):
            size = self.window
            if size is None:
                size = spec.alignment * math.ceil(backend.default_window(direction) / spec.alignment)
                if backend.longest_window is not None:
                    size = min(size, backend.longest_window - backend.longest_window % spec.alignment)
            plans[direction] = ExactWindows(size, context, spec.alignment)
        # Nothing has changed so far: another thread may be computing, and an error leaves the model as it was.
        self._plans = plans
        super()._use(backend)

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

    def encode(self, audio: Any, **kwargs: Any) -> Any:
        """Encode prepared audio as `encode_audio` does without chunks."""
        return self.encode_audio(audio, **kwargs)

    def decode(self, latents: Any, **kwargs: Any) -> Any:
        """Decode latents as `decode_audio` does without chunks."""
        return self.decode_audio(latents, **kwargs)

    def encode_audio(
        self, audio: Any, chunked: bool = False, overlap: int = OVERLAP, chunk_size: int = CHUNK_SIZE, **kwargs: Any
    ) -> Any:
        """Encode prepared audio `[batch, io_channels, samples]` to latents `[batch, latent_dim, latents]`.

        A length that is not a multiple of `downsampling_ratio` is padded with zeros. The order of the arguments is the
        reference's, and differs from that of `AutoencoderModel.encode`.

        Args:
            audio: NumPy or PyTorch.
            chunked: see `AutoencoderModel.encode`.
            overlap: see `AutoencoderModel.encode`.
            chunk_size: see `AutoencoderModel.encode`.
            kwargs: further arguments of the reference. Those that engines cannot honour raise InputError. All others
                are ignored with a warning.

        Raises:
            InputError: as `AutoencoderModel.encode`, or the audio requires a gradient.
            NonFiniteError, BackendError: as `AutoencoderModel.encode`.
        """
        self._check_call(audio, AUDIO, kwargs)
        return self._run(ENCODER, audio, AUDIO, (chunk_size, overlap) if chunked else None)

    def decode_audio(
        self, latents: Any, chunked: bool = False, overlap: int = OVERLAP, chunk_size: int = CHUNK_SIZE, **kwargs: Any
    ) -> Any:
        """Decode latents `[batch, latent_dim, latents]` to audio `[batch, io_channels, samples]`.

        The other arguments and the errors are those of `encode_audio`.
        """
        self._check_call(latents, LATENTS, kwargs)
        return self._run(DECODER, latents, LATENTS, (chunk_size, overlap) if chunked else None)

    def decode_tokens(self, tokens: Any, **kwargs: Any) -> Any:
        """Refuse tokens, which only discrete autoencoders have.

        Raises:
            InputError: always.
        """
        raise InputError("the latents of this model are continuous, so it has no tokens; use decode(latents)")

    def _check_call(self, value: Any, name: str, options: dict[str, Any]) -> None:
        """Refuse what an engine cannot do, and warn of arguments that have no effect."""
        if needs_gradient(value):
            raise InputError(
                f"the {name} require a gradient, and engines compute none; call this under torch.no_grad(), or pass "
                f"{name}.detach()"
            )
        for option, given in options.items():
            # False and None are the reference's defaults.
            if given is None or given is False or option == _WITHOUT_EFFECT:
                continue
            if option in _NOT_SUPPORTED:
                raise InputError(f"engines do not support {option}; leave it out, or use the checkpoint in PyTorch")
            _warn_of_argument(option)

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
        result: Any = out if stays else to_kind_of(out, value, self.backend.torch_device)
        if not self.returns_half:
            return result
        return result.half() if is_tensor(result) else result.astype(np.float16)

    def stays_on_device(self, value: Any) -> bool:
        """Return whether a value is a batch in device memory that the backend accepts; its result stays there too."""
        return self.backend.accepts(value) and value.ndim == 3 and value.numel() > 0


@functools.cache
def _warn_of_argument(name: str) -> None:
    """Log a warning, once per process and name."""
    logger.warning("the argument %s has no effect on an engine", name)


def _check_batch(array: np.ndarray[Any, Any], features: int, name: str) -> None:
    if array.ndim == 3 and array.shape[1] == features:
        return
    cure = f"pass {name} of this model"
    if array.ndim == 2:
        cure = "pass one clip as array[None]"
    elif array.ndim == 3 and array.shape[2] == features:
        cure = "transpose it: array.transpose(0, 2, 1)"
    elif array.ndim == 3 and name == AUDIO:
        cure = f"convert it to {features} channels"
    raise InputError(f"{name} must be [batch, {features}, length], got {list(array.shape)}; {cure}")


def _whole_latents(batch: Any, unit: int) -> Any:
    """Pad an array or a tensor with zeros to whole latents of `unit` values."""
    missing = -batch.shape[-1] % unit
    if missing and is_tensor(batch):
        return sys.modules["torch"].nn.functional.pad(batch, (0, missing))
    return pad_to(batch, unit)
