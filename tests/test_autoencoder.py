"""`AutoencoderModel`: exact windows, the reference's signatures, NumPy and PyTorch, files."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import soundfile as sf
import torch
from helpers import (
    HOP,
    KINDS,
    RATE,
    FakeBackend,
    assert_close,
    assert_one_line,
    each_direction,
    noise,
    run_direction,
    smallest_window,
)

from samekit import AutoencoderModel
from samekit.audio import read_audio
from samekit.batches import Autoencoder
from samekit.engine.spec import ENCODER
from samekit.errors import AudioFileError, BackendError, EngineNotFoundError, InputError, LatentsFileError, OutputError
from samekit.model import _warn_of_random_weights
from samekit_export.verify import example_input

LEAST_DB = 110


# --- Exact windows -----------------------------------------------------------------------------------------


def recorded(backend, monkeypatch):
    """Return a list to which each later call of a backend adds its length in latents."""
    lengths, run = [], backend._run

    def record(direction, array):
        lengths.append(array.shape[-1] // (backend.spec.hop if direction == ENCODER else 1))
        return run(direction, array)

    monkeypatch.setattr(backend, "_run", record)
    return lengths


@each_direction
@pytest.mark.parametrize("latents", [300, 301])
def test_exact_windows_equal_one_pass(backend, direction, latents, monkeypatch):
    array = example_input(backend.spec, direction, 1, latents, seed=latents)
    whole = run_direction(backend, direction, array)
    lengths = recorded(backend, monkeypatch)
    assert_close(whole, run_direction(Autoencoder(backend, 64), direction, array), LEAST_DB)
    assert len(lengths) >= 5
    assert max(lengths) == 64


@each_direction
@pytest.mark.parametrize("latents", [1, 2, 13, 30])
def test_smallest_windows_equal_one_pass(backend, direction, latents):
    array = example_input(backend.spec, direction, 2, latents, seed=latents)
    # The decoder's smallest window suits the encoder too, whose context is not wider.
    window = smallest_window(backend.spec, "decoder")
    assert_close(
        run_direction(backend, direction, array),
        run_direction(Autoencoder(backend, window), direction, array),
        LEAST_DB,
    )


@each_direction
def test_default_window_bounds_the_memory(backend, direction, monkeypatch):
    array = example_input(backend.spec, direction, 1, 600, seed=0)
    lengths = recorded(backend, monkeypatch)
    run_direction(Autoencoder(backend), direction, array)
    assert max(lengths) <= 128
    assert sum(lengths) <= 600 * 1.2


def test_window_without_room(backend):
    with pytest.raises(InputError, match=r"a window of 1 latents .*; pass a multiple of") as caught:
        AutoencoderModel(backend, window=1)
    assert_one_line(caught.value)


def test_window_that_is_advised_suits_both_directions(backend):
    least = max(smallest_window(backend.spec, direction) for direction in backend.spec.contexts)
    for window in range(1, least):
        with pytest.raises(InputError, match=f"pass a multiple of {backend.spec.alignment} from {least}$"):
            AutoencoderModel(backend, window=window)
    AutoencoderModel(backend, window=least)


@pytest.mark.parametrize("window", [0, -64, 64.0, "64", True], ids=repr)
def test_windows_that_are_no_size(window):
    with pytest.raises(InputError, match="window"):
        AutoencoderModel(FakeBackend(), window=window)


# --- Signatures --------------------------------------------------------------------------------------------

SAMPLES = 2 * HOP + 100
CLIP = noise((3, SAMPLES))


@pytest.fixture(scope="module", params=KINDS)
def onnx_model(model_of, request):
    """Return each model on ONNX Runtime only: how an array is prepared does not depend on the backend."""
    return model_of(request.param, "onnxruntime")


def as_batch(*clips):
    """Return stereo clips of any length as a padded batch."""
    longest = HOP * math.ceil(max(clip.shape[-1] for clip in clips) / HOP)
    return np.stack([np.pad(clip, ((0, 0), (0, longest - clip.shape[-1]))) for clip in clips])


# Arguments of encode(): the audio, its rate, and the same audio as stereo clips at the model's rate.
SIGNATURES = {
    "[2, n]": (CLIP[:2], RATE, [CLIP[:2]]),
    "[1, n], doubled": (CLIP[:1], RATE, [CLIP[[0, 0]]]),
    "[n], doubled": (CLIP[0], RATE, [CLIP[[0, 0]]]),
    "[3, n], the first two": (CLIP, RATE, [CLIP[:2]]),
    "[1, 2, n]": (CLIP[None, :2], RATE, [CLIP[:2]]),
    "[3, 1, n]": (CLIP[:, None], RATE, [CLIP[[0, 0]], CLIP[[1, 1]], CLIP[[2, 2]]]),
    "batch, a rate each": (CLIP[:2, None], [RATE, RATE], [CLIP[[0, 0]], CLIP[[1, 1]]]),
    "list": ([CLIP[:2]], RATE, [CLIP[:2]]),
    "list of lengths, a rate each": ([CLIP[0], CLIP[1:, :99]], (RATE, RATE), [CLIP[[0, 0]], CLIP[1:, :99]]),
    "tuple, one rate": ((CLIP[0, :HOP], CLIP[:2, :1]), RATE, [CLIP[[0, 0], :HOP], CLIP[:2, :1]]),
    "one sample": (CLIP[:2, :1], RATE, [CLIP[:2, :1]]),
}


@pytest.mark.parametrize("signature", SIGNATURES)
def test_signatures(onnx_model, signature):
    audio, rate, clips = SIGNATURES[signature]
    prepared = as_batch(*clips)
    latents = onnx_model.encode(audio, rate)
    assert latents.shape == (len(clips), 32, prepared.shape[-1] // HOP)
    assert_close(onnx_model.autoencoder.encode_audio(prepared), latents, LEAST_DB)


def test_rates_of_a_list(onnx_model):
    clips, rates = [noise(30_000, 1), noise((2, 9000), 2)], [48_000, 22_050]
    together = onnx_model.encode(clips, rates)
    assert together.shape[-1] == math.ceil(30_000 * 441 / 480 / HOP)
    # The first is the longest: its latents do not depend on the second's.
    assert_close(onnx_model.encode(clips[0], rates[0])[0], together[0], LEAST_DB)


# One rate in the types that scripts for the reference pass: torchaudio takes whole numbers of any type.
ONE_RATE = {
    "int": 48_000,
    "float": 48_000.0,
    "NumPy int64": np.int64(48_000),
    "NumPy int32": np.int32(48_000),
    "NumPy float32": np.float32(48_000),
    "NumPy, 0-d": np.array(48_000),
    "tensor, 0-d": torch.tensor(48_000),
    "tensor of floats, 0-d": torch.tensor(48_000.0),
}


@pytest.mark.parametrize("form", ONE_RATE)
def test_rates_of_any_type(onnx_model, form):
    rate, clip, inner = ONE_RATE[form], CLIP[:2], onnx_model.autoencoder
    expected = onnx_model.encode(clip, 48_000)
    assert np.array_equal(onnx_model.encode(clip, rate), expected)
    assert np.array_equal(onnx_model.encode(clip[None], [rate]), expected)
    assert np.array_equal(onnx_model.encode([clip, clip], rate)[1:], expected)
    assert np.array_equal(onnx_model.encode([clip, clip], (rate, 48_000))[1:], expected)
    prepared = inner.preprocess_audio_for_encoder(clip, 48_000)
    assert np.array_equal(inner.preprocess_audio_for_encoder(clip, rate), prepared)
    assert np.array_equal(inner.preprocess_audio_list_for_encoder([clip], [rate]), prepared)
    stream = onnx_model.stream_encoder(rate)
    stream.push(clip)
    assert_close(expected[0], stream.finish(), LEAST_DB)


@pytest.mark.parametrize(
    "rates", [np.array([RATE, 48_000]), torch.tensor([RATE, 48_000]), torch.tensor([RATE, 48_000.0])], ids=repr
)
def test_rates_of_arrays(onnx_model, rates):
    clips = [CLIP[:2], CLIP[1:, :9000]]
    expected = onnx_model.encode(clips, [RATE, 48_000])
    assert np.array_equal(onnx_model.encode(clips, rates), expected)
    prepared = onnx_model.autoencoder.preprocess_audio_list_for_encoder(clips, rates)
    assert np.array_equal(onnx_model.autoencoder.encode_audio(prepared), expected)
    with pytest.raises(InputError, match="3 clips and 2 sample rates; "):
        onnx_model.encode([*clips, CLIP], rates)


@pytest.mark.parametrize(
    "audio", [CLIP[0], CLIP[:2], CLIP[None, :2], [CLIP[:2]]], ids=["[n]", "[2, n]", "batch", "list"]
)
@pytest.mark.parametrize(
    "rate",
    [
        *(44_100.5, None, "44100", 0, -RATE, [RATE] * 3, [], math.nan, math.inf, True, np.float32(0.5), 44_100j),
        *([None], ["44100"], [[RATE]], np.array([[RATE]]), torch.tensor([[RATE]]), torch.tensor([RATE] * 3)),
        *(torch.tensor(44_100.5), torch.tensor(math.nan), torch.empty((), device="meta"), torch.empty(0)),
    ],
    ids=repr,
)
def test_rates_that_are_none(audio, rate):
    with pytest.raises(InputError, match="rate") as caught:
        AutoencoderModel(FakeBackend()).encode(audio, rate)
    assert_one_line(caught.value)


@pytest.mark.parametrize("rate", [44_100.5, None, "44100", [RATE, RATE], torch.tensor([RATE, RATE])], ids=repr)
def test_streams_of_rates_that_are_none(rate):
    with pytest.raises(InputError, match="rate"):
        AutoencoderModel(FakeBackend()).stream_encoder(rate)


def test_audio_of_one_latent_too_little(onnx_model):
    padded = np.pad(CLIP[:2], ((0, 0), (0, 3 * HOP - SAMPLES)))
    assert_close(onnx_model.autoencoder.encode_audio(padded[None]), onnx_model.encode(CLIP[:2], RATE), LEAST_DB)
    assert_close(
        onnx_model.autoencoder.encode_audio(padded[None]), onnx_model.autoencoder.encode_audio(CLIP[None, :2]), LEAST_DB
    )


def test_preparation_of_one_clip(onnx_model):
    inner = onnx_model.autoencoder
    ready = inner.preprocess_audio_for_encoder(CLIP[0], RATE)
    assert ready.shape == (1, 2, 3 * HOP)
    assert np.array_equal(ready[0, :, :SAMPLES], CLIP[[0, 0]])
    assert not ready[..., SAMPLES:].any()


def test_facts(onnx_model):
    model, inner = onnx_model, onnx_model.autoencoder
    assert (model.sample_rate, model.downsampling_ratio, model.latent_dim, model.device) == (RATE, HOP, 32, "cpu")
    assert (inner.sample_rate, inner.downsampling_ratio, inner.latent_dim) == (RATE, HOP, 32)
    assert (inner.io_channels, inner.min_length) == (2, HOP)
    assert model.spec.latents(441_000) == 108


# --- NumPy and PyTorch -------------------------------------------------------------------------------------

ACCEPTED = {
    "float64": lambda array: array.astype(np.float64),
    "big-endian": lambda array: array.astype(">f4"),
    "Fortran order": np.asfortranarray,
    "reversed": lambda array: array[..., ::-1].copy()[..., ::-1],
    "every second": lambda array: np.repeat(array, 2, axis=-1)[..., ::2],
    "tensor": torch.from_numpy,
    "float64 tensor": lambda array: torch.from_numpy(array).double(),
    "transposed tensor": lambda array: torch.from_numpy(array).transpose(0, 1).contiguous().transpose(0, 1),
    "tensor with a gradient": lambda array: torch.from_numpy(array).requires_grad_(),
}
COARSE = {
    "float16": lambda array: array.astype(np.float16),
    "float16 tensor": lambda array: torch.from_numpy(array).half(),
    "bfloat16 tensor": lambda array: torch.from_numpy(array).bfloat16(),
}


@pytest.mark.parametrize("form", [*ACCEPTED, *COARSE])
def test_same_kind_comes_back(onnx_model, form):
    convert, least_db = (ACCEPTED[form], LEAST_DB) if form in ACCEPTED else (COARSE[form], 30)
    latents, audio = noise((2, 32, 5), level=1), noise((2, HOP))
    for method, array in ((onnx_model.decode, latents), (lambda clip: onnx_model.encode(clip, RATE), audio)):
        given = convert(array)
        output = method(given)
        assert type(output) is type(given)
        if isinstance(output, torch.Tensor):
            assert output.device.type == "cpu"
            assert not output.requires_grad
            output = output.numpy()
        assert_close(method(array), output, least_db)


@pytest.mark.parametrize(("torch_has_cuda", "places"), [(True, ["cuda:1"] * 3), (False, [torch.device("cpu")] * 3)])
def test_tensors_return_to_the_gpu_that_was_chosen(monkeypatch, torch_has_cuda, places):
    asked = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: torch_has_cuda)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, place: asked.append(place) or self)
    backend = FakeBackend()
    backend.device, backend.device_id = "cuda", 1
    model = AutoencoderModel(backend)
    model.encode(torch.zeros(2, 80), RATE)
    model.decode(torch.zeros(1, 4, 3))
    assert asked == places
    assert model.device == "cuda:1"
    backend.device_id = 0
    assert model.device == "cuda"


def test_prepared_audio_is_of_the_same_kind(onnx_model):
    tensor = torch.from_numpy(CLIP[:2])
    ready = onnx_model.autoencoder.preprocess_audio_list_for_encoder([tensor, tensor[:1]], RATE)
    assert isinstance(ready, torch.Tensor)
    assert ready.shape == (2, 2, 3 * HOP)
    assert isinstance(onnx_model.autoencoder.encode_audio(ready), torch.Tensor)
    assert isinstance(onnx_model.encode([tensor], RATE), torch.Tensor)


@pytest.mark.parametrize(
    ("device", "opened"),
    [
        (None, (None, 0)),
        ("cpu", ("cpu", 0)),
        ("cuda", ("cuda", 0)),
        ("cuda:1", ("cuda", 1)),
        (torch.device("cpu"), ("cpu", 0)),
        (torch.device("cpu:0"), ("cpu", 0)),
        (torch.device("cuda"), ("cuda", 0)),
        (torch.device("cuda", 3), ("cuda", 3)),
    ],
    ids=str,
)
def test_device_as_pytorch_names_it(monkeypatch, device, opened):
    monkeypatch.setattr("samekit.model.open_backend", lambda *arguments: asked.append(arguments[2]) or FakeBackend())
    asked = []
    AutoencoderModel.from_pretrained("same-s", device)
    AutoencoderModel.from_pretrained("same-s", device, device_id=opened[1])
    assert [(options.device, options.device_id) for options in asked] == [opened] * 2


@pytest.mark.parametrize(
    "device", ["mps", "cuda:", "cuda:x", "cuda:-1", f"cuda:{10**20}", torch.device("meta"), 0, "tpu:1"], ids=str
)
def test_device_that_is_none(device):
    with pytest.raises(InputError, match="is not supported; choose one of cpu, cuda") as caught:
        AutoencoderModel.from_pretrained("same-s", device)
    assert_one_line(caught.value)


@pytest.mark.parametrize("device_id", [2, True, 1.0, np.array([1, 2])], ids=str)
def test_two_gpus_for_one_model(device_id):
    with pytest.raises(InputError, match=r"device cuda:1 and device_id .* differ; pass one of them"):
        AutoencoderModel.from_pretrained("same-s", "cuda:1", device_id=device_id)


@pytest.mark.parametrize("layout", ["to_sparse", "to_mkldnn", "conj", "_neg_view", "double"])
def test_tensors_of_any_layout(onnx_model, layout):
    z = torch.from_numpy(noise((1, 32, 6), level=1))
    expected = onnx_model.decode(-z if layout == "_neg_view" else z)
    assert_close(expected.numpy(), onnx_model.decode(getattr(z, layout)()).numpy(), LEAST_DB)


def test_pytorch_that_another_thread_is_importing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    assert isinstance(AutoencoderModel(FakeBackend()).decode(np.zeros((1, 4, 3), np.float32)), np.ndarray)


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_tensors_without_values(onnx_model, method):
    tensor = torch.zeros(1, 32, 8, device="meta")
    with pytest.raises(InputError, match=r"cannot be read from this tensor \(.*\); pass a dense one") as caught:
        onnx_model.decode(tensor) if method == "decode" else onnx_model.encode(tensor[0, :2], RATE)
    assert_one_line(caught.value)


NO_FLOATS = "; pass them as float32"
# Values that encode() and decode() refuse, and a part of the message; two where the messages differ.
REFUSED = {
    "int16": (np.zeros((1, 32, 5), np.int16), "; divide by 32768 first", NO_FLOATS),
    "int32": (np.zeros((1, 32, 5), np.int32), "; divide by 2147483648 first", NO_FLOATS),
    "int16 tensor": (torch.zeros((1, 32, 5), dtype=torch.int16), "; divide by 32768 first", NO_FLOATS),
    "uint8": (np.zeros((1, 32, 5), np.uint8), "; convert it to float32, subtract 128, then divide by it", NO_FLOATS),
    "bool": (np.zeros((1, 32, 5), bool), "; convert it first", NO_FLOATS),
    "complex": (np.zeros((1, 32, 5), np.complex64), "; convert it first", NO_FLOATS),
    "text": ("song.wav", "NumPy array or a PyTorch tensor"),
    "None": (None, "NumPy array or a PyTorch tensor"),
    "NaN": (np.full((1, 32, 5), np.nan, np.float32), "holds NaN"),
    "infinity": (np.full((1, 32, 5), np.inf, np.float32), "infinity"),
    "beyond float32": (np.full((1, 32, 5), 1e39), "beyond float32"),
    "masked": (np.ma.masked_equal(np.arange(160, dtype=np.float32).reshape(1, 32, 5), 7), "pass array.filled"),
    "empty": (np.zeros((1, 32, 0), np.float32), "is empty"),
    "rank 0": (np.array(0.5), "must be .*, got"),
    "rank 0 tensor": (torch.tensor(0.5), "must be .*, got"),
    "rank 4": (np.zeros((1, 1, 32, 5), np.float32), "must be"),
}


@pytest.mark.parametrize("cause", REFUSED)
def test_arrays_that_cannot_be_used(cause):
    value, *matches = REFUSED[cause]
    model = AutoencoderModel(FakeBackend())
    calls = (lambda: model.encode(value, RATE), lambda: model.decode(value))
    for call, match in zip(calls, (matches[0], matches[-1]), strict=True):
        with pytest.raises(InputError, match=match) as caught:
            call()
        assert_one_line(caught.value)
    assert model.autoencoder.backend.calls == []


def test_shapes_that_do_not_fit_the_model():
    model = AutoencoderModel(FakeBackend())
    for shape in ((1, 5, 7), (4, 7), (7,)):
        with pytest.raises(InputError, match=r"latents must be \[batch, 4, length\]"):
            model.decode(np.zeros(shape, np.float32))
    for shape in ((1, 3, 8), (2, 8), (8,)):
        with pytest.raises(InputError, match=r"audio must be \[batch, 2, length\]"):
            model.autoencoder.encode_audio(np.zeros(shape, np.float32))
    for transposed in (np.zeros((1025, 2), np.float32), np.zeros((100, 2), np.float32), [torch.zeros((264_600, 2))]):
        with pytest.raises(
            InputError, match=r"audio has \d+ channels; pass \[channels, samples\], such as waveform\.T"
        ):
            model.encode(transposed, RATE)
    with pytest.raises(InputError, match="audio has 1000 channels"):
        model.stream_encoder(RATE).push(np.zeros((1000, 2), np.float32))
    with pytest.raises(InputError, match=r"audio must be .* it is a path; pass files to encode_file"):
        model.encode("song.flac", RATE)
    with pytest.raises(InputError, match="0 clips"):
        model.encode([], RATE)
    with pytest.raises(InputError, match="pass 0 <= overlap < chunk_size"):
        model.decode(np.zeros((1, 4, 300), np.float32), chunked=True, chunk_size=32, overlap=32)
    assert model.autoencoder.backend.calls == []


def test_files_of_many_channels_may_end_in_short_blocks(tmp_path):
    """More channels than samples are refused in arrays only."""
    sf.write(tmp_path / "song.wav", noise((19, 80)), RATE, subtype="FLOAT")
    # Blocks of eight samples a channel.
    with mock.patch("samekit.audio.reader._BLOCK_VALUES", 8 * 80):
        written = AutoencoderModel(FakeBackend()).encode_file(tmp_path / "song.wav", tmp_path / "song.npy")
    assert written["samples"] == 19


def test_chunked_runs_the_references_chunks():
    model = AutoencoderModel(FakeBackend())
    assert model.decode(np.zeros((1, 4, 300), np.float32), chunked=True).shape == (1, 2, 2400)
    # Starts 0, 96, 172 (anchored): 128 latents each, by default.
    assert model.autoencoder.backend.calls == [128, 128, 128]


# --- Opening and closing -----------------------------------------------------------------------------------


def test_from_pretrained(engine_of, checkpoint_of, monkeypatch):
    folder = engine_of("tiny-s").folder
    latents = noise((1, 32, 3))
    with AutoencoderModel.from_pretrained(folder, "cpu") as by_folder:
        expected = by_folder.decode(latents)
        assert by_folder.autoencoder.backend.name == "onnxruntime"
    monkeypatch.setenv("SAMEKIT_CACHE", str(folder.parent))
    with AutoencoderModel.from_pretrained("tiny-s", backend="onnxruntime", threads=1, window=8) as by_name:
        assert_close(expected, by_name.decode(latents), LEAST_DB)
    with AutoencoderModel.from_pretrained(checkpoint_of("tiny-s"), backend="torch") as checkpoint:
        assert_close(expected, checkpoint.decode(latents), 100)


def test_from_pretrained_with_options_that_are_none(engine_of):
    with pytest.raises(InputError, match=r"option 'colour'; choose one of backend, window, .*device, .*threads"):
        AutoencoderModel.from_pretrained(engine_of("tiny-s").folder, colour="red")
    with pytest.raises(EngineNotFoundError, match="samekit export"):
        AutoencoderModel.from_pretrained("nowhere", backend="onnxruntime")


def test_random_weights_are_told_of_once(own_engine, caplog):
    path = own_engine.folder / "spec.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    # Other tests have opened it in this process.
    _warn_of_random_weights.cache_clear()
    for _ in range(2):
        AutoencoderModel.from_pretrained(own_engine.folder, "cpu", backend="onnxruntime")
    assert caplog.messages == ["tiny-s has random weights: good for tests and speed only"]
    caplog.clear()
    moved = own_engine.folder.rename(own_engine.folder.with_name("published"))
    source = {"kind": "hub", "name": "stabilityai/SAME-S"}
    (moved / "spec.json").write_text(json.dumps(document | {"source": source}), encoding="utf-8")
    AutoencoderModel.from_pretrained(moved, "cpu", backend="onnxruntime")
    assert caplog.messages == []


def test_closing_closes_the_backend(monkeypatch):
    backend, closed = FakeBackend(), []
    monkeypatch.setattr(backend, "close", lambda: closed.append(True))
    with pytest.raises(KeyError), AutoencoderModel(backend):
        raise KeyError
    assert closed == [True]


# --- Files -------------------------------------------------------------------------------------------------

FILE_SAMPLES = 70 * HOP + 1234


@pytest.fixture
def folder(tmp_path):
    """Return an empty folder for outputs."""
    path = tmp_path / "out"
    path.mkdir()
    return path


def write_wav(path, samples=FILE_SAMPLES, rate=RATE, channels=2):
    sf.write(path, noise((samples, channels), seed=5, level=0.1), rate, "FLOAT")
    return path


def test_encode_file(model, tmp_path, folder):
    song, seen = write_wav(tmp_path / "song.wav"), []
    metadata = model.encode_file(song, folder / "song.npy", seen.append)
    clip, _ = read_audio(song)
    assert_close(model.encode(clip, RATE)[0], np.load(folder / "song.npy", allow_pickle=False), LEAST_DB)
    assert json.loads((folder / "song.json").read_text(encoding="utf-8")) == metadata
    assert metadata == {
        "model": model.spec.name,
        "model_sha256": model.spec.source_sha256,
        "precision": "fp32",
        "source": str(song),
        "decoder": f"libsndfile {sf.__libsndfile_version__}",
        "sample_rate": RATE,
        "samples": FILE_SAMPLES,
        "latents": 71,
    }
    assert sum(seen) == FILE_SAMPLES
    assert sorted(path.name for path in folder.iterdir()) == ["song.json", "song.npy"]


@pytest.mark.parametrize("text", ['{"title": "mine"}', "[1]", "no JSON"])
def test_metadata_of_something_else_are_not_replaced(onnx_model, tmp_path, folder, text):
    song = write_wav(tmp_path / "song.wav", 100)
    (folder / "song.json").write_text(text)
    with pytest.raises(OutputError, match=r"song.json: is of something else, and is not replaced; ") as caught:
        onnx_model.encode_file(song, folder / "song.npy")
    assert_one_line(caught.value)
    assert [path.name for path in folder.iterdir()] == ["song.json"]
    assert (folder / "song.json").read_text() == text
    (folder / "song.json").unlink()
    onnx_model.encode_file(song, folder / "song.npy")
    onnx_model.encode_file(song, folder / "song.npy")


def test_encode_file_at_another_rate(onnx_model, tmp_path, folder):
    song = write_wav(tmp_path / "song.wav", 100_001, 48_000, channels=1)
    metadata = onnx_model.encode_file(song, folder / "song.npy")
    clip, _ = read_audio(song)
    assert_close(onnx_model.encode(clip, 48_000)[0], np.load(folder / "song.npy"), LEAST_DB)
    assert metadata["samples"] == math.ceil(100_001 * 441 / 480)


@pytest.mark.parametrize("samples", [1, HOP - 1, HOP, HOP + 1, 64 * HOP, FILE_SAMPLES])
def test_decoded_file_has_the_exact_length(onnx_model, tmp_path, folder, samples):
    song = write_wav(tmp_path / "song.wav", samples)
    onnx_model.encode_file(song, folder / "song.npy")
    seen = []
    assert onnx_model.decode_file(folder / "song.npy", folder / "song.wav", "FLOAT", progress=seen.append) == samples
    decoded, rate = read_audio(folder / "song.wav")
    latents = np.load(folder / "song.npy")
    assert rate == RATE
    assert_close(onnx_model.decode(latents[None])[0, :, :samples], decoded, LEAST_DB)
    assert sum(seen) == latents.shape[-1]


@pytest.mark.parametrize("order", ["C", "F"])
def test_latents_that_others_saved(model, tmp_path, folder, order):
    latents = noise((32, 9), level=1)
    np.save(tmp_path / "song.npy", np.asarray(latents, order=order))
    assert model.decode_file(tmp_path / "song.npy", folder / "song.wav", "FLOAT") == 9 * HOP
    assert_close(model.decode(latents[None])[0], read_audio(folder / "song.wav")[0], LEAST_DB)


def test_latents_of_another_model(model_of, tmp_path, folder):
    song = write_wav(tmp_path / "song.wav", 9000)
    model_of("tiny-s", "onnxruntime").encode_file(song, tmp_path / "song.npy")
    # The backend may be another one.
    assert model_of("tiny-s", "torch").decode_file(tmp_path / "song.npy", folder / "song.wav") == 9000
    (folder / "song.wav").unlink()
    with pytest.raises(LatentsFileError, match=r"another model \(tiny-s\), not of this tiny-l") as caught:
        model_of("tiny-l", "onnxruntime").decode_file(tmp_path / "song.npy", folder / "song.wav")
    assert_one_line(caught.value)
    assert list(folder.iterdir()) == []


# The working folder and the names of the recording and of its latents when it is encoded; the working folder and the
# name of the output when they are decoded. The output is the recording each time.
ONTO_THE_RECORDING = {
    "side by side": (".", "song.wav", "song.npy", ".", "song.wav"),
    "absolute when encoded": (".", "{root}/song.wav", "latents/song.npy", "latents", "../song.wav"),
    "another working folder": ("music", "song.wav", "../latents/song.npy", "music", "song.wav"),
    "decoded beside the latents": ("latents", "../song.wav", "song.npy", "latents", "../song.wav"),
    "decoded from above": ("music", "song.wav", "song.npy", ".", "music/song.wav"),
    "decoded from below": (".", "music/song.wav", "latents/song.npy", "latents", "../music/song.wav"),
    "a symbolic link to it": (".", "song.wav", "song.npy", ".", "symbolic.wav"),
    "a hard link to it": (".", "song.wav", "song.npy", ".", "hard.wav"),
}


@pytest.mark.parametrize("case", ONTO_THE_RECORDING)
def test_recordings_are_not_decoded_onto(tmp_path, monkeypatch, case):
    model = AutoencoderModel(FakeBackend())
    encoded_in, source, latents, decoded_in, output = ONTO_THE_RECORDING[case]
    for name in ("music", "latents"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / encoded_in)
    source = source.format(root=tmp_path)
    write_wav(source, 1000)
    model.encode_file(source, latents)
    latents, recording = Path(latents).resolve(), Path(source).resolve()
    before = recording.read_bytes()
    monkeypatch.chdir(tmp_path / decoded_in)
    if "link" in case:
        Path("symbolic.wav").symlink_to("song.wav")
        os.link("song.wav", "hard.wav")
    with pytest.raises(
        OutputError, match=r"is the recording that .*song.json names as the source .*; .*force"
    ) as caught:
        model.decode_file(os.path.relpath(latents), output)
    assert_one_line(caught.value)
    assert recording.read_bytes() == before
    # Another name is written, and with `force` the recording's name too.
    assert model.decode_file(latents, "decoded.wav") == model.decode_file(latents, "decoded.wav") == 1000
    assert model.decode_file(latents, output, force=True) == 1000
    assert Path(output).read_bytes() != before


@pytest.mark.parametrize("field", ["source", "path"])
@pytest.mark.parametrize("name", ["song.wav", "SONG.WAV"])
def test_what_may_be_a_recording_is_not_decoded_onto(tmp_path, field, name):
    """The output has the name of a recording that is not where the `.json` says."""
    model = AutoencoderModel(FakeBackend())
    np.save(tmp_path / "song.npy", noise((4, 10)))
    (tmp_path / "song.json").write_text(json.dumps({field: "/nowhere/song.wav"}), encoding="utf-8")
    (tmp_path / name).write_bytes(b"a recording")
    with pytest.raises(OutputError, match=r"may be the recording .*; .*force=True") as caught:
        model.decode_file(tmp_path / "song.npy", tmp_path / name)
    assert_one_line(caught.value)
    assert (tmp_path / name).read_bytes() == b"a recording"
    assert model.decode_file(tmp_path / "song.npy", tmp_path / name, force=True) == 80
    (tmp_path / "other.wav").write_bytes(b"an older output")
    assert model.decode_file(tmp_path / "song.npy", tmp_path / "other.wav") == 80


def test_outputs_are_decoded_again(tmp_path, monkeypatch):
    """An earlier output is replaced: one with the recording's name in another folder, and one without a recording."""
    model = AutoencoderModel(FakeBackend())
    for name in ("music", "out"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "music")
    write_wav("song.wav", 1000)
    model.encode_file("song.wav", "song.npy")
    np.save("generated.npy", noise((4, 10)))
    monkeypatch.chdir(tmp_path / "out")
    for _ in range(2):
        assert model.decode_file("../music/song.npy", "song.wav") == 1000
        assert model.decode_file("../music/generated.npy", "generated.wav") == 80


