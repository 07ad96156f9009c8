"""Take the place of the VAE in the Stable Audio 3 pipelines of diffusers, tried with diffusers 0.42.1.

Three lines put it into a pipeline:

    from samekit import AutoencoderModel

    pipe = StableAudio3Pipeline.from_pretrained(REPOSITORY, vae=None)
    pipe.vae = AutoencoderModel.from_pretrained("same-l").as_vae()
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

from samekit.arrays import is_tensor
from samekit.batches import Autoencoder


class EncoderOutput(NamedTuple):
    """What `Vae.encode` returns; also the tuple that pipelines expect for `return_dict=False`."""

    latents: Any
    """`[batch, latent_dim, latents]`."""


class DecoderOutput(NamedTuple):
    """What `Vae.decode` returns; also the tuple that pipelines expect for `return_dict=False`."""

    sample: Any
    """`[batch, channels, samples]`."""


class Vae(Autoencoder):
    """An `Autoencoder` with the interface of diffusers' `AutoencoderSAME`; `AutoencoderModel.as_vae()` returns one.

    It is no `torch.nn.Module`, so pipelines neither move nor offload it: the engine stays where it was opened. Results
    are put on the device of the input.
    """

    @property
    def config(self) -> SimpleNamespace:
        """The fields that pipelines read: `sampling_rate`, `latent_dim` and `audio_channels`."""
        spec = self.spec
        return SimpleNamespace(
            sampling_rate=spec.sample_rate, latent_dim=spec.latent_width, audio_channels=spec.channels
        )

    # The argument has the name that it has in diffusers.
    def encode(  # type: ignore[override]
        self, sample: Any, return_dict: bool = True, **kwargs: Any
    ) -> EncoderOutput:
        """Encode audio `[batch, channels, samples]` at the model's rate, of any length.

        Raises:
            InputError, NonFiniteError, BackendError: as `encode_audio`.
        """
        return EncoderOutput(_on_device_of(sample, self.encode_audio(sample, **kwargs)))

    def decode(self, latents: Any, return_dict: bool = True, **kwargs: Any) -> DecoderOutput:
        """Decode latents `[batch, latent_dim, latents]` of any length.

        Raises:
            InputError, NonFiniteError, BackendError: as `decode_audio`.
        """
        return DecoderOutput(_on_device_of(latents, self.decode_audio(latents, **kwargs)))


def _on_device_of(example: Any, result: Any) -> Any:
    """Put a tensor on the device of another one; return an array as it is."""
    return result.to(example.device) if is_tensor(example) else result
