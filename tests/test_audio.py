"""Resampling as in the reference, audio files of every format, and damaged files, which are refused."""

from __future__ import annotations

import json
import math
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from samekit.audio import (
    AudioReader,
    AudioWriter,
    PreparedReader,
    StreamResampler,
    pad_to,
    prepare,
    read_audio,
    resample,
    to_channels,
)
from samekit.audio import reader as reader_module
from samekit.audio import resampler as resampler_module
from samekit.audio import writer as writer_module
from samekit.errors import AudioFileError, InputError, OutputError

GOLDEN = Path(__file__).parent / "golden"
RESAMPLED = np.load(GOLDEN / "resample.npz")
RESAMPLE_CASES = json.loads(str(RESAMPLED["cases"]))
SAMPLES = 50_001


def noise(shape, seed=0):
    return (np.random.RandomState(seed).standard_normal(shape) * 0.2).astype(np.float32)


def snr(reference, output):
    """Return the signal-to-noise ratio in dB."""
    assert reference.shape == output.shape
    error = np.linalg.norm(output.astype(np.float64) - reference)
    return math.inf if error == 0 else 20 * math.log10(np.linalg.norm(reference) / error)


def stream(audio, rate_in, rate_out, sizes):
    """Resample in blocks of these sizes, which are repeated."""
    resampler = StreamResampler(rate_in, rate_out, audio.shape[0])
    outputs, start, turn = [], 0, 0
    while start < audio.shape[1]:
        size = sizes[turn % len(sizes)]
        outputs.append(resampler.push(audio[:, start : start + size]))
        start, turn = start + size, turn + 1
    return np.concatenate([*outputs, resampler.finish()], axis=1)


# --- Resampling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", RESAMPLE_CASES, ids=lambda case: str(case["rate"]))
def test_reference_resampler(case):
    reference = RESAMPLED[str(case["rate"])]
    clip = noise(case["shape"], case["seed"])
    whole = resample(clip, case["rate"], 44_100)
    assert whole.dtype == np.float32
    assert snr(reference, whole) >= 110
    assert np.array_equal(stream(clip, case["rate"], 44_100, [1, 0, 997, 13]), whole)
    assert np.array_equal(stream(clip, case["rate"], 44_100, [1]), whole)


def direct(clip, rate_in, rate_out):
    """Evaluate the formula of `resample` tap by tap in double precision."""
    common = math.gcd(rate_in, rate_out)
    period_in, period_out = rate_in // common, rate_out // common
    cutoff = 0.99 * min(1, period_out / period_in)
    outputs = np.zeros(math.ceil(len(clip) * period_out / period_in))
    for m in range(len(outputs)):
        period, phase = divmod(m, period_out)
        centre = (period + float(np.float32(phase) / np.float32(period_out))) * period_in
        for i in range(len(clip)):
            x = cutoff * (i - centre)
            if abs(x) < 6:
                sinc = math.sin(math.pi * x) / (math.pi * x) if x else 1.0
                outputs[m] += clip[i] * cutoff * sinc * math.cos(math.pi * x / 12) ** 2
    return outputs


@pytest.mark.parametrize(
    ("rate_in", "rate_out"),
    [(48_000, 44_100), (44_100, 48_000), (44_100, 16_000), (1_000, 1_001), (7_350, 44_100), (44_099, 44_100)],
)
def test_formula(rate_in, rate_out):
    clip = noise(301, seed=rate_in)
    assert snr(direct(clip, rate_in, rate_out), resample(clip, rate_in, rate_out)) >= 120


@pytest.mark.parametrize(("rate_in", "rate_out"), [(48_000, 44_100), (22_050, 44_100), (44_056, 44_100)])
def test_stream_of_many_spans_equals_one_go(rate_in, rate_out):
    clip = noise((2, 150_000))
    whole = resample(clip, rate_in, rate_out)
    assert np.array_equal(stream(clip, rate_in, rate_out, [4096]), whole)
    assert np.array_equal(stream(clip, rate_in, rate_out, [100_003, 1, 0, 31]), whole)
    # A delay or a seam between spans would show: the part in the middle is that of a shorter clip.
    assert np.allclose(whole[:, :40_000], resample(clip[:, :60_000], rate_in, rate_out)[:, :40_000], atol=1e-6)