def test_recordings_of_latents_behind_a_link_are_not_decoded_onto(tmp_path):
    model = AutoencoderModel(FakeBackend())
    write_wav(tmp_path / "song.wav", 1000)
    model.encode_file(tmp_path / "song.wav", tmp_path / "song.npy")
    (tmp_path / "link.npy").symlink_to("song.npy")
    before = (tmp_path / "song.wav").read_bytes()
    with pytest.raises(OutputError, match=r"is the recording that .*"):
        model.decode_file(tmp_path / "link.npy", tmp_path / "song.wav")
    assert (tmp_path / "song.wav").read_bytes() == before
    # The exact length is in the same .json.
    assert model.decode_file(tmp_path / "link.npy", tmp_path / "other.wav") == 1000


@pytest.mark.parametrize("source", [None, 3, "", "a\0b", "x" * 5000, "../" * 2000 + "song.wav", ["song.wav"]], ids=repr)
def test_sources_that_name_nothing(tmp_path, source):
    model = AutoencoderModel(FakeBackend())
    np.save(tmp_path / "song.npy", noise((4, 10)))
    (tmp_path / "song.json").write_text(json.dumps({"source": source}), encoding="utf-8")
    for _ in range(2):
        assert model.decode_file(tmp_path / "song.npy", tmp_path / "other.wav") == 80


