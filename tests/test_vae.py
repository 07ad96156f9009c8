"""The Stable Audio 3 pipelines of diffusers 0.42.1 with our engine as `pipe.vae`, compared with diffusers' own VAE.

Facts about diffusers 0.42.1: `models/autoencoders/autoencoder_same.py` (what `encode` and `decode` return),
`pipelines/stable_audio_3/*.py` (what they read of `self.vae`), and `pipelines/pipeline_utils.py` (only components that
are a `torch.nn.Module` are moved and offloaded).
"""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from helpers import HOP, RATE, FakeBackend, assert_close, noise

from samekit import AutoencoderModel
from samekit_export.checkpoint import load_folder
from samekit_export.export import export

# The pipelines import it, even if the text encoder is not used.
pytest.importorskip("transformers")

LEAST_DB = 90
WIDTH = 32
SECONDS = 1.3


@pytest.fixture(scope="module")
def diffusers():
    """Import diffusers' classes, whose imports warn about packages that are not needed here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

        for name in ("AutoencoderSAME", "StableAudio3Pipeline", "StableAudio3DiTModel"):
            getattr(diffusers, name)
        yield diffusers


@pytest.fixture(scope="module")
def theirs(same_of_diffusers):
    return same_of_diffusers[0]


@pytest.fixture(scope="module")
def model(same_of_diffusers, tmp_path_factory):
    """Return our engine of the same weights."""
    engine = export(load_folder(same_of_diffusers[1]), tmp_path_factory.mktemp("engines"))
    with AutoencoderModel.from_pretrained(engine.folder, "cpu", backend="onnxruntime", threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def parts(diffusers):
    """Return the other components of a pipeline: small, with random weights, and no text encoder."""
    torch.manual_seed(0)
    transformer = diffusers.StableAudio3DiTModel(
        io_channels=WIDTH,
        embed_dim=32,
        depth=2,
        num_heads=2,
        cond_token_dim=16,
        global_cond_dim=16,
        local_add_cond_dim=1 + WIDTH,
        timestep_features_dim=16,
        num_memory_tokens=2,
    )
    for parameter in transformer.parameters():
        # Some layers begin as zeros, so that their inputs would have no effect.
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return {
        "text_encoder": None,
        "tokenizer": None,
        "duration_embedder": diffusers.StableAudio3DurationEmbedder(output_dim=16, fourier_dim=16),
        "transformer": transformer.eval(),
        # Stochastic sampling would replace the latents of the reference audio by noise in the first step.
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=False),
    }


REFERENCE = torch.from_numpy(noise((1, 2, round(0.9 * RATE)), seed=4))
CALLS = {
    "StableAudio3Pipeline": {},
    "StableAudio3AudioToAudioPipeline": {"audio": REFERENCE, "init_noise_level": 0.7},
    "StableAudio3InpaintPipeline": {"audio": REFERENCE, "mask_start_seconds": 0.2, "mask_end_seconds": 0.6},
}


def build(diffusers, name, parts, vae):
    pipe = getattr(diffusers, name)(vae=vae, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, seconds=SECONDS, dtype=torch.float32, **options):
    prompt = torch.from_numpy(noise((2, 5, 16), seed=5, level=1)).to(dtype)
    if "audio" in options:
        options["audio"] = options["audio"].repeat(2, 1, 1)
    generator = torch.Generator().manual_seed(6)
    return pipe(prompt_embeds=prompt, duration=seconds, num_inference_steps=3, generator=generator, **options)


@pytest.mark.parametrize("name", CALLS)
def test_pipelines_give_what_they_give_with_their_own_vae(diffusers, parts, theirs, model, name):
    expected = generate(build(diffusers, name, parts, theirs), **CALLS[name]).audios
    assert expected.shape == (2, 2, int(SECONDS * RATE))
    pipe = build(diffusers, name, parts, model.as_vae())
    assert_close(expected.numpy(), generate(pipe, **CALLS[name]).audios.numpy(), LEAST_DB)
    (other,) = generate(pipe, return_dict=False, output_type="np", **CALLS[name])
    assert_close(expected.numpy(), other, LEAST_DB)


@pytest.mark.parametrize("name", list(CALLS)[1:])
def test_reference_audio_has_an_effect(diffusers, parts, model, name):
    """Otherwise the comparisons of two pipelines would not test encoding."""
    pipe = build(diffusers, name, parts, model.as_vae())
    silent = generate(pipe, **CALLS[name] | {"audio": 0 * REFERENCE}).audios
    assert (silent - generate(pipe, **CALLS[name]).audios).abs().max() > 0.01


def test_interface_is_that_of_their_vae(theirs, model):
    vae = model.as_vae()
    audio, latents = torch.from_numpy(noise((2, 2, 3 * HOP))), torch.from_numpy(noise((2, WIDTH, 3), level=1))
    with torch.no_grad():
        for ours, expected in (
            (vae.encode(audio).latents, theirs.encode(audio).latents),
            (vae.encode(sample=audio, return_dict=False)[0], theirs.encode(sample=audio, return_dict=False)[0]),
            (vae.decode(latents).sample, theirs.decode(latents).sample),
            (vae.decode(latents=latents, return_dict=False)[0], theirs.decode(latents=latents, return_dict=False)[0]),
        ):
            assert_close(expected.numpy(), ours.numpy(), 100)
    for name in ("sampling_rate", "latent_dim", "audio_channels"):
        assert getattr(vae.config, name) == getattr(theirs.config, name)
    assert vae.downsampling_ratio == theirs.downsampling_ratio
    assert (vae.dtype, vae.device) == (theirs.dtype, theirs.device)
    parameter, other = next(vae.parameters()), next(theirs.parameters())
    assert (parameter.dtype, parameter.device) == (other.dtype, other.device)
    assert vae.eval().requires_grad_(False).to("cpu") is vae


@pytest.mark.parametrize("name", CALLS)
def test_pipelines_in_half_precision(diffusers, parts, model, name):
    """Their VAE refuses latents of another type than its weights; ours computes in float32."""
    pipe = build(diffusers, name, parts, model.as_vae())
    single = generate(pipe, **CALLS[name]).audios
    pipe.to(torch.bfloat16)
    try:
        halved = generate(pipe, dtype=torch.bfloat16, **CALLS[name]).audios
    finally:
        pipe.to(torch.float32)
    assert halved.dtype == torch.float32
    assert_close(single.numpy(), halved.numpy(), 25)


def test_long_audio_is_decoded_in_windows():
    """The memory that the engine needs does not grow with the length."""
    backend = FakeBackend()
    vae = AutoencoderModel(backend, window=32).as_vae()
    assert vae.decode(torch.zeros(1, 4, 5000)).sample.shape == (1, 2, 40_000)
    assert vae.encode(torch.zeros(1, 2, 40_000)).latents.shape == (1, 4, 5000)
    assert max(backend.calls) == 32
    assert len(backend.calls) > 2 * 5000 / 32


def test_results_are_on_the_device_of_the_input():
    class Elsewhere(torch.Tensor):
        """Stands for a tensor on a GPU, while the engine is on the CPU."""

        device = "meta"

    vae = AutoencoderModel(FakeBackend()).as_vae()
    assert vae.decode(torch.zeros(1, 4, 3).as_subclass(Elsewhere)).sample.device.type == "meta"
    assert vae.encode(torch.zeros(1, 2, 24).as_subclass(Elsewhere)).latents.device.type == "meta"


def test_arrays_give_arrays():
    vae = AutoencoderModel(FakeBackend()).as_vae()
    assert isinstance(vae.encode(np.zeros((1, 2, 24), np.float32)).latents, np.ndarray)
    assert isinstance(vae.decode(np.zeros((1, 4, 3), np.float32)).sample, np.ndarray)


def test_offloading_leaves_the_engine_where_it_is(diffusers, parts, model):
    pytest.importorskip("accelerate")
    pipe = build(diffusers, "StableAudio3Pipeline", parts, model.as_vae())
    expected = generate(pipe).audios
    # Without a GPU, the hooks move the other components from the CPU to the CPU.
    pipe.enable_model_cpu_offload(device="cpu")
    try:
        for _ in range(2):
            assert_close(expected.numpy(), generate(pipe).audios.numpy(), LEAST_DB)
    finally:
        pipe.remove_all_hooks()


def test_pipelines_are_saved_without_it_and_loaded_with_it(diffusers, parts, theirs, model, tmp_path):
    """A pipeline is loaded without its VAE, whose weights are then not read, and gets ours."""

    def load(folder):
        absent = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
        pipe = diffusers.StableAudio3Pipeline.from_pretrained(folder, **absent)
        pipe.set_progress_bar_config(disable=True)
        pipe.vae = model.as_vae()
        return pipe

    with_theirs, without = tmp_path / "with", tmp_path / "without"
    build(diffusers, "StableAudio3Pipeline", parts, theirs).save_pretrained(with_theirs)
    assert (with_theirs / "vae").exists()
    pipe = load(with_theirs)
    expected = generate(pipe).audios
    assert pipe.components["vae"] is pipe.vae
    pipe.save_pretrained(without)
    assert not (without / "vae").exists()
    assert json.loads((without / "model_index.json").read_text())["vae"] == [None, None]
    assert np.array_equal(generate(load(without)).audios.numpy(), expected.numpy())


def test_it_shares_the_engine_and_its_precision(model):
    vae = model.as_vae()
    assert vae.backend is model.autoencoder.backend
    assert vae.windows("decoder") == model.autoencoder.windows("decoder")