@pytest.mark.parametrize("samples", [0, 1, 2, 159, 160, 161, 33_333])
@pytest.mark.parametrize(("rate_in", "rate_out"), [(48_000, 44_100), (44_100, 48_000), (96_000, 8_000)])
def test_length(samples, rate_in, rate_out):
    expected = -(-samples * rate_out // rate_in)
    clip = noise((2, samples))
    assert resample(clip, rate_in, rate_out).shape == (2, expected)
    assert stream(clip, rate_in, rate_out, [samples // 3 + 1]).shape == (2, expected)


def test_any_number_of_leading_dimensions():
    batch = noise((2, 3, 500))
    resampled = resample(batch, 48_000, 44_100)
    assert resampled.shape == (2, 3, 460)
    assert snr(resample(batch[1, 2], 48_000, 44_100), resampled[1, 2]) >= 120
    assert resample(batch[:0], 48_000, 44_100).shape == (0, 3, 460)


def test_equal_rates_change_nothing():
    clip = noise((2, 100))
    assert resample(clip, 32_000, 32_000) is clip
    assert np.array_equal(stream(clip, 32_000, 32_000, [7]), clip)


def test_stream_begins_anew_after_finish():
    resampler = StreamResampler(48_000, 44_100, 1)
    for seed in (1, 2):
        clip = noise((1, 40_000), seed)
        blocks = [resampler.push(clip), resampler.finish()]
        assert np.array_equal(np.concatenate(blocks, axis=1), resample(clip, 48_000, 44_100))


@pytest.mark.parametrize("rate", [44_099, 44_056, 191_999])
def test_filters_of_long_periods_stay_small(rate):
    assert resampler_module._polyphase_filter(rate, 44_100).weights.nbytes < 40e6


def test_stream_memory_is_bounded():
    resampler = StreamResampler(48_000, 44_100, 2)
    block = noise((2, 10_000))
    resampler.push(block)
    tracemalloc.start()
    try:
        produced = sum(resampler.push(block).shape[1] for _ in range(300))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert produced > 2_700_000
    assert peak < 4e6


@pytest.mark.parametrize("rate", [0, -44_100, 999, 768_001, 44_100.0, "44100", None])
def test_rates_that_are_none(rate):
    with pytest.raises(InputError, match="sample rate"):
        resample(noise((1, 10)), rate, 44_100)
    with pytest.raises(InputError, match="sample rate"):
        StreamResampler(44_100, rate, 1)


@pytest.mark.parametrize("shape", [(1, 10), (3, 10), (10,), (1, 2, 10)])
@pytest.mark.parametrize("rate_in", [44_100, 48_000])
def test_stream_refuses_blocks_of_another_shape(shape, rate_in):
    with pytest.raises(InputError, match=r"give \[2, samples\]"):
        StreamResampler(rate_in, 44_100, 2).push(noise(shape))


# --- Channels and length ------------------------------------------------------------------------------------


def test_channels():
    clip = noise((3, 10))
    assert np.array_equal(to_channels(clip[:1], 2), clip[[0, 0]])
    assert np.array_equal(to_channels(clip, 2), clip[:2])
    assert np.array_equal(to_channels(clip, 1), clip[:1])
    assert np.array_equal(to_channels(clip[None, :1], 3), clip[None, [0, 0, 0]])
    with pytest.raises(InputError, match="2 channels cannot become 3; give 1, or 3 or more"):
        to_channels(clip[:2], 3)


def test_padding():
    clip = noise((2, 10))
    padded = pad_to(clip, 16)
    assert np.array_equal(padded[:, :10], clip)
    assert padded.shape == (2, 16)
    assert not padded[:, 10:].any()
    assert pad_to(clip, 5) is clip
    assert pad_to(clip[:, :0], 4096).shape == (2, 0)


def test_reference_preprocessing():
    golden = np.load(GOLDEN / "tiny-s.npz")
    (case,) = [case for case in json.loads(str(golden["cases"])) if case["op"] == "preprocess"]
    clips = [
        prepare(noise(clip["shape"], case["seed"] + 100 * number), clip["rate"], 44_100, 2)
        for number, clip in enumerate(case["clips"])
    ]
    longest = max(clip.shape[1] for clip in clips)
    batch = np.stack([pad_to(pad_to(clip, longest), 4096) for clip in clips])
    for reference, output in zip(golden[case["key"]], batch, strict=True):
        assert snr(reference, output) >= 110


# --- Reading ------------------------------------------------------------------------------------------------

# Suffix, format and subtype of libsndfile, sample rate.
READABLE = [
    ("wav", "WAV", "PCM_16", 44_100),
    ("wav", "WAV", "FLOAT", 44_100),
    ("wav", "RF64", "PCM_16", 44_100),
    ("aiff", "AIFF", "PCM_16", 44_100),
    ("flac", "FLAC", "PCM_24", 44_100),
    ("ogg", "OGG", "VORBIS", 44_100),
    ("opus", "OGG", "OPUS", 48_000),
    ("mp3", "MP3", "MPEG_LAYER_III", 44_100),
]
each_format = pytest.mark.parametrize("kind", READABLE, ids=lambda kind: "-".join(kind[1:3]))


def music(samples=SAMPLES):
    """Return `[2, samples]`: a rising tone and noise, so that no codec makes a tiny file of it."""
    time = np.arange(samples) / 44_100
    tone = 0.3 * np.sin(2 * np.pi * 440 * time * (1 + time))
    return (np.stack([tone, -tone]) + noise((2, samples)) * 0.3).astype(np.float32)


@pytest.fixture
def encoded(tmp_path):
    """Return a function that writes `music` with libsndfile and returns the path."""

    def write(kind, samples=SAMPLES):
        suffix, container, subtype, rate = kind
        path = tmp_path / f"song.{suffix}"
        sf.write(path, music(samples).T, rate, subtype, format=container)
        return path

    return write


def assert_refused(path, match):
    with pytest.raises(AudioFileError, match=match) as caught:
        read_audio(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "; " in message
    assert "\n" not in message


@each_format
def test_reads_every_format_in_blocks_of_any_size(encoded, kind):
    path = encoded(kind)
    whole, rate = read_audio(path)
    assert rate == kind[3]
    assert whole.dtype == np.float32
    assert whole.flags.c_contiguous
    assert snr(music(), whole) > (5 if kind[1] in ("OGG", "MP3") else 60)
    with AudioReader(path, block=997) as reader:
        info = reader.info
        blocks = list(reader)
        assert list(reader) == []
    assert (info.sample_rate, info.channels, info.frames) == (rate, 2, SAMPLES)
    assert (info.format, info.subtype) == kind[1:3]
    assert max(block.shape[1] for block in blocks) == 997
    assert np.array_equal(np.concatenate(blocks, axis=1), whole)


@pytest.mark.parametrize("container", ["WAV", "WAVEX", "W64", "RF64", "AIFF", "FLAC"])
def test_each_16_bit_sample_has_the_value_that_libsndfile_gives_it(tmp_path, container):
    path = tmp_path / "song.wav"
    samples = np.random.default_rng(0).permutation(np.arange(-(2**15), 2**15)).astype(np.int16)
    sf.write(path, samples.reshape(-1, 2), 44_100, "PCM_16", format=container)
    assert np.array_equal(read_audio(path)[0], sf.read(path, dtype="float32")[0].T)


@each_format
@pytest.mark.parametrize("kept", [0.5, 0.8])
def test_file_that_was_cut_off(encoded, kind, kept):
    path = encoded(kind)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    assert_refused(path, "cut off|is damaged after")


@pytest.mark.parametrize("kind", [kind for kind in READABLE if kind[1] in ("FLAC", "OGG", "MP3")])
def test_file_that_is_damaged_in_the_middle(encoded, kind):
    path = encoded(kind, 300_000)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20_000] = bytes(20_000)
    path.write_bytes(content)
    assert_refused(path, "cut off|is damaged")


@pytest.mark.parametrize("size", [0x7FFFF000, 0x80000000, 0xFFFFFFFF])
def test_wav_from_a_pipe(encoded, size):
    path = encoded(READABLE[0])
    content = bytearray(path.read_bytes())
    position = content.index(b"data") + 4
    content[position : position + 4] = struct.pack("<I", size)
    path.write_bytes(content)
    assert read_audio(path)[0].shape == (2, SAMPLES)


def test_wav_with_chunks_around_the_samples(encoded):
    path = encoded(READABLE[0])
    content = path.read_bytes()
    odd_chunk = b"LIST" + struct.pack("<I", 5) + b"INFOx\0"
    path.write_bytes(content[:12] + odd_chunk + content[12:] + odd_chunk)
    assert read_audio(path)[0].shape == (2, SAMPLES)
    path.write_bytes(content[:12] + odd_chunk + content[12:-1])
    assert_refused(path, "cut off")


def test_flac_of_unknown_length(encoded):
    path = encoded(("flac", "FLAC", "PCM_16", 44_100))
    content = bytearray(path.read_bytes())
    # STREAMINFO: the number of samples is the last 36 bits of the eight bytes at 18 (RFC 9639, section 8.2).
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)
    with AudioReader(path) as reader:
        assert reader.info.frames is None
        assert sum(block.shape[1] for block in reader) == SAMPLES


def test_files_that_are_no_audio(tmp_path):
    path = tmp_path / "song.wav"
    assert_refused(path, "No such file")
    path.write_bytes(b"")
    assert_refused(path, "is empty")
    path.write_text("hello " * 100)
    assert_refused(path, "cannot be read as audio")
    path.write_bytes(b"RIFF")
    assert_refused(path, "cannot be read as audio")
    path.unlink()
    path.mkdir()
    assert_refused(path, "Is a directory|Permission denied")
    raw = tmp_path / "song.raw"
    raw.write_bytes(bytes(1000))
    assert_refused(raw, "cannot be read as audio")


def test_file_without_samples(tmp_path):
    path = tmp_path / "song.wav"
    sf.write(path, np.zeros((0, 2)), 44_100)
    assert_refused(path, "holds no samples")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite(tmp_path, value):
    path = tmp_path / "song.wav"
    samples = music().T.copy()
    samples[-1, 1] = value
    sf.write(path, samples, 44_100, "FLOAT")
    assert_refused(path, "holds NaN or infinity")


@pytest.mark.skipif(os.name != "posix", reason="names that are no text are POSIX")
def test_name_that_is_no_text(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav"))
    with AudioWriter(path, 44_100, 2, "FLOAT") as writer:
        writer.write(music())
    assert np.array_equal(read_audio(path)[0], music())


# --- Writing ------------------------------------------------------------------------------------------------

WRITABLE = [
    ("wav", "PCM_16", 16),
    ("wav", "PCM_24", 24),
    ("wav", "PCM_32", 32),
    ("wav", "FLOAT", None),
    ("flac", "PCM_16", 16),
    ("flac", "PCM_24", 24),
]


def write(path, audio, subtype="PCM_16", **options):
    with AudioWriter(path, 44_100, audio.shape[0], subtype, **options) as writer:
        for start in range(0, audio.shape[1], 10_007):
            writer.write(audio[:, start : start + 10_007])
    return writer


@pytest.mark.parametrize(("suffix", "subtype", "bits"), WRITABLE)
def test_round_trip(tmp_path, suffix, subtype, bits):
    path = tmp_path / f"song.{suffix}"
    assert write(path, music(), subtype).frames == SAMPLES
    with AudioReader(path) as reader:
        assert reader.info.format == suffix.upper()
        assert reader.info.subtype == subtype
        error = next(iter(reader)).astype(np.float64) - music()
    step = 2.0 ** (1 - bits) if bits else 0
    # Rounded to the nearest step and without offset; float32 itself adds 2**-25.
    assert np.abs(error).max() <= step / 2 + 2**-25
    assert abs(error.mean()) <= 0.02 * step
    again = tmp_path / f"again.{suffix}"
    write(again, read_audio(path)[0], subtype)
    assert np.array_equal(read_audio(again)[0], read_audio(path)[0])
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize(("suffix", "subtype", "bits"), WRITABLE)
def test_full_scale_is_never_passed_in_integers(tmp_path, suffix, subtype, bits):
    path = tmp_path / f"song.{suffix}"
    audio = np.array([[-3e9, -1.5, -1, 0, 1, 1.5, 3e9]], np.float32)
    write(path, audio, subtype)
    written = read_audio(path)[0]
    if bits:
        assert np.allclose(written, np.clip(audio, -1, 1), atol=2.0 ** (1 - bits))
    else:
        assert np.array_equal(written, audio)


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_exception_leaves_the_old_file(tmp_path, suffix, error):
    path = tmp_path / f"song.{suffix}"
    path.write_text("old")

    def interrupted():
        with AudioWriter(path, 44_100, 2) as writer:
            writer.write(music())
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_options_that_cannot_be_used(tmp_path):
    for name in ("song.mp3", "song"):
        with pytest.raises(InputError, match=r"use \.wav or \.flac"):
            AudioWriter(tmp_path / name, 44_100, 2)
    for subtype in ("PCM_32", "FLOAT"):
        with pytest.raises(
            InputError, match=f"FLAC holds no '{subtype}'; use one of PCM_16, PCM_24 \\(--bits 16, 24\\), or"
        ):
            AudioWriter(tmp_path / "song.flac", 44_100, 2, subtype)
    for channels, rate in ((9, 44_100), (0, 44_100), (2, 0), (2, 800_000)):
        with (
            pytest.raises(InputError, match=f"FLAC cannot hold {channels} channels at {rate} Hz"),
            AudioWriter(tmp_path / "song.flac", rate, channels),
        ):
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("block", "match"),
    [
        (np.zeros((1, 5), np.float32), r"give \[2, samples\]"),
        (np.zeros((5, 2), np.float32), r"give \[2, samples\]"),
        (np.zeros(2, np.float32), r"give \[2, samples\]"),
        (np.full((2, 5), np.nan, np.float32), "NaN"),
        (np.full((2, 5), np.inf, np.float32), "NaN"),
    ],
)
def test_blocks_that_cannot_be_written(tmp_path, block, match):
    with pytest.raises(InputError, match=match), AudioWriter(tmp_path / "song.wav", 44_100, 2) as writer:
        writer.write(block)
    assert list(tmp_path.iterdir()) == []


def test_missing_folder(tmp_path):
    with pytest.raises(OutputError, match="choose a folder that exists"):
        write(tmp_path / "nowhere" / "song.wav", music())


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_full_disk_leaves_nothing(tmp_path, suffix):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OutputError, match=rf"song\.{suffix}: cannot be written"):
            write(tmp_path / f"song.{suffix}", noise((2, 200_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_announced_length_past_4_gib_gives_rf64(tmp_path):
    path = tmp_path / "song.wav"
    write(path, music(), frames=2**30)
    assert sf.info(path).format == "RF64"
    assert np.abs(read_audio(path)[0] - music()).max() < 2**-15
    write(path, music(), frames=2**30 - 2**10)
    assert sf.info(path).format == "WAV"


def test_length_past_4_gib_that_was_not_announced(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "_WAV_BYTES", 4 * SAMPLES)
    write(tmp_path / "fits.wav", music())
    with pytest.raises(OutputError, match=r"WAV ends at 4 GiB; write \.flac, or announce the length"):
        write(tmp_path / "song.wav", music(SAMPLES + 1))
    assert [file.name for file in tmp_path.iterdir()] == ["fits.wav"]
    write(tmp_path / "song.wav", music(SAMPLES + 1), frames=SAMPLES + 1)


# --- What a model takes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("rate", [44_100, 48_000, 22_050])
def test_prepared_file_equals_prepared_array(tmp_path, channels, rate):
    frames = 2 * reader_module.BLOCK + 1
    path = tmp_path / "song.wav"
    clip = noise((channels, frames))
    sf.write(path, clip.T, rate, "FLOAT")
    with PreparedReader(path, 44_100, 2) as reader:
        assert (reader.info.sample_rate, reader.info.channels, reader.info.frames) == (
            rate,
            channels,
            frames,
        )
        blocks = list(reader)
    expected = prepare(clip, rate, 44_100, 2)
    assert len(blocks) >= 3
    assert all(block.shape[1] for block in blocks)
    assert reader.samples == expected.shape[1] == -(-frames * 44_100 // rate)
    assert np.array_equal(np.concatenate(blocks, axis=1), expected)


def test_files_that_a_model_cannot_take(tmp_path):
    path = tmp_path / "song.wav"
    sf.write(path, music().T, 500)
    with pytest.raises(InputError, match="sample rate 500 Hz"):
        PreparedReader(path, 44_100, 2)
    sf.write(path, music().T, 44_100)
    with (
        pytest.raises(InputError, match="2 channels cannot become 3"),
        PreparedReader(path, 44_100, 3) as reader,
    ):
        list(reader)