def test_files_are_not_their_own_output(tmp_path):
    model = AutoencoderModel(FakeBackend())
    write_wav(tmp_path / "song.wav", 1000)
    # AudioReader does not depend on the suffix.
    (tmp_path / "song.wav").rename(tmp_path / "audio.npy")
    (tmp_path / "link.npy").symlink_to("audio.npy")
    np.save(tmp_path / "latents.npy", noise((4, 10)))
    (tmp_path / "latents.npy").rename(tmp_path / "latents.wav")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for work, source, output in (
        (model.encode_file, "audio.npy", "audio.npy"),
        (model.encode_file, "audio.npy", "link.npy"),
        (model.decode_file, "latents.wav", "latents.wav"),
    ):
        with pytest.raises(OutputError, match=r"is the input itself; choose another name") as caught:
            work(tmp_path / source, tmp_path / output)
        assert_one_line(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("samples", [1, 3 * HOP, -5, "9000", 9000.0, None], ids=repr)
def test_length_that_does_not_fit_the_latents(onnx_model, tmp_path, folder, samples):
    np.save(tmp_path / "song.npy", noise((32, 5)))
    (tmp_path / "song.json").write_text(json.dumps({"samples": samples}), encoding="utf-8")
    with pytest.raises(LatentsFileError, match=r"holds 5 latents, but .* says .* samples; encode again"):
        onnx_model.decode_file(tmp_path / "song.npy", folder / "song.wav")
    assert list(folder.iterdir()) == []


def fail_on_call(backend, monkeypatch, number):
    """Let a backend fail from call `number` on, counted from 0; return the list of its calls."""
    run, calls = backend._run, []

    def fail(direction, array):
        calls.append(direction)
        if len(calls) > number:
            raise BackendError("the power went out; try again")
        return run(direction, array)

    monkeypatch.setattr(backend, "_run", fail)
    return calls


def test_encoding_that_fails_midway(onnx_model, tmp_path, folder, monkeypatch):
    song = write_wav(tmp_path / "song.wav", 300 * HOP)
    onnx_model.encode_file(write_wav(tmp_path / "short.wav", HOP), folder / "song.npy")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    calls = fail_on_call(onnx_model.autoencoder.backend, monkeypatch, 1)
    for target in ("song.npy", "new.npy"):
        calls.clear()
        with pytest.raises(BackendError, match="the power went out"):
            onnx_model.encode_file(song, folder / target)
        assert len(calls) == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("number", [0, 1])
def test_decoding_that_fails_midway(onnx_model, tmp_path, folder, monkeypatch, number):
    np.save(tmp_path / "song.npy", noise((32, 300)))
    calls = fail_on_call(onnx_model.autoencoder.backend, monkeypatch, number)
    with pytest.raises(BackendError, match="the power went out"):
        onnx_model.decode_file(tmp_path / "song.npy", folder / "song.wav")
    assert len(calls) == number + 1
    assert list(folder.iterdir()) == []


def test_audio_that_turns_bad_midway(onnx_model, tmp_path, folder):
    samples = noise((300 * HOP, 2))
    samples[-1, 0] = np.nan
    sf.write(tmp_path / "song.wav", samples, RATE, "FLOAT")
    with pytest.raises(AudioFileError, match="NaN"):
        onnx_model.encode_file(tmp_path / "song.wav", folder / "song.npy")
    assert list(folder.iterdir()) == []


def test_outputs_that_cannot_be_written(onnx_model, tmp_path, folder):
    song = write_wav(tmp_path / "song.wav", HOP)
    np.save(tmp_path / "song.npy", noise((32, 5)))
    with pytest.raises(OutputError, match="nowhere"):
        onnx_model.encode_file(song, folder / "nowhere" / "song.npy")
    with pytest.raises(OutputError, match="nowhere"):
        onnx_model.decode_file(tmp_path / "song.npy", folder / "nowhere" / "song.wav")
    with pytest.raises(InputError, match=r"use \.npy"):
        onnx_model.encode_file(song, folder / "song.pt")
    with pytest.raises(InputError, match=r"use \.wav or \.flac"):
        onnx_model.decode_file(tmp_path / "song.npy", folder / "song.mp3")
    assert list(folder.iterdir()) == []
