"""`AutoencoderModel.autoencoder`, used as scripts for the reference use its `AudioAutoencoder`.

Facts about the reference, repository Stability-AI/stable-audio-3:

* `stable_audio_3/models/autoencoders.py`: the attributes of `AudioAutoencoder` and the order of its arguments.
* `stable_audio_3/models/pretransforms.py`, class `AutoencoderPretransform`: what a diffusion model calls.
* `scripts/pre_encode_dataset.py`: `ae.autoencoder = ae.autoencoder.half()`, and `next(ae.autoencoder.parameters())`.

A community script that exports the decoder calls `model.autoencoder.eval().to(device).float().requires_grad_(False)`.
"""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import HOP, RATE, FakeBackend, assert_close, assert_one_line, noise, seeded, variant

from samekit import AutoencoderModel
from samekit.batches import Autoencoder
from samekit.engine.spec import EngineSpec
from samekit.errors import BackendError, BackendUnavailableError, InputError
from samekit_export.model_spec import spec_of

AUDIO = noise((1, 2, 12 * HOP), seed=1)
LATENTS = noise((1, 32, 12), seed=2, level=1)


def opened(folder, **options):
    return AutoencoderModel.from_pretrained(folder, "cpu", backend="onnxruntime", threads=1, **options)


@pytest.fixture
def model(half_engine):
    with opened(half_engine) as model:
        yield model


@pytest.fixture
def fake():
    return AutoencoderModel(FakeBackend())


# --- Order of arguments ------------------------------------------------------------------------------------

INNER = "audio chunked=False overlap=32 chunk_size=128 **kwargs"
OUTER = "audio sr chunked=False chunk_size=128 overlap=32"
SIGNATURES = {
    "encode_audio": (Autoencoder, INNER),
    "decode_audio": (Autoencoder, INNER.replace("audio", "latents")),
    "encode": (AutoencoderModel, OUTER),
    "decode": (AutoencoderModel, OUTER.replace("audio sr", "latents")),
    "preprocess_audio_for_encoder": (Autoencoder, "audio in_sr"),
    "preprocess_audio_list_for_encoder": (Autoencoder, "audio_list in_sr_list"),
}


@pytest.mark.parametrize("method", SIGNATURES)
def test_arguments_are_in_the_order_of_the_reference(method):
    owner, expected = SIGNATURES[method]
    _, *parameters = inspect.signature(getattr(owner, method)).parameters.values()
    shown = [str(each.replace(annotation=inspect.Parameter.empty)) for each in parameters]
    assert " ".join(shown) == expected


def test_arguments_are_taken_by_position(fake):
    """12 latents in chunks of 6 that share 2 are three chunks; chunks of 2 that share 6 are an error."""
    inner, backend = fake.autoencoder, fake.autoencoder.backend
    audio, latents = np.zeros((1, 2, 12 * 8), np.float32), np.zeros((1, 4, 12), np.float32)
    for call in (
        lambda first, second: inner.encode_audio(audio, True, first, second),
        lambda first, second: inner.decode_audio(latents, True, first, second),
        lambda first, second: fake.encode(audio, RATE, True, second, first),
        lambda first, second: fake.decode(latents, True, second, first),
    ):
        backend.calls.clear()
        call(2, 6)
        assert backend.calls == [6, 6, 6]
        with pytest.raises(InputError, match="pass 0 <= overlap < chunk_size"):
            call(6, 2)


def test_encode_and_decode_are_one_pass(model):
    inner = model.autoencoder
    assert np.array_equal(inner.encode(AUDIO), model.encode(AUDIO, RATE))
    assert np.array_equal(inner.decode(LATENTS), model.decode(LATENTS))


