"""Windows of several lengths in one batch: padded with zeros only where that changes no latent that is kept."""

from __future__ import annotations

import math

import numpy as np
import pytest
from faults import contents
from helpers import DIRECTIONS, HOP, KINDS, FakeBackend, assert_close, smallest_window
from test_dataset import EXACT_DB, FAKE_HOP, first_samples, one_pass, pair, prepared, run, write_clip

from samekit import AutoencoderModel
from samekit.backends.base import Backend
from samekit.dataset.clip import CuttingRules
from samekit.dataset.options import CutOptions, PreEncodeOptions
from samekit.dataset.run import pre_encode
from samekit.engine.spec import ENCODER
from samekit.errors import NonFiniteError
from samekit.windows import ExactWindows, Window

LENGTHS = (1, 2, 3, 4, 5, 12, 13, 14, 15, 25, 26, 27, 28, 29, 38, 39, 40, 41, 50)


@pytest.fixture
def batches(monkeypatch):
    """Let every backend take windows of several lengths, as on a GPU; return the lengths in each batch, in latents."""
    found = []
    submit = Backend.submit

    def record(self, direction, pieces):
        found.append([piece.shape[-1] // self.spec.hop for piece in pieces])
        return submit(self, direction, pieces)

    monkeypatch.setattr(Backend, "padding", 8)
    monkeypatch.setattr(Backend, "submit", record)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("limit", "options"),
    [(3, {}), (40, {}), (41, {"pad": True}), (40, {"full": True}), (41, {"full": True, "pad": True})],
)
def test_latents_are_those_of_the_definition(model_of, batches, data, out, kind, limit, options):
    backend = model_of(kind, "onnxruntime").autoencoder.backend
    # With small windows, the last window of a clip can be padded beyond `sample_size`.
    window = max(smallest_window(backend.spec, direction) for direction in DIRECTIONS)
    model = AutoencoderModel(backend, window)
    for latents in LENGTHS:
        write_clip(data / f"{latents:02d}.wav", latents * HOP - 1000, seed=latents)
    run(data, out, model, sample_size=limit * HOP, batch_size=200, **options)
    for number in range(len(LENGTHS)):
        latents, metadata = pair(out, number)
        audio = prepared(metadata["path"])
        whole = "full" in options and audio.shape[1] > limit * HOP
        if not whole:
            audio = audio[:, : limit * HOP]
        own = math.ceil(audio.shape[1] / HOP)
        end = own + 64 if whole or ("full" in options and "pad" not in options) else limit
        kept = limit if "pad" in options and not whole else own
        assert_close(one_pass(model, audio, end)[:, :kept], latents, EXACT_DB)
    mixed = [lengths for lengths in batches if len(set(lengths)) > 1]
    assert all(max(lengths) - min(lengths) <= 8 for lengths in mixed)
    assert mixed or limit != 40


def test_fewer_batches(batches, data, out):
    for latents in range(1, 60):
        write_clip(data / f"{latents:02d}.wav", latents * FAKE_HOP, seed=latents)
    run(data, out, batch_size=8)
    assert len(batches) <= 12
    assert max(map(len, batches)) == 8


@pytest.mark.parametrize("most_pending", [2, 3])
def test_results_that_are_pending(data, out, monkeypatch, most_pending):
    """The order of results does not change, and a clip that fails takes no other with it."""
    monkeypatch.setattr(FakeBackend, "most_pending", most_pending)
    for number in range(8):
        write_clip(data / f"{number}.wav", (1 + 90 * number) * FAKE_HOP, seed=number)
    start = prepared(data / "5.wav")[0, 0]

    def answer(direction, array):
        if (array[:, 0, 0] == start).any():
            raise NonFiniteError("the encoder produced NaN; use fp32")
        return first_samples(direction, array)

    report = run(data, out, AutoencoderModel(FakeBackend(answer)), batch_size=3)
    assert report.statuses == {"encoded": 7, "failed": 1}
    assert run(data, out.with_name("alone")).encoded == 8
    fine, whole = contents(out), contents(out.with_name("alone"))
    assert all(fine[f"{n:012d}.npy"] == whole[f"{n:012d}.npy"] for n in (0, 1, 2, 3, 4, 6, 7))


@pytest.mark.parametrize("options", [{}, {"target_latent_rms": 0.5}], ids=str)
def test_clip_whose_pending_windows_all_fail_is_reported_once(data, out, monkeypatch, options):
    monkeypatch.setattr(FakeBackend, "most_pending", 3)
    for number in range(4):
        write_clip(data / f"{number}.wav", 4 * FAKE_HOP, seed=number)
    write_clip(data / "long.wav", 900 * FAKE_HOP)

    def answer(direction, array):
        if array.shape[-1] > 10 * FAKE_HOP:
            raise NonFiniteError("the encoder produced NaN; use fp32")
        return first_samples(direction, array)

    seen = []
    model = AutoencoderModel(FakeBackend(answer), 64)
    report = pre_encode(model, data, out, PreEncodeOptions(readers=1, **options), seen.append)
    assert report.statuses == {"encoded": 4, "failed": 1}
    assert [state.done for state in seen] == [1, 2, 3, 4, 5]


def test_windows_are_not_padded_on_a_cpu(data, out):
    assert FakeBackend().padding == 0
    model = AutoencoderModel(FakeBackend())
    for latents in range(1, 60):
        write_clip(data / f"{latents:02d}.wav", latents * FAKE_HOP, seed=latents)
    run(data, out, model, batch_size=8)
    assert sorted(set(model.autoencoder.backend.calls)) == sorted({2 * math.ceil((n + 1) / 2) for n in range(1, 60)})


@pytest.mark.parametrize(
    ("options", "samples", "room"),
    [
        # The clip, its context and zeros up to the limit of 20 latents, or to the size of a window.
        ({"sample_size": 20 * FAKE_HOP}, 5 * FAKE_HOP, 16),
        ({"sample_size": 10 * FAKE_HOP}, 5 * FAKE_HOP, 10),
        # The reference's zeros end where the sequence does.
        ({"sample_size": 8 * FAKE_HOP}, 7 * FAKE_HOP, 8),
        ({"sample_size": 7 * FAKE_HOP}, 7 * FAKE_HOP, 7),
        # A clip that is kept whole has no end of zeros.
        ({"sample_size": 7 * FAKE_HOP, "full": True}, 7 * FAKE_HOP, 16),
        ({"sample_size": 7 * FAKE_HOP, "full": True, "pad": True}, 7 * FAKE_HOP, 7),
        ({"sample_size": 5 * FAKE_HOP, "full": True, "pad": True}, 7 * FAKE_HOP, 16),
    ],
    ids=str,
)
def test_room_for_zeros(options, samples, room):
    spec = FakeBackend().spec
    rules = CuttingRules(spec, ExactWindows(16, spec.contexts[ENCODER], spec.alignment), CutOptions(**options))
    extent = rules.extent(samples)
    assert rules.room(Window(0, extent.sequence, 0, extent.computed), extent) == room
    # Another window than the last one.
    assert rules.room(Window(0, extent.sequence - 2, 0, extent.sequence - 3), extent) == extent.sequence - 2


def test_short_pieces_are_padded_at_the_end():
    def answer(direction, array):
        return np.ascontiguousarray(array.reshape(len(array), 2, -1, FAKE_HOP).sum(axis=3)[:, [0, 1, 0, 1]])

    backend = FakeBackend(answer)
    pieces = [np.ones((rows, 2, latents * FAKE_HOP), np.float32) for rows, latents in ((1, 2), (2, 5), (1, 1))]
    output = backend.submit(ENCODER, pieces)()
    assert output.shape == (4, 4, 5)
    expected = [[8, 8, 0, 0, 0], [8, 8, 8, 8, 8], [8, 8, 8, 8, 8], [8, 0, 0, 0, 0]]
    np.testing.assert_array_equal(output[:, 0], expected)
