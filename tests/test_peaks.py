"""Peak policies of audio files, and the limiter."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile as sf
from faults import contents, fill, mounted, names, remount
from helpers import RATE, FakeBackend, assert_close, assert_one_line, noise

from samekit import AutoencoderModel
from samekit.audio import PEAK_POLICIES, AudioWriter, Limiter, checked_policy, read_audio, write_blocks
from samekit.cli.audio import decode
from samekit.errors import InputError, OutputError
from samekit.files.latents import LatentsWriter

# Facts of `optimized/mlx/models/defs/limiter_mlx.py` of the reference, which its other limiters equal: the ceiling, the
# samples that share a gain, and the blocks of them on each side.
CEILING, BLOCK, RADIUS = 0.977, 64, 4


def tone(peak, seconds=2.0, channels=2):
    """Return a sine of 997 Hz that fades in; its highest and lowest samples are ±`peak`, up to 0.01 %."""
    time = np.arange(int(seconds * RATE)) / RATE
    sine = peak * np.sin(2 * np.pi * 997 * time) * np.minimum(1, 2 * time / seconds)
    return np.repeat(sine.astype(np.float32)[None], channels, axis=0)


def write(path, audio, subtype, peak, step=10_007):
    blocks = [audio[:, start : start + step] for start in range(0, audio.shape[1], step)]
    with AudioWriter(path, RATE, audio.shape[0], subtype) as writer:
        write_blocks(writer, blocks, checked_policy(peak, subtype))
    return path


# --- Policies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "subtype", "bits"),
    [("wav", "PCM_16", 16), ("flac", "PCM_16", 16), ("wav", "PCM_24", 24), ("wav", "PCM_32", 32), ("wav", "FLOAT", 0)],
)
def test_three_decibels_too_loud(tmp_path, caplog, suffix, subtype, bits):
    audio = tone(10 ** (3 / 20))
    path = write(tmp_path / f"song.{suffix}", audio, subtype, "attenuate")
    read, _ = sf.read(path, dtype="int32" if bits else "float32", always_2d=True)
    highest = int(read.max()) >> (32 - bits) if bits else read.max()
    lowest = int(read.min()) >> (32 - bits) if bits else read.min()
    full_scale = 2 ** (bits - 1) - 1 if bits else 1
    # A float32 has 24 bits.
    assert max(highest, -lowest) == pytest.approx(full_scale, rel=2**-23)
    assert lowest < 0.999 * -full_scale
    assert_close(audio / np.abs(audio).max(), read_audio(path)[0], 80 if bits == 16 else 120)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"{path}: the peak was 3.00 dB above full scale; all samples are attenuated"
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_32"])
@pytest.mark.parametrize("peak", [0.0, 0.5, 32767.4 / 32768, 1.0])
def test_audio_up_to_full_scale_is_untouched(tmp_path, caplog, subtype, peak):
    audio = tone(1)
    audio *= np.float32(peak) / np.abs(audio).max()
    assert np.abs(audio).max() == np.float32(peak)
    with AudioWriter(tmp_path / "plain.wav", RATE, 2, subtype) as writer:
        writer.write(audio)
    for policy in (None, "attenuate", "clip"):
        path = write(tmp_path / f"{policy}.wav", audio, subtype, policy)
        assert path.read_bytes() == (tmp_path / "plain.wav").read_bytes()
    assert caplog.records == []


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_32"])
@pytest.mark.parametrize("peak", [1.00001, 1.5, 3e9, 3.4e38])
@pytest.mark.parametrize("sign", [1, -1])
def test_scaled_peaks_do_not_wrap(tmp_path, subtype, peak, sign):
    audio = np.array([[0, sign * peak, -sign * peak * 0.999, 0]], np.float32)
    read, _ = sf.read(write(tmp_path / "a.wav", audio, subtype, "attenuate"), always_2d=True)
    assert read[:, 0] == pytest.approx([0, sign, -sign * 0.999, 0], abs=2e-4)


def test_clip_and_raw(tmp_path):
    audio = tone(1.5)
    for policy in (None, "raw"):
        assert np.array_equal(read_audio(write(tmp_path / "raw.wav", audio, "FLOAT", policy))[0], audio)
    clipped, _ = read_audio(write(tmp_path / "clip.wav", audio, "FLOAT", "clip"))
    assert np.array_equal(clipped, np.clip(audio, -1, 1))
    limited, _ = read_audio(write(tmp_path / "limit.wav", audio, "FLOAT", "limit"))
    limiter = Limiter(RATE, 2)
    assert np.array_equal(limited, np.concatenate([limiter.push(audio), limiter.finish()], axis=1))
    assert np.abs(limited).max() == pytest.approx(CEILING)


def test_policies_that_cannot_be_used(tmp_path):
    np.save(tmp_path / "a.npy", noise((4, 10)))
    model = AutoencoderModel(FakeBackend())
    with pytest.raises(InputError, match=r"unknown peak policy 'normalise'; use one of attenuate, limit, clip, raw$"):
        model.decode_file(tmp_path / "a.npy", tmp_path / "a.wav", peak="normalise")
    for subtype in ("PCM_16", "PCM_24"):
        with pytest.raises(InputError, match=rf"'raw' needs floating point, and {subtype} holds integers; ") as caught:
            model.decode_file(tmp_path / "a.npy", tmp_path / "a.wav", subtype, peak="raw")
        assert_one_line(caught.value)
    assert names(tmp_path) == ["a.npy"]
    (option,) = (option for option in decode.params if option.name == "peak")
    assert tuple(option.type.choices) == PEAK_POLICIES


def test_audio_that_is_not_finite(tmp_path):
    for value in (np.nan, np.inf):
        audio = np.array([[0, value]], np.float32)
        with pytest.raises(InputError, match="holds NaN or infinity"):
            write(tmp_path / "a.wav", audio, "PCM_16", "attenuate")
    assert names(tmp_path) == []


# --- Decoding files ---------------------------------------------------------------------------------------------


def constant(level):
    """Return a model whose decoder yields samples of one value."""
    return AutoencoderModel(FakeBackend(lambda _, array: np.full((1, 2, array.shape[-1] * 8), level, np.float32)))


def test_decode_file(tmp_path, caplog):
    np.save(tmp_path / "a.npy", noise((4, 10_000)))
    model = constant(2.0)
    assert model.decode_file(tmp_path / "a.npy", tmp_path / "a.wav") == 80_000
    read, _ = sf.read(tmp_path / "a.wav", dtype="int16")
    assert read.shape == (80_000, 2)
    assert (read == 32767).all()
    (record,) = caplog.records
    assert "6.02 dB above full scale" in record.getMessage()
    model.decode_file(tmp_path / "a.npy", tmp_path / "a.wav", "FLOAT")
    assert (sf.read(tmp_path / "a.wav")[0] == 2).all()
    assert len(caplog.records) == 1
    assert (model.decode(np.zeros((1, 4, 10), np.float32)) == 2).all()


def test_output_behind_a_link(tmp_path):
    """The temporary file is in the folder of the file itself, not in that of the link."""
    (tmp_path / "there").mkdir()
    np.save(tmp_path / "a.npy", noise((4, 10)))
    with mounted(tmp_path / "here") as disk:
        (disk / "a.wav").symlink_to(tmp_path / "there" / "a.wav")
        remount(disk, "ro")
        constant(2.0).decode_file(tmp_path / "a.npy", disk / "a.wav")
        assert (disk / "a.wav").is_symlink()
        assert names(tmp_path / "there") == ["a.wav"]


# Free bytes, of which the floats take 1.28 MB and the result 640 kB.
@pytest.mark.parametrize("room", [600_000, 1_500_000], ids=["first pass", "second pass"])
def test_disk_that_becomes_full(tmp_path, room, faults):
    with LatentsWriter(tmp_path / "a.npy", 4) as writer:
        writer.write(noise((4, 20_000)))
    with mounted(tmp_path / "disk", "-o", "size=4m") as disk:
        (disk / "a.wav").write_text("old")
        fill(disk, room)
        before = contents(disk)
        with pytest.raises(OutputError, match=r"a.wav: cannot be written \(No space left on device\)") as caught:
            constant(2.0).decode_file(tmp_path / "a.npy", disk / "a.wav")
        assert_one_line(caught.value)
        assert contents(disk) == before
        del caught
        # Nothing takes space any more.
        (disk / "filler").unlink()
        fill(disk)
        assert (disk / "filler").stat().st_size > 4_000_000
        remount(disk, "size=8m")
        assert constant(2.0).decode_file(tmp_path / "a.npy", disk / "a.wav") == 160_000
    faults["disks full"] += 1


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("policy", PEAK_POLICIES)
def test_interrupt_while_samples_arrive(tmp_path, at, policy):
    def blocks():
        for index in range(5):
            if index == at:
                raise KeyboardInterrupt
            yield noise((2, 100_000), level=2)

    (tmp_path / "a.wav").write_text("old")
    with pytest.raises(KeyboardInterrupt), AudioWriter(tmp_path / "a.wav", RATE, 2, "FLOAT") as writer:
        write_blocks(writer, blocks(), policy)
    assert contents(tmp_path) == {"a.wav": b"old"}


def test_interrupt_in_the_second_pass(tmp_path):
    class Interrupted(AudioWriter):
        def write(self, audio):
            if self.frames:
                raise KeyboardInterrupt
            super().write(audio)

    (tmp_path / "a.wav").write_text("old")
    with pytest.raises(KeyboardInterrupt), Interrupted(tmp_path / "a.wav", RATE, 2) as writer:
        write_blocks(writer, [noise((2, 100_000), level=2)] * 3, "attenuate")
    assert contents(tmp_path) == {"a.wav": b"old"}


# Decodes latents with a fake model, and prints the peak memory of the process in KiB.
DECODE = """
import sys
import numpy as np
from helpers import FakeBackend
from samekit import AutoencoderModel
model = AutoencoderModel(FakeBackend(lambda _, array: np.full((1, 2, array.shape[-1] * 8), 2, np.float32)), 4096)
print(model.decode_file(*sys.argv[1:3], peak=sys.argv[3]))
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="/proc is Linux")
@pytest.mark.parametrize("policy", ["attenuate", "limit"])
def test_memory_is_flat(tmp_path, policy):
    """Ten minutes of stereo are 212 MB of floats."""
    peaks = []
    for seconds in (10, 600):
        samples = seconds * RATE // 8 * 8
        with LatentsWriter(tmp_path / "a.npy", 4) as writer:
            for _ in range(10):
                writer.write(np.zeros((4, samples // 80), np.float32))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", DECODE, tmp_path / "a.npy", tmp_path / "a.wav", policy]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
        written, memory = map(int, done.stdout.split())
        assert written == samples // 80 * 80
        peaks.append(memory / 1024)
    assert peaks[1] < peaks[0] + 30


# --- The limiter ------------------------------------------------------------------------------------------------


def limited(audio, *sizes):
    """Limit audio in blocks of these sizes, and the rest at once."""
    limiter = Limiter(RATE, audio.shape[0])
    blocks = np.split(audio, np.cumsum(sizes), axis=1)
    return np.concatenate([*map(limiter.push, blocks), limiter.finish()], axis=1)


def test_limiter_agrees_with_the_formula_of_the_reference():
    """Evaluate block by block: the smallest gain of nine blocks, a Hann window of nine, lines between the centres."""
    audio = noise((2, 100 * BLOCK + 17), level=0.5)
    blocks = [np.abs(audio[:, start : start + BLOCK]).max() for start in range(0, audio.shape[1], BLOCK)]
    needed = [min(1, CEILING / peak) for peak in blocks]
    last = len(needed) - 1
    lowest = [min(needed[max(0, at - RADIUS) : at + RADIUS + 1]) for at in range(last + 1)]
    window = np.hanning(2 * RADIUS + 1) / np.hanning(2 * RADIUS + 1).sum()
    smooth = [
        sum(
            weight * lowest[min(last, max(0, at + shift))]
            for shift, weight in zip(range(-RADIUS, RADIUS + 1), window, strict=True)
        )
        for at in range(last + 1)
    ]
    gains = np.interp(np.arange(audio.shape[1]), np.arange(last + 1) * BLOCK + (BLOCK - 1) / 2, smooth)
    assert 0.4 < gains.min() < gains.max() < 1
    assert np.abs(limited(audio) - audio * gains).max() < 1e-6


def test_window_of_the_limiter():
    """The gain begins to fall 8 blocks before a peak, twice the window of 5.8 ms, and is constant around the peak."""
    audio = np.full((1, 4096), 0.5, np.float32)
    audio[0, 2048] = 2
    gains = (limited(audio) / audio)[0]
    changed = np.flatnonzero(gains < 1)
    assert abs(RADIUS * BLOCK / RATE - 0.0058) < 1e-5
    assert 2048 - 2 * RADIUS * BLOCK <= changed[0] < 2048 - RADIUS * BLOCK
    assert 2048 + RADIUS * BLOCK < changed[-1] < 2048 + BLOCK + 2 * RADIUS * BLOCK
    assert gains[2048] == pytest.approx(CEILING / 2)
    assert gains.min() == gains[2048]


def test_limited_audio_stays_below_the_ceiling():
    for seed, level in enumerate((0.3, 1, 5, 1e30)):
        assert np.abs(limited(noise((2, 20_000), seed, level))).max() <= CEILING + 1e-7


def test_quiet_audio_is_not_changed():
    audio = noise((2, 10_000))
    audio *= np.float32(CEILING) / np.abs(audio).max()
    assert np.array_equal(limited(audio), audio)


@pytest.mark.parametrize("samples", [0, 1, BLOCK, 9 * BLOCK, 9 * BLOCK + 1, 20_000])
def test_blocks_do_not_change_the_result(samples):
    audio = noise((2, samples), level=1)
    whole = limited(audio)
    assert whole.shape == audio.shape
    for size in (1, 63, 64, 1000) if samples < 1000 else (63, 4096):
        assert np.array_equal(limited(audio, *[size] * (samples // size)), whole)


def test_limiter_of_a_stream():
    decoder, limiter = constant(2.0).stream_decoder(), Limiter(RATE, 2)
    pieces = [limiter.push(decoder.push(np.zeros((4, size), np.float32))) for size in (1, 100, 1000)]
    pieces += [limiter.push(decoder.finish()), limiter.finish()]
    audio = np.concatenate(pieces, axis=1)
    assert audio.shape == (2, 1101 * 8)
    assert audio == pytest.approx(np.full_like(audio, CEILING))
    # It can be used again.
    assert np.array_equal(np.concatenate([limiter.push(audio), limiter.finish()], axis=1), audio)


def test_blocks_of_another_shape():
    for shape in ((3, 10), (10,), (1, 2, 10)):
        with pytest.raises(InputError, match=r"does not fit; give \[2, samples\]"):
            Limiter(RATE, 2).push(np.zeros(shape, np.float32))