@pytest.mark.parametrize(
    ("shape", "cure"),
    [
        ((2, 24), r"pass one clip as array\[None\]"),
        ((1, 24, 2), r"transpose it: array.transpose\(0, 2, 1\)"),
        ((3, 1, 24), "convert it to 2 channels"),
        ((1, 1, 2, 24), "pass audio of this model"),
    ],
)
def test_prepared_audio_of_another_shape(fake, shape, cure):
    with refused(rf"audio must be \[batch, 2, length\], got .*; {cure}$") as caught:
        fake.autoencoder.encode_audio(torch.zeros(shape))
    assert_one_line(caught.value)


def test_arguments_without_meaning_are_warned_of_once(fake, caplog):
    inner, latents = fake.autoencoder, np.zeros((1, 4, 3), np.float32)
    # `AutoencoderPretransform` passes iterate_batch in each call.
    for _ in range(2):
        inner.decode_audio(latents, iterate_batch=True, gizmo=1, doodad=None, return_info=False)
        inner.encode_audio(np.zeros((1, 2, 8), np.float32), chunked=False, gizmo=2)
    assert caplog.messages == ["the argument gizmo has no effect on an engine"]


@pytest.mark.parametrize("name", ["return_info", "return_pretransform", "return_loss", "skip_pretransform"])
def test_arguments_that_change_the_result_are_refused(fake, name):
    with pytest.raises(InputError, match=f"engines do not support {name}; leave it out") as caught:
        fake.autoencoder.decode(np.zeros((1, 4, 3), np.float32), **{name: True})
    assert_one_line(caught.value)
    assert fake.autoencoder.backend.calls == []


# --- Attributes --------------------------------------------------------------------------------------------


def test_attributes(model):
    inner = model.autoencoder
    assert (inner.in_channels, inner.out_channels, inner.io_channels) == (2, 2, 2)
    assert (inner.latent_dim, inner.sample_rate, inner.downsampling_ratio, inner.min_length) == (32, RATE, HOP, HOP)
    assert (inner.soft_clip, inner.is_discrete, inner.training) == (False, False, False)
    # The reference's AutoencoderPretransform asks whether there is a discrete bottleneck.
    assert (inner.bottleneck, inner.pretransform) == (None, None)


def test_soft_clip_is_recorded(tmp_path):
    assert not spec_of(seeded("tiny-s")).soft_clip
    spec = spec_of(variant("tiny-s", {"decoder.soft_clip": True}))
    (tmp_path / "spec.json").write_text(spec.to_json())
    backend = FakeBackend()
    backend.spec = EngineSpec.load(tmp_path)
    assert Autoencoder(backend).soft_clip


def test_evaluation_mode(model):
    inner = model.autoencoder
    assert inner.eval() is inner
    assert inner.train(False) is inner
    assert inner.requires_grad_(False) is inner
    assert inner.eval().to("cpu").float().requires_grad_(False) is inner


def refused(match):
    return pytest.raises(InputError, match=match)


def test_training_is_refused(fake):
    inner, latents = fake.autoencoder, torch.zeros(1, 4, 3, requires_grad=True)
    cases = {
        "cannot be trained; train the checkpoint in PyTorch and export it again": inner.train,
        r"no gradients; call requires_grad_\(False\)": inner.requires_grad_,
        r"the latents require a gradient.*no_grad\(\), or pass latents.detach\(\)": lambda: inner.decode(latents),
        "has no tokens; use decode": lambda: inner.decode_tokens(torch.zeros(1, 3, dtype=torch.long)),
    }
    for match, call in cases.items():
        with refused(match) as caught:
            call()
        assert_one_line(caught.value)
    with torch.no_grad():
        assert inner.decode(latents).shape == (1, 2, 24)
    # The reference's AutoencoderModel runs in inference mode, which gives no gradients either.
    assert not fake.decode(latents).requires_grad


@pytest.mark.parametrize("name", ["encoder", "decoder", "state_dict", "load_state_dict", "named_parameters"])
def test_layers_and_weights_are_refused_by_name(fake, name):
    assert not hasattr(fake.autoencoder, name)
    with pytest.raises(AttributeError, match=f"has no attribute '{name}': it is an engine.*; for these, use the"):
        getattr(fake.autoencoder, name)


