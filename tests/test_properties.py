"""Properties that hold for all inputs: lengths, equality with a single pass, and the kind of the returned array.

They are tested for arrays, streams, files and datasets. `make test` runs each property on up to 60 examples,
`make test-slow` on up to 500.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from helpers import RATE, FakeBackend, noise
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from samekit import AutoencoderModel
from samekit.audio import prepare, read_audio
from samekit.dataset.check import verify
from samekit.dataset.options import PreEncodeOptions
from samekit.dataset.run import pre_encode
from samekit.engine.folder import find_engine
from samekit.engine.spec import DECODER, ENCODER
from samekit.errors import InputError, SamekitError
from samekit.files.latents import LatentsReader, LatentsWriter, read_latents
from samekit_export.checkpoint import load, load_source

HOP, WIDTH, CHANNELS = 8, 4, 2
FEW, MANY = 60, 500
DTYPES = ("float16", "float32", "float64")


def neighbour_sums(direction, array):
    """Compute a function of each latent's neighbours within the context and of its position in a pair of latents.

    Windows that are too short or that start at an odd latent change the result.
    """
    batch, _, length = array.shape
    if direction == ENCODER:
        own = array.reshape(batch, CHANNELS, length // HOP, HOP).transpose(0, 1, 3, 2).reshape(batch, -1, length // HOP)
        own = np.concatenate([own[:, :2] + own[:, 8:10], own[:, 2:4] * 2], axis=1)
    else:
        own = array
    reach = 1 if direction == ENCODER else 2
    padded = np.pad(own, [(0, 0), (0, 0), (reach, reach)])
    sums = sum(
        padded[:, :, offset : offset + own.shape[-1]] * np.float32(0.5**offset) for offset in range(2 * reach + 1)
    )
    # Within a pair, only the second latent depends on the first, so the result depends on where pairs start.
    sums[:, 0, 1::2] += own[:, 1, : own.shape[-1] // 2 * 2 : 2]
    if direction == ENCODER:
        return np.ascontiguousarray(sums)
    return np.ascontiguousarray(np.repeat(sums[:, :2], HOP, axis=2) * np.tile(np.arange(HOP) + 1, length).astype("f4"))


def model(window=None):
    """Return a model with a fake backend. Its windows are so small that most examples need several."""
    return AutoencoderModel(FakeBackend(neighbour_sums), window)


def in_one_pass(direction, batch):
    """Return the expected output: that of the fake backend for the whole input at once."""
    return neighbour_sums(direction, batch)


def pad_to(array, samples):
    """Pad the last axis with zeros to a number of samples."""
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, samples - array.shape[-1])])


windows = st.sampled_from([None, 6, 8, 10, 32])
lengths = st.one_of(st.integers(1, 3 * HOP), st.integers(1, 1500))
common_rates = st.one_of(st.just(RATE), st.sampled_from([8_000, 22_050, 32_000, 48_000, 96_000]))
seeds = st.integers(0, 2**32 - 1)
kinds = st.sampled_from(["numpy", "torch", "strided", "fortran", "read-only", "big-endian"])
clips = st.tuples(lengths, st.sampled_from([1, 2, 3]), seeds)


def rates(budget):
    """Return a strategy for sample rates. Uncommon rates need large filters, so only the slow tests draw them."""
    return common_rates if budget < MANY else st.one_of(common_rates, st.integers(1_000, 768_000))


def as_kind(array, kind):
    """Return the same values in another kind of array."""
    if kind == "torch":
        return torch.from_numpy(array)
    if kind == "strided":
        return np.repeat(array, 2, axis=-1)[..., ::2]
    if kind == "fortran":
        return np.asfortranarray(array)
    if kind == "big-endian":
        return array.astype(array.dtype.newbyteorder(">"))
    array = array.copy()
    array.flags.writeable = kind != "read-only"
    return array


def assert_kind(result, kind):
    """Check that a result is float32 and PyTorch or NumPy like its input; return it as a NumPy array."""
    if kind == "torch":
        assert isinstance(result, torch.Tensor)
        assert result.dtype == torch.float32
        return result.numpy()
    assert type(result) is np.ndarray
    assert result.dtype == np.float32
    return result


def assert_same(expected, result, tolerance=1e-5):
    assert result.shape == expected.shape
    assert np.allclose(expected, result, rtol=0, atol=tolerance * max(1.0, float(np.abs(expected).max(initial=0))))


# One entry for each example that a property ran on.
EXAMPLES = []


@pytest.fixture(params=["few", pytest.param("many", marks=pytest.mark.slow)])
def budget(request, inputs):
    """Number of examples for each property."""
    EXAMPLES.clear()
    yield FEW if request.param == "few" else MANY
    inputs["examples of properties"] += len(EXAMPLES)


def check(property_, budget, *explicit, **strategies):
    """Run a property on `budget` generated examples and on the explicit ones."""

    def counted(**values):
        EXAMPLES.append(1)
        property_(**values)

    run = given(**strategies)(counted)
    for values in explicit:
        run = example(**values)(run)
    settings(
        max_examples=budget,
        deadline=None,
        derandomize=budget < MANY,
        database=None,
        suppress_health_check=list(HealthCheck),
    )(run)()


# --- Arrays ---------------------------------------------------------------------------------------------------


def test_encoding_any_clip(budget):
    def property_(clip, rate, dtype, kind, window, layout):
        samples, channels, seed = clip
        audio = noise((channels, samples), seed).astype(dtype)
        given_shape = {"clip": audio, "mono": audio[0], "batch of one": audio[None], "list": audio}[layout]
        array = as_kind(given_shape, kind)
        codec = model(window)
        latents = assert_kind(codec.encode([array] if layout == "list" else array, rate), kind)
        length = math.ceil(samples * RATE / rate)
        mono = audio[:1] if layout == "mono" else audio
        ready = prepare(mono.astype(np.float32), rate, RATE, CHANNELS)
        assert ready.shape[-1] == length
        whole = pad_to(ready, math.ceil(length / HOP) * HOP)[None]
        assert latents.shape == (1, WIDTH, math.ceil(length / HOP))
        assert_same(in_one_pass(ENCODER, whole), latents)

    check(
        property_,
        budget,
        {"clip": (1, 1, 0), "rate": RATE, "dtype": "float32", "kind": "numpy", "window": None, "layout": "clip"},
        clip=clips,
        rate=rates(budget),
        dtype=st.sampled_from(DTYPES),
        kind=kinds,
        window=windows,
        layout=st.sampled_from(["clip", "mono", "batch of one", "list"]),
    )


def test_encoding_any_list(budget):
    def property_(several, one_rate, kind, window):
        codec = model(window)
        audio = [noise((channels, samples), seed) for samples, channels, seed, _ in several]
        clip_rates = [several[0][3] if one_rate else rate for *_, rate in several]
        latents = codec.encode([as_kind(a, kind) for a in audio], clip_rates[0] if one_rate else clip_rates)
        ready = [prepare(a, rate, RATE, CHANNELS) for a, rate in zip(audio, clip_rates, strict=True)]
        longest = math.ceil(max(clip.shape[-1] for clip in ready) / HOP)
        batch = np.stack([pad_to(clip, longest * HOP) for clip in ready])
        assert_same(in_one_pass(ENCODER, batch), assert_kind(latents, kind))

    several = st.lists(st.tuples(lengths, st.sampled_from([1, 2]), seeds, rates(budget)), min_size=1, max_size=4)
    check(property_, budget, several=several, one_rate=st.booleans(), kind=kinds, window=windows)


def test_decoding_any_latents(budget):
    def property_(batch, latents, seed, dtype, kind, window):
        array = noise((batch, WIDTH, latents), seed).astype(dtype)
        audio = assert_kind(model(window).decode(as_kind(array, kind)), kind)
        assert audio.shape == (batch, CHANNELS, latents * HOP)
        assert_same(in_one_pass(DECODER, array.astype(np.float32)), audio)

    check(
        property_,
        budget,
        batch=st.integers(1, 3),
        latents=st.integers(1, 200),
        seed=seeds,
        dtype=st.sampled_from(DTYPES),
        kind=kinds,
        window=windows,
    )


def test_chunks_keep_lengths(budget):
    """With `chunked=True`, the values differ from a single pass, but the length is the same."""

    def property_(latents, chunk, overlap, seed):
        codec, array = model(), noise((1, WIDTH, latents), seed)
        try:
            audio = codec.decode(array, chunked=True, chunk_size=chunk, overlap=overlap)
        except InputError:
            assert chunk <= overlap or chunk % 2 or overlap % 2 or chunk < 1
            return
        assert audio.shape == (1, CHANNELS, latents * HOP)
        assert np.isfinite(audio).all()

    check(
        property_,
        budget,
        latents=st.integers(1, 200),
        chunk=st.integers(1, 64),
        overlap=st.integers(0, 40),
        seed=seeds,
    )


def test_any_array_is_encoded_or_refused(budget):
    """Arrays of any rank, dtype, value and rate are encoded, or refused by an InputError with a message of one line."""
    refusals = []

    def property_(shape, dtype, value, rate):
        array = np.full(shape, value).astype(dtype)
        try:
            latents = model().encode(array, rate)
        except InputError as error:
            refusals.append(str(error))
        else:
            assert latents.dtype == np.float32
            assert np.isfinite(latents).all()

    with np.errstate(all="ignore"):
        check(
            property_,
            budget,
            shape=st.lists(st.integers(0, 5), max_size=4).map(tuple),
            dtype=st.sampled_from(["f2", "f4", "f8", "i2", "u1", "?", "c8", "i8", "O", "S3", "M8[s]", ">f4", "g"]),
            value=st.sampled_from([0, 1, 0.5, 300]),
            rate=st.one_of(
                rates(budget), st.sampled_from([0, -1, 10**9, 44_100.0, "44100", None, True, math.nan, [44_100]])
            ),
        )
    assert refusals
    assert not any("\n" in refusal for refusal in refusals)


# --- Streams --------------------------------------------------------------------------------------------------


def test_any_blocks_of_a_stream(budget):
    def property_(blocks, rate, kind, window, seed):
        audio = noise((CHANNELS, sum(blocks)), seed)
        codec = model(window)
        ends = np.cumsum(blocks)
        for _ in range(2):
            # The same stream is used twice; `finish` resets it.
            encoder = codec.stream_encoder(rate)
            pieces = [
                encoder.push(as_kind(audio[:, end - size : end], kind)) for size, end in zip(blocks, ends, strict=True)
            ]
            if not sum(blocks):
                with pytest.raises(InputError):
                    encoder.finish()
                return
            latents = np.concatenate([*pieces, encoder.finish()], axis=1)
            assert encoder.samples == math.ceil(sum(blocks) * RATE / rate)
            assert_same(codec.encode(audio, rate)[0], latents)

    check(
        property_,
        budget,
        blocks=st.lists(st.one_of(st.integers(0, 20), st.integers(0, 700)), min_size=1, max_size=12),
        rate=rates(budget),
        kind=kinds,
        window=windows,
        seed=seeds,
    )


def test_any_blocks_of_latents(budget):
    def property_(blocks, window, seed):
        latents = noise((WIDTH, sum(blocks)), seed)
        codec = model(window)
        decoder = codec.stream_decoder()
        ends = np.cumsum(blocks)
        for _ in range(2):
            pieces = [decoder.push(latents[:, end - size : end]) for size, end in zip(blocks, ends, strict=True)]
            if not sum(blocks):
                with pytest.raises(InputError):
                    decoder.finish()
                return
            audio = np.concatenate([*pieces, decoder.finish()], axis=1)
            assert_same(codec.decode(latents[None])[0], audio)

    blocks = st.lists(st.integers(0, 60), min_size=1, max_size=12)
    check(property_, budget, blocks=blocks, window=windows, seed=seeds)


# --- Files ----------------------------------------------------------------------------------------------------

_FORMATS = st.sampled_from(
    [
        *(("wav", subtype) for subtype in ("PCM_U8", "PCM_16", "PCM_24", "FLOAT", "DOUBLE", "ULAW")),
        *(("flac", "PCM_16"), ("flac", "PCM_24"), ("aiff", "PCM_16")),
    ]
)


def test_any_file(budget):
    def property_(clip, rate, form, window):
        samples, channels, seed = clip
        suffix, subtype = form
        with tempfile.TemporaryDirectory() as name:
            folder, codec = Path(name), model(window)
            sf.write(folder / f"a.{suffix}", noise((samples, channels), seed), rate, subtype)
            audio, _ = read_audio(folder / f"a.{suffix}")
            returned = codec.encode_file(folder / f"a.{suffix}", folder / "a.npy")
            latents, metadata = read_latents(folder / "a.npy", WIDTH)
            assert metadata == returned
            assert metadata["samples"] == math.ceil(samples * RATE / rate)
            assert_same(codec.encode(audio, rate)[0], latents)
            written = codec.decode_file(folder / "a.npy", folder / "b.wav", "FLOAT")
            assert written == metadata["samples"]
            decoded, decoded_rate = read_audio(folder / "b.wav")
            assert decoded_rate == RATE
            assert_same(codec.decode(latents[None])[0, :, :written], decoded)

    # FLAC supports only some of the sample rates above 65,535 Hz.
    file_rates = common_rates if budget < MANY else st.integers(1_000, 65_535)
    check(property_, budget, clip=clips, rate=file_rates, form=_FORMATS, window=windows)


def test_any_latents_file(budget):
    def property_(blocks, dtype, order, step, seed):
        latents = noise((WIDTH, sum(blocks)), seed).astype(dtype)
        with tempfile.TemporaryDirectory() as name:
            path = Path(name, "a.npy")
            with LatentsWriter(path, WIDTH, dtype) as writer:
                for size, end in zip(blocks, np.cumsum(blocks), strict=True):
                    writer.write(latents[:, end - size : end])
            assert np.array_equal(np.load(path, allow_pickle=False), latents)
            np.save(path, np.asarray(latents, order=order))
            assert np.array_equal(read_latents(path)[0], latents)
            pieces = list(LatentsReader(path).blocks(step))
            assert np.array_equal(np.concatenate(pieces, axis=1), latents)
            assert {piece.shape[1] for piece in pieces[:-1]} <= {step}

    check(
        property_,
        budget,
        blocks=st.lists(st.integers(1, 50), min_size=1, max_size=6),
        dtype=st.sampled_from(["float32", "float16"]),
        order=st.sampled_from(["C", "F"]),
        step=st.integers(1, 60),
        seed=seeds,
    )


_CHARACTERS = st.one_of(st.sampled_from("\0/.~\ud800\udc80 *[$\n"), st.characters(exclude_categories=()))


def test_any_name(budget):
    """Any text is accepted as a name, or refused by a SamekitError that names a cause and a cure."""
    refusals = []

    def property_(name):
        with tempfile.TemporaryDirectory() as folder:
            here = f"{folder}/{name.replace('/', '')}"
            sf.write(Path(folder, "a.wav"), noise((99, 2)), RATE)
            np.save(Path(folder, "a.npy"), noise((WIDTH, 5)))
            calls = (
                lambda: find_engine(name),
                lambda: load("same-s", name),
                lambda: load_source({"kind": "folder", "folder": name, "name": name}),
                lambda: model().encode_file(here, Path(folder, "b.npy")),
                lambda: model().decode_file(here, Path(folder, "b.wav")),
                lambda: model().encode_file(Path(folder, "a.wav"), f"{here}.npy"),
                lambda: model().decode_file(Path(folder, "a.npy"), f"{here}.wav"),
                lambda: pre_encode(model(), f"{here}/x", Path(folder, "out")),
                lambda: pre_encode(model(), folder, f"{here}.out", PreEncodeOptions(sample_size=800)),
                lambda: verify(f"{here}/x"),
            )
            refusals.extend(filter(None, map(error_message, calls)))

    check(property_, budget, {"name": "x" * 5000}, {"name": "\0"}, {"name": "\ud800"}, name=st.text(_CHARACTERS))
    assert len(refusals) > budget
    assert all("; " in refusal for refusal in refusals)


def error_message(call):
    """Return the message of the SamekitError that a call raises, or None."""
    try:
        call()
    except SamekitError as error:
        return str(error)
    return None


# --- Datasets -------------------------------------------------------------------------------------------------


def test_any_dataset(budget):
    """Every clip is encoded once, and a second run encodes nothing.

    The latents of a clip equal those of a single pass over the clip and the zeros that pad it.
    """

    def property_(clips, sample_size, batch_size, full, pad, readers, window):
        with tempfile.TemporaryDirectory() as name:
            data, out = Path(name, "data"), Path(name, "out")
            data.mkdir()
            for index, (samples, channels, seed, rate) in enumerate(clips):
                sf.write(data / f"{index}.wav", noise((samples, channels), seed), rate, "FLOAT")
                (data / f"{index}.txt").write_text(f"caption {index}")
            options = PreEncodeOptions(
                batch_size=batch_size, sample_size=sample_size, full=full, pad=pad, readers=readers
            )
            report = pre_encode(model(window), data, out, options)
            assert (report.clips, report.encoded) == (len(clips), len(clips)), report.bad
            assert pre_encode(model(window), data, out, options).encoded == 0
            for index, (_, _, _, rate) in enumerate(clips):
                latents = np.load(out / f"{index:012d}.npy", allow_pickle=False)
                metadata = json.loads((out / f"{index:012d}.json").read_text())
                audio = prepare(read_audio(data / f"{index}.wav")[0], rate, RATE, CHANNELS)
                kept = np.clip(audio if full else audio[:, :sample_size], -1, 1)
                ones = math.ceil(kept.shape[1] / HOP)
                limit = math.ceil(sample_size / HOP)
                length = limit if pad and ones <= limit else ones
                assert metadata["padding_mask"] == [1] * ones + [0] * (length - ones)
                assert metadata["prompt"] == f"caption {index}"
                # Zeros pad a clip up to the sample size. A full clip without `pad` is encoded as if zeros followed it.
                end = max(ones, limit) if not full or pad else ones + 10
                expected = in_one_pass(ENCODER, pad_to(kept, end * HOP)[None])[0, :, :length]
                assert_same(expected, latents)

    check(
        property_,
        max(5, budget // 3),
        clips=st.lists(
            st.tuples(lengths, st.sampled_from([1, 2]), seeds, st.sampled_from([RATE, RATE, 48_000, 22_050])),
            min_size=1,
            max_size=4,
        ),
        sample_size=st.integers(1, 1200),
        batch_size=st.integers(1, 4),
        full=st.booleans(),
        pad=st.booleans(),
        readers=st.integers(1, 3),
        window=windows,
    )
