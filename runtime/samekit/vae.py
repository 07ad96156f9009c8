"""Take the place of the VAE in the Stable Audio 3 pipelines of diffusers, tried with diffusers 0.42.1.

Three lines put it into a pipeline:

    from samekit import AutoencoderModel

    pipe = StableAudio3Pipeline.from_pretrained(REPOSITORY, vae=None)
    pipe.vae = AutoencoderModel.from_pretrained("same-l").as_vae()
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

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

    def encode(self, audio: Any, return_dict: bool = True, **kwargs: Any) -> EncoderOutput:
        """Encode audio `[batch, channels, samples]` at the model's rate, a tensor of any length.

        Raises:
            InputError, NonFiniteError, BackendError: as `encode_audio`.
        """
        return EncoderOutput(self.encode_audio(audio, **kwargs).to(audio.device))

    def decode(self, latents: Any, return_dict: bool = True, **kwargs: Any) -> DecoderOutput:
        """Decode latents `[batch, latent_dim, latents]`, a tensor of any length.

        Raises:
            InputError, NonFiniteError, BackendError: as `decode_audio`.
        """
        return DecoderOutput(self.decode_audio(latents, **kwargs).to(latents.device))