# --- Device and type ---------------------------------------------------------------------------------------


def test_parameters_have_a_device_and_a_dtype(model):
    (parameter,) = model.autoencoder.parameters()
    assert isinstance(parameter, torch.Tensor)
    assert (parameter.device, parameter.dtype) == (torch.device("cpu"), torch.float32)
    assert not parameter.requires_grad
    assert (model.autoencoder.device, model.autoencoder.dtype) == (parameter.device, parameter.dtype)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import numpy as np
from samekit import AutoencoderModel
with AutoencoderModel.from_pretrained(sys.argv[1], "cpu") as model:
    inner = model.autoencoder.eval().requires_grad_(False).to("cpu").half()
    (parameter,) = inner.parameters()
    latents = inner.encode(np.zeros((1, inner.io_channels, inner.min_length), np.float32))
    print(parameter.device, parameter.dtype, inner.dtype, latents.dtype, inner.float().decode(latents).dtype)
"""


def test_without_pytorch(half_engine):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(half_engine)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "cpu float16 float16 float16 float32\n", done.stderr


@pytest.mark.parametrize("here", ["cpu", "cuda:0", "cuda:1"])
def test_to_takes_the_device_that_the_model_is_on(fake, here, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    inner, backend = fake.autoencoder, fake.autoencoder.backend
    backend.device, backend.device_id = here.partition(":")[0], int(here[-1]) if here[-1].isdigit() else 0
    # A tensor on a GPU cannot be made here.
    monkeypatch.setattr(type(inner), "device", here)
    for device in (here, torch.device(here), backend.device, None):
        assert inner.to(device) is inner
    assert (inner.cpu() if here == "cpu" else inner.cuda(int(here[-1]))) is inner
    assert inner.to(device=here, non_blocking=True) is inner
    others = {"cpu", "cuda:0", "cuda:1", "cuda:7"} - {here}
    for device in others:
        with refused(rf"is on {here} and cannot be moved to {device}; open it there: .*device='{device}'\)") as caught:
            inner.to(device)
        assert_one_line(caught.value)


@pytest.mark.parametrize("device", ["mps", "xpu:0", "meta"])
def test_engines_run_on_no_other_devices(fake, device):
    with refused(f"engines run on cpu and cuda, not on {device}; leave the model on cpu") as caught:
        fake.autoencoder.to(torch.device(device))
    assert_one_line(caught.value)


def test_a_gpu_that_pytorch_does_not_see_is_the_cpu(fake):
    fake.autoencoder.backend.device = "cuda"
    assert fake.autoencoder.to(next(fake.autoencoder.parameters()).device) is fake.autoencoder


def test_half_opens_the_fp16_graphs(model, half_engine):
    single = model.encode(AUDIO, RATE)
    before = model.autoencoder
    model.autoencoder = model.autoencoder.half()
    assert model.autoencoder is before
    assert model.autoencoder.backend.precision == "fp16"
    assert model.autoencoder.dtype == torch.float16
    # Like the reference: half a model, half the audio, half the latents.
    halved = model.encode(torch.from_numpy(AUDIO).half(), RATE)
    assert halved.dtype == torch.float16
    assert_close(single, halved.float().numpy(), 40)
    assert model.decode(halved).dtype == torch.float16
    assert model.encode(AUDIO, RATE).dtype == np.float16
    with opened(half_engine, precision="fp16") as fp16:
        expected = fp16.encode(AUDIO.astype(np.float16), RATE)
        assert expected.dtype == np.float32
        assert np.array_equal(expected.astype(np.float16), halved.numpy())
    assert np.array_equal(model.autoencoder.float().encode(AUDIO), single)


def test_to_converts_to_a_dtype(model):
    inner = model.autoencoder
    assert inner.to(torch.float16).backend.precision == "fp16"
    assert inner.to("cpu", torch.float32).backend.precision == "fp32"
    assert inner.to(dtype=torch.half).dtype == torch.float16
    assert inner.to(torch.zeros(1)).dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float64, torch.int8):
        with refused(rf"in float32 or float16, not in {dtype}; pass one of these"):
            inner.to(dtype)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_dtype_that_it_has_changes_nothing(precision):
    """As in PyTorch. A model of every precision returns float32, until `half`."""
    inner = AutoencoderModel(FakeBackend(precision=precision)).autoencoder
    before = inner.backend
    assert inner.float().to(inner.dtype).to("cpu", torch.float32) is inner
    assert inner.backend is before


def test_half_that_fails_changes_nothing(fake):
    """The fp16 backend of this model cannot run its windows."""
    inner, before = fake.autoencoder, fake.autoencoder.backend

    def reopened():
        backend = FakeBackend(precision="fp16")
        backend.longest_window = 2
        return backend

    before.reopening = reopened, ()
    with pytest.raises(InputError, match="not exact"):
        inner.half()
    assert inner.backend is before
    assert inner.decode(np.zeros((1, 4, 40), np.float32)).dtype == np.float32


def test_half_keeps_the_window_and_the_options(half_engine):
    with opened(half_engine, window=16, window_batch=3) as model:
        model.autoencoder.half()
        assert model.autoencoder.windows("encoder").size == 16
        assert model.autoencoder.backend.window_batch == 3
        assert copy.deepcopy(model).encode(AUDIO, RATE).dtype == np.float16


def test_half_names_the_command_that_exports_it(engine_of):
    with opened(engine_of("tiny-s").folder) as model:
        with pytest.raises(BackendUnavailableError, match=r"no fp16 graph .*; run: samekit export .*--precision fp16"):
            model.autoencoder.half()
        # It still works as before.
        assert model.encode(AUDIO, RATE).dtype == np.float32


def test_half_of_a_backend_that_cannot_be_opened_again(fake):
    with pytest.raises(BackendError, match=r"so it cannot be copied.*or converted; open the model") as caught:
        fake.autoencoder.half()
    assert_one_line(caught.value)
    assert fake.autoencoder.float() is fake.autoencoder


def test_a_vae_for_pipelines_is_halved_too(model):
    model.autoencoder.half()
    vae = model.as_vae()
    assert vae.backend is model.autoencoder.backend
    assert vae.dtype == torch.float16
    assert vae.decode(torch.from_numpy(LATENTS).half()).sample.dtype == torch.float16
    # Converting one leaves the other as it is.
    assert vae.float().dtype == torch.float32
    assert model.autoencoder.dtype == torch.float16


# --- Inside a diffusion model ------------------------------------------------------------------------------


class Pretransform(torch.nn.Module):
    """Calls the autoencoder as the reference's `AutoencoderPretransform` does with `model_half`."""

    def __init__(self, model):
        super().__init__()
        self.is_discrete = model.bottleneck is not None and model.bottleneck.is_discrete
        self.model = model
        self.model.requires_grad_(False).eval()
        self.model.half()

    def encode(self, audio):
        self.model.to(torch.float16)
        return self.model.encode_audio(audio.half(), chunked=False, iterate_batch=False).float()

    def decode(self, latents):
        return self.model.decode_audio(latents.half(), chunked=True, iterate_batch=True).float()


def test_inside_a_diffusion_model(model):
    audio, latents = torch.from_numpy(AUDIO), torch.from_numpy(noise((1, 32, 130), level=1))
    single, chunked = model.encode(audio, RATE), model.decode(latents, chunked=True)
    pretransform = Pretransform(model.autoencoder)
    # It is no module, so training the diffusion model leaves it alone.
    pretransform.train().to("cpu")
    assert list(pretransform.parameters()) == []
    assert not pretransform.is_discrete
    assert_close(single.numpy(), pretransform.encode(audio).numpy(), 40)
    assert_close(chunked.numpy(), pretransform.decode(latents).numpy(), 40)
