"""Audio files that hold less or more than they announce: they are read completely, or refused."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc

import mangle
import numpy as np
import pytest
import soundfile as sf

from samekit.audio import AudioReader, read_audio
from samekit.errors import AudioFileError

RATE = 44_100
# Shorter than one block of the reader, and longer.
LENGTHS = {"short": 60_000, "long": 280_000}
# MP3: the frame that a cut may lose, and the delays of encoder and decoder (mpg123 takes off 529 samples).
MP3_SLACK = 2 * 1152 + 1105


def sound(frames, channels=2, *, loud_first=True):
    """Return `[frames, channels]`: a tone of its own in each channel, and noise in one half."""
    time = np.arange(frames)[:, None] / RATE
    tones = 0.2 * np.sin(2 * np.pi * (300 + 200 * np.arange(channels)) * time)
    noise = np.random.RandomState(frames % 1000).standard_normal((frames, channels)) * 0.1
    direction = slice(None, frames // 2) if loud_first else slice(frames // 2, None)
    quiet = noise * 0.01
    quiet[direction] = noise[direction]
    return (tones + quiet).astype(np.float32)


@functools.cache
def made(container, frames, subtype=None, *, rate=RATE, channels=2, loud_first=True, mode=None):
    """Return the bytes of a sound file that libsndfile writes."""
    file = io.BytesIO()
    samples = sound(frames, channels, loud_first=loud_first)
    with sf.SoundFile(file, "w", rate, channels, subtype, format=container, bitrate_mode=mode) as encoder:
        encoder.write(samples)
    return file.getvalue()


def mp3(frames, mode="VARIABLE", *, xing=True, **options):
    """Return an MP3, with or without its Xing frame, which libsndfile (LAME) writes first."""
    data = made("MP3", frames, mode=mode, **options)
    first, *others = mangle.mpeg_frames(data)
    assert b"Xing" in first or b"Info" in first
    return data if xing else b"".join(others)


@pytest.fixture
def read(tmp_path):
    """Return a function that writes bytes to a file of this name, reads it and returns the number of frames."""

    def from_bytes(data, name="song.bin"):
        path = tmp_path / name
        path.write_bytes(data)
        audio, _ = read_audio(path)
        return audio.shape[1]

    return from_bytes


def assert_refused(read, data, match, name="song.bin"):
    with pytest.raises(AudioFileError, match=match) as caught:
        read(data, name)
    message = str(caught.value)
    assert "; " in message
    assert "\n" not in message


each_length = pytest.mark.parametrize("frames", LENGTHS.values(), ids=LENGTHS)
TAGS_BEHIND = {
    "ID3v1": mangle.ID3V1,
    "APE": mangle.APE,
    "APE and ID3v1": mangle.APE + mangle.ID3V1,
    "Lyrics3 v2": mangle.LYRICS,
    "Lyrics3 v1": mangle.LYRICS1,
    "ID3v2 with a footer": mangle.id3v2(footer=True),
    "zeros": bytes(100_000),
}
TAGS_BEFORE = {
    "ID3v2": mangle.id3v2(),
    "ID3v2.3": mangle.id3v2(version=3),
    "ID3v2 with a footer": mangle.id3v2(footer=True),
    "two ID3v2": mangle.id3v2() + mangle.id3v2(5000),
    "a picture": mangle.picture(),
}
each_tag_behind = pytest.mark.parametrize("tag", TAGS_BEHIND.values(), ids=TAGS_BEHIND)
each_tag_before = pytest.mark.parametrize("tag", TAGS_BEFORE.values(), ids=TAGS_BEFORE)


# --- MPEG audio -----------------------------------------------------------------------------------------------


@each_length
@pytest.mark.parametrize("loud_first", [True, False])
@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT", "AVERAGE"])
def test_mp3_without_a_xing_frame_is_read_whole(read, frames, mode, loud_first):
    """LAME writes such files to a pipe. Radio streams and recorders write them too."""
    assert read(mp3(frames, mode, xing=False, loud_first=loud_first)) == pytest.approx(frames, abs=MP3_SLACK)


@each_length
def test_mp3_tells_its_length_before_it_is_read(tmp_path, frames):
    path = tmp_path / "song.mp3"
    for xing in (True, False):
        path.write_bytes(mp3(frames, xing=xing, loud_first=False))
        with AudioReader(path) as reader:
            announced = reader.info.frames
            assert announced == sum(block.shape[1] for block in reader)


@each_tag_behind
@pytest.mark.parametrize("xing", [True, False])
def test_mp3_with_tags_behind(read, tag, xing):
    data = mp3(60_000, xing=xing)
    assert read(data + tag) == pytest.approx(read(data), abs=1152)


@each_tag_before
@pytest.mark.parametrize("xing", [True, False])
def test_mp3_with_tags_before(read, tag, xing):
    data = mp3(60_000, xing=xing)
    assert read(tag + data) == pytest.approx(read(data), abs=1152)
    assert read(tag + bytes(2000) + data, "song.mp3") == pytest.approx(read(data), abs=1152)


@each_tag_behind
def test_tags_do_not_change_the_samples_of_mp3_without_a_xing_frame(read, tag):
    # 200 silent frames of MPEG-1 layer III, 128 kbit/s, 44.1 kHz.
    data = b"\xff\xfb\x90\x00".ljust(417, b"\0") * 200
    assert read(data) == read(data + tag) == 200 * 1152


@each_length
@pytest.mark.parametrize("xing", [True, False])
def test_joined_mp3s(read, frames, xing):
    one, other = mp3(frames, xing=xing), mp3(40_000, xing=xing, loud_first=False)
    whole = frames + 40_000
    assert read(one + other) == pytest.approx(whole, abs=2 * MP3_SLACK)
    tagged = b"".join(mangle.id3v2() + data + mangle.ID3V1 for data in (one, other, one))
    assert read(tagged) == pytest.approx(whole + frames, abs=3 * MP3_SLACK)


@pytest.mark.parametrize("count", [0, 1, 20])
def test_xing_frame_that_counts_too_few_frames(read, count):
    data = bytearray(mp3(280_000))
    at = data.index(b"Xing") + 8
    data[at : at + 4] = struct.pack(">I", count)
    assert read(bytes(data)) == pytest.approx(280_000, abs=MP3_SLACK)


def test_xing_frame_that_counts_too_many_frames(read):
    data = mp3(280_000)
    assert_refused(
        read, data[: len(data) // 2], r"cut off, it announces 6\.\d s and holds [23]\.\d s; copy or download"
    )


def test_mp3_with_something_else_inside(read):
    data = mp3(280_000, "CONSTANT", xing=False)
    middle = len(data) // 2
    assert_refused(
        read, data[:middle] + mangle.noise(9000) + data[middle:], r"is damaged after 3\.\d s \(\d+ bytes are"
    )
    assert_refused(
        read, data + mangle.noise(9000), r"holds 9000 bytes after 6\.\d s that are neither its audio nor a tag"
    )
    # Less than a frame: the rest of one that was cut.
    assert read(data + data[:200]) == read(data)
    assert read(mangle.noise(300) + data, "song.mp3") == pytest.approx(read(data), abs=1152)


def with_metadata(data, step, metadata):
    """Return a dump of a radio stream that keeps the metadata between its bytes (ICY, as Shoutcast servers send it)."""
    return b"".join(data[at : at + step] + metadata for at in range(0, len(data), step))


INTERRUPTIONS = {
    "damaged headers": lambda frames: b"".join(
        b"\0\0" + frame[2:] if index % 10 == 5 else frame for index, frame in enumerate(frames)
    ),
    "cut frames": lambda frames: b"".join(
        frame[:200] if index % 10 == 5 else frame for index, frame in enumerate(frames)
    ),
    "empty radio metadata": lambda frames: with_metadata(b"".join(frames), 16_000, b"\0"),
    "radio metadata": lambda frames: with_metadata(
        b"".join(frames), 16_000, b"\3StreamTitle='a - b';".ljust(49, b"\0")
    ),
}


@pytest.mark.parametrize("interrupt", INTERRUPTIONS.values(), ids=INTERRUPTIONS)
def test_mp3_that_is_interrupted_again_and_again(read, interrupt):
    """Each interruption is shorter than a frame. Together, they could remove a part of the audio without an error."""
    frames = mangle.mpeg_frames(mp3(280_000, "CONSTANT", xing=False))
    assert_refused(
        read,
        interrupt(frames),
        r"is damaged after \d\.\d s and again after \d\.\d s .*; copy or download it again, or take what can be",
    )


def test_joined_mp3s_with_something_between(read):
    """The rest of a cut frame before the next file is no damage, and neither is padding."""
    data = mp3(60_000, "CONSTANT")
    whole = read(data * 4)
    assert read((data + data[-200:]) * 4) == pytest.approx(whole, abs=4 * 1152)
    assert read((data + data[-200:] + mangle.id3v2()) * 4) == pytest.approx(whole, abs=4 * 1152)
    bare = mp3(60_000, "CONSTANT", xing=False)
    assert read((bare + bytes(500)) * 4) == pytest.approx(4 * 60_000, abs=4 * 1152 + MP3_SLACK)


# Bit rate index of MPEG-1 layer II: kbit/s (ISO/IEC 11172-3, 2.4.2.3).
LAYER_2_RATES = {8: 128, 12: 256}


def mp2(indices):
    """Return frames of MPEG-1 layer II at 44.1 kHz that hold silence, one for each bit rate index."""
    frames = (
        struct.pack(">I", 0xFFFD0000 | index << 12).ljust(144_000 * LAYER_2_RATES[index] // RATE, b"\0")
        for index in indices
    )
    return b"".join(frames)


def test_mp2_of_changing_bit_rate(read):
    assert read(mp2([8] * 200), "song.mp2") == 200 * 1152
    for indices in ([8, 12] * 100, [8] * 100 + [12] * 100):
        assert_refused(
            read, mp2(indices), r"MPEG layer II and changes its bit rate, .*; convert it: ffmpeg -i", "song.mp2"
        )


@pytest.mark.parametrize("size", [3, 60, 200])
def test_mp3_that_is_shorter_than_a_frame(read, capfd, size):
    data = mp3(60_000, "CONSTANT", xing=False)
    assert_refused(
        read, data[:size], "named as MPEG audio and holds no MPEG frame near its beginning; copy", "song.mp3"
    )
    assert capfd.readouterr().err == ""


def test_mp3_of_one_frame(read, capfd):
    frame = mangle.mpeg_frames(mp3(60_000, "CONSTANT", xing=False))[0]
    assert 0 < read(frame, "song.mp3") <= 1152
    assert capfd.readouterr().err == ""


def test_many_tags_behind_many_headers_take_no_time(read):
    """The file has 16,000 frame headers without frames. The tags at the end could follow each of them."""
    begin = time.perf_counter()
    with contextlib.suppress(AudioFileError):
        read(b"\xff\xfb\x90\x00" * 16_384 + mangle.ID3V1 * 999, "song.mp3")
    assert time.perf_counter() - begin < 5


def in_riff(data, code=0x55, size=None):
    """Return MPEG audio in a WAV header, MPEGLAYER3WAVEFORMAT (mmreg.h)."""
    form = struct.pack("<HHIIHHHHIHHH", code, 2, RATE, 16_000, 1, 0, 12, 1, 2, 417, 1, 1393)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"fact" + struct.pack("<II", 4, 1)
    chunks += b"data" + struct.pack("<I", len(data) if size is None else size) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


@each_length
@pytest.mark.parametrize("xing", [True, False])
def test_mp3_in_riff(read, frames, xing):
    """Recorders and audio workstations write such files."""
    data = mp3(frames, xing=xing)
    assert read(in_riff(data), "song.wav") == pytest.approx(frames, abs=MP3_SLACK)
    assert read(in_riff(data, size=0xFFFFFFFF), "song.wav") == pytest.approx(frames, abs=MP3_SLACK)
    assert_refused(read, in_riff(data)[:-2000], "cut off")


def test_mp3_in_riff_without_a_frame_of_sound(read):
    assert_refused(read, in_riff(mangle.mpeg_frames(mp3(60_000))[0]), "holds no samples|cannot be read", "song.wav")


def test_mp3s_of_two_rates(read):
    one, other = mp3(60_000), mp3(60_000, rate=48_000)
    assert_refused(
        read, one + other, r"changes after 1\.4 s from 2 channels at 44100 Hz to 2 at 48000 Hz; split it there and"
    )
    assert_refused(read, one + mp3(60_000, channels=1), r"changes after 1\.4 s from 2 channels")


DAMAGES = {
    "padding": lambda data: data + bytes(9000),
    "0xFF": lambda data: data + b"\xff" * 9000,
    "lyrics": lambda data: data + mangle.LYRICS,
    "the rest of a frame": lambda data: data + data[:200],
    "another file": lambda data: data + mangle.id3v2() + data,
    "a hole": lambda data: data[:20_000] + data[20_333:],
    "a long hole": lambda data: data[:20_000] + data[27_000:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("xing", [True, False])
def test_libmpg123_prints_nothing(tmp_path, capfd, damage, xing):
    """It reports bytes between frames on the standard error of the process, so it is given frames only."""
    path = tmp_path / "song.mp3"
    path.write_bytes(damage(mp3(280_000, xing=xing)))
    with contextlib.suppress(AudioFileError):
        read_audio(path)
    assert capfd.readouterr().err == ""


# --- Ogg --------------------------------------------------------------------------------------------------------

OGG = {"Vorbis": ("VORBIS", RATE), "Opus": ("OPUS", 48_000)}
each_ogg = pytest.mark.parametrize(("subtype", "rate"), OGG.values(), ids=OGG)


def flac_in_ogg(data):
    """Return a FLAC file in Ogg (RFC 9639, 10.1): a mark and its signature, then blocks and frames as packets."""
    info, rest = data[:42], data[42:]
    blocks, last = [], info[4] & 0x80
    while not last:
        size = 4 + int.from_bytes(rest[1:4], "big")
        last = rest[0] & 0x80
        blocks.append(rest[:size])
        rest = rest[size:]
    found = [
        at for at in range(len(rest) - 6) if rest[at : at + 2] == b"\xff\xf8" and rest[at + 2 : at + 4] == rest[2:4]
    ]
    frames = [rest[start:stop] for start, stop in zip(found, [*found[1:], len(rest)], strict=True)]
    total = int.from_bytes(info[18:26], "big") & (1 << 36) - 1
    packets = [(0, b"\x7fFLAC\1\0" + struct.pack(">H", len(blocks)) + info)] + [(0, block) for block in blocks]
    packets += [(min(4096 * (index + 1), total), frame) for index, frame in enumerate(frames)]
    file = b""
    for number, (granule, packet) in enumerate(packets):
        flags = 2 * (number == 0) + 4 * (number + 1 == len(packets))
        lacing = b"\xff" * (len(packet) // 255) + bytes([len(packet) % 255])
        head = b"OggS\0" + bytes([flags]) + struct.pack("<qIII", granule, 5, number, 0) + bytes([len(lacing)])
        file += mangle.page(head + lacing + packet)
    return file


@each_ogg
@each_length
def test_chained_ogg_is_read_whole(read, subtype, rate, frames):
    one, other = (made("OGG", count, subtype, rate=rate) for count in (frames, 50_000))
    assert read(one + other) == frames + 50_000
    assert read(one + other + one) == 2 * frames + 50_000
    # Each link may have been stopped, and `cat a.ogg a.ogg` gives both the same serial number.
    assert read(mangle.without_end_flag(one) + mangle.without_end_flag(one)) == pytest.approx(2 * frames, abs=2)


@each_ogg
def test_chained_ogg_tells_no_length(tmp_path, subtype, rate):
    path = tmp_path / "song.ogg"
    path.write_bytes(made("OGG", 60_000, subtype, rate=rate) * 2)
    with AudioReader(path) as reader:
        assert reader.info.frames is None
        assert sum(block.shape[1] for block in reader) == 120_000


def test_chained_ogg_of_two_kinds(read):
    one = made("OGG", 60_000)
    for other in (made("OGG", 60_000, rate=48_000), made("OGG", 60_000, channels=1)):
        assert_refused(
            read,
            one + other,
            r"changes after 1\.4 s from 2 channels at 44100 Hz to .*; split it there and convert the parts",
        )


@each_ogg
@each_length
def test_ogg_without_the_end_flag(read, subtype, rate, frames):
    """Android recorders and messengers write such files."""
    assert read(mangle.without_end_flag(made("OGG", frames, subtype, rate=rate))) == pytest.approx(frames, abs=2)


@each_ogg
def test_ogg_that_is_cut(read, subtype, rate):
    data = made("OGG", 280_000, subtype, rate=rate)
    whole = mangle.pages(data)
    for kept in (len(data) - 1, len(data) // 2, len(data) - len(whole[-1]) + 20):
        assert_refused(read, data[:kept], "cut off")
    # At a page's end nothing tells a cut from a recorder that was stopped: what is there is read.
    rest = read(b"".join(whole[:-1]))
    assert mangle.granule_of(whole[-2]) - 400 <= rest <= mangle.granule_of(whole[-2])


@each_ogg
def test_ogg_with_pages_missing_or_damaged(read, subtype, rate):
    whole = mangle.pages(made("OGG", 280_000, subtype, rate=rate))
    middle = len(whole) // 2
    missing = whole[:middle] + whole[middle + 1 :]
    assert_refused(read, b"".join(missing), r"misses pages before byte \d+; .* ffmpeg -i IN OUT\.flac")
    flipped = bytearray(whole[middle])
    flipped[-1] ^= 1
    assert_refused(read, b"".join([*whole[:middle], bytes(flipped), *whole[middle + 1 :]]), "is not as it was written")
    inserted = [*whole[:middle], mangle.noise(500), *whole[middle:]]
    assert_refused(read, b"".join(inserted), "500 bytes at byte .* are no Ogg page")
    swapped = [*whole[:-1], mangle.page(whole[-1], granule=100)]
    assert_refused(read, b"".join(swapped), "times that go back")
    early = [*whole[:middle], mangle.page(whole[middle], flags=4), *whole[middle + 1 :]]
    assert_refused(read, b"".join(early), "goes on at byte .* after the page that is marked as the last; convert it")
    assert_refused(read, b"".join(whole) + mangle.noise(500), "holds 500 bytes after its last page")
    assert_refused(read, whole[0] + b"".join(mangle.page(one, serial=9) for one in whole[1:]), "belongs to no stream")


@each_ogg
@pytest.mark.parametrize("tag", [mangle.ID3V1, mangle.APE, bytes(5000)])
def test_ogg_with_tags(read, subtype, rate, tag):
    assert read(mangle.id3v2() + made("OGG", 60_000, subtype, rate=rate) + tag) == 60_000


@each_ogg
def test_ogg_cut_from_a_radio_programme(read, tmp_path, subtype, rate):
    """Its time stamps begin late. A relay leaves out the pages between the headers and the current programme."""
    data = made("OGG", 280_000, subtype, rate=rate)
    whole = mangle.pages(data)
    assert read(mangle.shifted(data, 10_000_000)) == pytest.approx(280_000, abs=6000)
    path = tmp_path / "late.ogg"
    path.write_bytes(mangle.shifted(data, 10_000_000))
    with AudioReader(path) as reader:
        assert reader.info.frames is None
    joined = b"".join([*whole[:2], *whole[4:]])
    assert read(joined) == pytest.approx(280_000 - mangle.granule_of(whole[3]), abs=6000)


@pytest.mark.parametrize("scale", [0.5, 0.34, 0])
def test_vorbis_whose_time_stamps_count_too_little(read, scale):
    """A decoder that stops at the last time stamp loses the rest without an error."""
    whole = mangle.pages(made("OGG", 280_000))
    counted = [
        mangle.page(one, granule=int(mangle.granule_of(one) * scale)) if mangle.granule_of(one) > 0 else one
        for one in whole
    ]
    seconds = r"0\.0" if scale == 0 else rf"{280_000 * scale / RATE:.1f}"
    cause = rf"its time stamps announce {seconds} s, and \d+ bytes follow; convert it: ffmpeg -i IN OUT\.flac"
    assert_refused(read, b"".join(counted), cause)


@each_length
def test_vorbis_whose_last_time_stamp_is_zero(read, frames):
    *whole, last = mangle.pages(made("OGG", frames))
    assert_refused(read, b"".join([*whole, mangle.page(last, granule=0)]), r"announce 0\.0 s, and \d+ bytes follow")


def test_opus_without_time_stamps(read):
    whole = mangle.pages(made("OGG", 280_000, "OPUS", rate=48_000))
    untimed = [*whole[:2], *(mangle.page(one, granule=-1) for one in whole[2:])]
    assert_refused(read, b"".join(untimed), r"its time stamps announce \d\.\d s, and \d+ bytes follow; convert it")


@each_ogg
@each_length
def test_ogg_trimmed_at_the_end(read, subtype, rate, frames):
    """RFC 7845, 4.4, and Vorbis I, A.2: the time stamp of the last page may leave out samples of this page."""
    data = mangle.pages(made("OGG", frames, subtype, rate=rate))
    trimmed = mangle.granule_of(data[-1]) - 300
    assert read(b"".join([*data[:-1], mangle.page(data[-1], granule=trimmed)])) == frames - 300


def test_multiplexed_ogg(read):
    whole = mangle.pages(made("OGG", 60_000))
    other = [mangle.page(one, serial=7) for one in mangle.pages(made("OGG", 50_000))]
    both = [whole[0], other[0], *whole[1:3], *other[1:], *whole[3:]]
    assert_refused(read, b"".join(both), r"2 audio streams .* at the same time; .* ffmpeg -i IN -map 0:a:0 OUT\.flac")
    # Ogg Skeleton: a stream without sound beside it.
    bone = b"OggS\0\2" + bytes(8) + struct.pack("<III", 7, 0, 0) + b"\1\x40" + b"fishead\0" + bytes(56)
    end = b"OggS\0\4" + bytes(8) + struct.pack("<III", 7, 1, 0) + b"\1\0"
    assert read(b"".join([mangle.page(bone), whole[0], mangle.page(end), *whole[1:]])) == 60_000


@each_length
def test_flac_in_ogg(read, frames):
    """FLAC in Ogg, which libsndfile 1.2.2 does not open, is read."""
    data = flac_in_ogg(made("FLAC", frames, "PCM_16"))
    assert read(data, "song.oga") == frames
    assert read(data + data, "song.oga") == 2 * frames
    assert_refused(read, data[:-10], "cut off")


def test_flac_in_ogg_cut_from_a_programme_soon_after_its_start(read):
    """Pages may be missing after the headers. The time stamps begin at 5 blocks of 4,096 samples, below 65,535."""
    headers, *whole = mangle.pages(flac_in_ogg(made("FLAC", 60_000, "PCM_16")))
    blocks = [one for one in whole if mangle.granule_of(one) == 0]
    frames = whole[len(blocks) :]
    assert read(b"".join([headers, *blocks, *frames[4:]]), "song.oga") == 60_000 - 4 * 4096
    shifted = mangle.shifted(b"".join([headers, *whole]), 5 * 4096)
    assert read(shifted, "song.oga") == 60_000


# --- FLAC -------------------------------------------------------------------------------------------------------


@each_length
@pytest.mark.parametrize("counted", [0, 1, 30_000, None])
def test_flac_that_counts_too_few_samples_is_read_whole(read, frames, counted):
    data = made("FLAC", frames, "PCM_16")
    assert read(mangle.flac_count(data, frames - 1 if counted is None else counted)) == frames


@each_length
def test_flac_that_is_cut_or_counts_too_many_samples(read, frames):
    data = made("FLAC", frames, "PCM_16")
    assert_refused(read, mangle.flac_count(data, frames + 1), "cut off, it announces more than it holds")
    assert_refused(read, data[: len(data) // 2], "cut off|is damaged after")
    assert_refused(read, mangle.flac_count(data[:-1], 0), "is damaged after|cut off")


@pytest.mark.parametrize("counted", [0, 60_000])
@each_tag_behind
def test_flac_with_tags_behind(read, tag, counted):
    assert read(mangle.flac_count(made("FLAC", 60_000, "PCM_16"), counted) + tag) == 60_000


@pytest.mark.parametrize("counted", [0, 60_000])
@each_tag_before
def test_flac_with_tags_before(read, tag, counted):
    assert read(tag + mangle.flac_count(made("FLAC", 60_000, "PCM_16"), counted)) == 60_000


def test_flac_whose_samples_hold_the_letters_of_a_tag(read):
    samples = np.random.RandomState(0).randint(-(2**15), 2**15, 20_000).astype(np.int16)
    samples[15_000:15_002] = np.frombuffer(b"DI\x033", np.int16)
    file = io.BytesIO()
    sf.write(file, samples, RATE, format="FLAC")
    assert b"ID3" in file.getvalue()[-(2**14) :]
    assert read(file.getvalue()) == len(samples)


@each_length
def test_joined_flacs(read, frames):
    one, other = made("FLAC", frames, "PCM_16"), made("FLAC", 50_000, "PCM_16")
    assert read(one + other) == frames + 50_000
    assert read(one + one) == 2 * frames
    assert read(mangle.id3v2() + one + mangle.ID3V1 + mangle.id3v2() + other + mangle.ID3V1) == frames + 50_000


def test_many_empty_flac_streams_take_no_time(read):
    """Each is a STREAMINFO block and an empty block of padding."""
    data = made("FLAC", 60_000, "PCM_16")
    begin = time.perf_counter()
    assert_refused(read, (data[:42] + b"\x81\0\0\0") * 20_000, "holds more than 1000 FLAC streams without samples")
    assert time.perf_counter() - begin < 5


def test_flac_with_something_else_behind(read):
    data = made("FLAC", 60_000, "PCM_16")
    assert_refused(read, data + mangle.noise(90_000), r"holds \d+ bytes from its last frame on that are neither")


# --- Chunks -----------------------------------------------------------------------------------------------------


def chunk(name, body, order="<"):
    return name + struct.pack(f"{order}I", len(body)) + body + bytes(len(body) % 2)


CHUNKED = {
    "WAV": ("WAV", b"data", "<"),
    "WAVEX": ("WAVEX", b"data", "<"),
    "AIFF": ("AIFF", b"SSND", ">"),
}
each_chunked = pytest.mark.parametrize(("container", "name", "order"), CHUNKED.values(), ids=CHUNKED)


@each_chunked
@each_length
def test_samples_that_a_header_does_not_count(read, container, name, order, frames):
    data = made(container, frames, "PCM_16")
    size = int.from_bytes(data[data.index(name) + 4 :][:4], "little" if order == "<" else "big")
    assert_refused(
        read,
        mangle.set_size(data, name, size - 40_000, order),
        r"40000 bytes follow the samples that it announces.*; take what it announces: ffmpeg -i IN OUT\.flac",
    )
    assert_refused(read, mangle.set_size(data, name, size + 40_000, order), "cut off")
    assert_refused(read, data[:-2000], "cut off")


@each_chunked
@pytest.mark.parametrize("size", [0x7FFFF000, 0x80000000, 0xFFFFFFFF])
def test_size_that_a_pipe_leaves(read, container, name, order, size):
    data = made(container, 60_000, "PCM_16")
    assert read(mangle.set_size(data, name, size, order)) == 60_000


def test_recorder_that_was_stopped_too_early(read):
    data = made("WAV", 60_000, "PCM_16")
    assert read(mangle.set_size(data, b"data", 0)) == 60_000
    empty = mangle.set_size(data, b"data", 0)[: data.index(b"data") + 8]
    assert_refused(read, empty + chunk(b"LIST", b"INFOx"), "holds no samples|has no")


@each_chunked
def test_chunks_behind_the_samples(read, container, name, order):
    del name
    data = made(container, 60_001, "PCM_U8", channels=1)
    frames = read(data)
    assert frames - 60_001 in (0, 1)
    trailing = b"".join(chunk(one, bytes(5), order) for one in (b"LIST", b"id3 ", b"odd ", b"bext"))
    assert read(data + trailing) == frames
    assert read(data + trailing[:-6]) == frames
    # The byte that pads an odd size is often missing, here that of the samples.
    if order == "<":
        assert read(data.removesuffix(b"\0") + trailing) == frames
    assert read(data + mangle.ID3V1 + bytes(2000)) == frames
    assert read(mangle.id3v2() + data) == frames
    assert_refused(read, data + trailing + mangle.noise(700), "700 bytes after its last chunk|cut off")


def test_w64_from_a_pipe_behind_a_tag(read):
    data = made("W64", 60_000, "PCM_16")
    # FFmpeg leaves -1 as the size of the file and 2**63 - 1 as that of the samples, each behind a GUID of 16 bytes.
    at = data.index(b"data") + 16
    piped = data[:16] + b"\xff" * 8 + data[24:at] + b"\xff" * 7 + b"\x7f" + data[at + 8 :]
    assert read(piped) == read(mangle.id3v2() + piped) == 60_000


def test_chunks_behind_the_samples_of_w64(read):
    data = made("W64", 60_000, "PCM_16")
    # Sony Pictures Digital, Wave64: a GUID of 16 bytes, the size with this header, 8 bytes each.
    junk = bytes.fromhex("6a756e6bf3acd3118cd100c04f8edb8a") + struct.pack("<Q", 24 + 800) + mangle.noise(800)
    assert read(data + junk) == 60_000
    assert read(data + mangle.ID3V1) == 60_000


@pytest.mark.parametrize("rest", [b"\r\n", b"abc"])
def test_less_than_a_frame_behind_the_samples(read, rest):
    data = made("WAV", 60_000, "PCM_16")
    assert read(data + rest) == 60_000
    assert_refused(read, data + rest + b"de", r"bytes follow the samples that it announces")


def test_place_of_damage_in_flac(read):
    """The decoder reports damage for a block of the reader, which is 6 s long."""
    data = bytearray(made("FLAC", 600_000, "PCM_16"))
    data[len(data) * 3 // 4] ^= 0x55
    assert_refused(read, bytes(data), r"is damaged after 5\.9 s, before 11\.9 s \(.*; copy or download it again")


def test_second_chunk_of_samples(read):
    data = made("WAV", 60_000, "PCM_16")
    # ffmpeg reads the last one only, and SoX the first one.
    assert_refused(
        read, data + chunk(b"data", mangle.noise(40_000)), "its samples in 2 chunks.*; split it, so that each"
    )


@pytest.mark.parametrize(
    "trailing", [b"", chunk(b"LIST", b"INFOx"), chunk(b"odd ", bytes(5)) + chunk(b"LIST", b"INFOx")]
)
def test_empty_chunks_of_samples_beside_the_real_one(tmp_path, trailing):
    data = made("WAV", 60_000, "PCM_16")
    start, path = data.index(b"data"), tmp_path / "song.wav"
    path.write_bytes(data)
    expected, _ = read_audio(path)
    empty = chunk(b"data", b"")
    for mangled in (data[:start] + empty + data[start:] + trailing, data + empty + trailing):
        path.write_bytes(mangled)
        assert np.array_equal(read_audio(path)[0], expected)


def test_wav_that_counts_one_frame_too_many(read):
    data = made("WAV", 60_000, "PCM_16")
    cure = r"; copy or download it again, or take what it holds: ffmpeg -i IN OUT\.flac"
    assert_refused(read, mangle.set_size(data, b"data", 60_000 * 4 + 4), f"cut off.*{cure}")


@pytest.mark.parametrize("container", ["WAV", "WAVEX", "AIFF", "RF64", "W64"])
@each_length
def test_files_of_chunks_joined(read, container, frames):
    one, other = made(container, frames, "PCM_16"), made(container, 50_000, "PCM_16")
    assert read(one + other) == frames + 50_000
    assert_refused(read, one + made(container, 50_000, "PCM_16", rate=48_000), r"changes after .* Hz")


@pytest.mark.parametrize("container", ["AU", "NIST", "AVR", "PAF", "IRCAM", "PVF", "VOC", "MAT4", "MAT5", "SVX", "CAF"])
def test_nothing_is_lost_in_other_containers(read, container):
    channels = 1 if container == "SVX" else 2
    data = made(container, 60_000, "PCM_16", channels=channels)
    assert read(data) == pytest.approx(60_000, abs=4)
    for appended, least in ((data, 120_000), (mangle.ID3V1 + bytes(5000), 60_000)):
        with contextlib.suppress(AudioFileError):
            assert read(data + appended) >= least


def voc(*blocks):
    """Return a VOC file (Creative Voice File, version 1.20) of these blocks, each of a type and its content."""
    head = b"Creative Voice File\x1a" + struct.pack("<HHH", 26, 0x0114, 0x111F)
    return head + b"".join(bytes([kind]) + len(body).to_bytes(3, "little") + body for kind, body in blocks)


# Rate, bits, channels and coding (4: signed 16 bits) of a block of type 9.
VOC_FORMAT = struct.pack("<IBBHI", RATE, 16, 2, 4, 0)


def test_voc_of_several_blocks(read):
    """FFmpeg (libavformat/vocenc.c) writes a block for each packet, of which only the first tells the coding."""
    samples = bytes(4 * 10_000)
    assert read(voc((9, VOC_FORMAT + samples)) + b"\0") == 10_000
    assert read(voc((5, b"a song\0"), (9, VOC_FORMAT + samples)) + b"\0") == 10_000
    several = r"in several blocks, and libsndfile takes the headers .*; convert it: ffmpeg -i IN OUT\.flac"
    assert_refused(read, voc((9, VOC_FORMAT + samples), (2, samples)), several)
    # Silence: its length and rate.
    assert_refused(read, voc((9, VOC_FORMAT + samples), (3, b"\x10\x27\0"), (9, VOC_FORMAT + samples)), several)


def test_voc_that_counts_wrong(read):
    data = voc((9, VOC_FORMAT + bytes(4 * 10_000))) + b"\0"
    assert_refused(read, data + data, r"holds \d+ bytes after the samples that it counts; split it there if files were")
    assert_refused(read, data[:-5000], "cut off")
    # SoX 14.4.2 counts the 8 bytes of the format that follow the rate out.
    short = data[:27] + (len(data) - 39).to_bytes(3, "little") + data[30:]
    assert read(short) == 10_000


def test_stereo_8svx(read):
    """SoX (8svx.c) writes a CHAN chunk of value 6, all samples of the left channel, then those of the right one."""
    data = made("SVX", 60_000, "PCM_S8", channels=1)
    at = data.index(b"BODY")
    for value, match in ((2, None), (6, r"8SVX with two channels one after the other; convert it: ffmpeg")):
        stereo = data[:at] + chunk(b"CHAN", struct.pack(">I", value), ">") + data[at:]
        if match:
            assert_refused(read, stereo, match)
        else:
            assert read(stereo) == 60_000


COUNTED = {"NIST": 2, "SDS": 1, "AVR": 2, "MPC2K": 2, "WVE": 1}


@pytest.mark.parametrize("container", COUNTED)
def test_header_that_counts_the_samples(read, container):
    subtype, rate = ("ALAW", 8000) if container == "WVE" else ("PCM_16", RATE)
    data = made(container, 60_000, subtype, rate=rate, channels=COUNTED[container])
    assert read(data) == 60_000
    assert read(data + mangle.ID3V1) == 60_000
    assert_refused(read, data + b"\xff" * 5000, "holds 5000 bytes after the samples that it counts that are neither")
    assert_refused(read, data[: len(data) // 2], "cut off, it announces more than it holds")
    assert_refused(read, data[:-200], "cut off, it announces more than it holds")
    assert_refused(read, data + mangle.noise(500), "holds 500 bytes after the samples that it counts that are neither")


def test_au_of_a_recorder_that_was_stopped_too_early(read):
    data = made("AU", 60_000, "PCM_16")
    assert read(data[:8] + bytes(4) + data[12:]) == 60_000
    assert read(data[:8] + bytes(4) + data[12:] + mangle.ID3V1) == 60_000


# --- Channels ---------------------------------------------------------------------------------------------------


def tones(path):
    """Return the strongest frequency of each channel, in Hz."""
    audio, rate = read_audio(path)
    return [round(float(np.argmax(np.abs(np.fft.rfft(row))) * rate / audio.shape[1]), -1) for row in audio]


LEFT, RIGHT, CENTRE = 440, 880, 1320


def write_tones(path, container, subtype, order, rate=48_000):
    """Write a second of one tone a channel; the low and other channels get tones of their own."""
    time = np.arange(rate) / rate
    samples = np.stack([0.3 * np.sin(2 * np.pi * tone * time) for tone in order], axis=1)
    sf.write(path, samples, rate, subtype, format=container)


# Vorbis I, 4.3.9, and RFC 7845, 5.1.1.2.
VORBIS_ORDERS = {
    2: [LEFT, RIGHT],
    3: [LEFT, CENTRE, RIGHT],
    4: [LEFT, RIGHT, 2000, 3000],
    5: [LEFT, CENTRE, RIGHT, 2000, 3000],
    6: [LEFT, CENTRE, RIGHT, 2000, 3000, 60],
    7: [LEFT, CENTRE, RIGHT, 2000, 3000, 4000, 60],
    8: [LEFT, CENTRE, RIGHT, 2000, 3000, 4000, 5000, 60],
}


@pytest.mark.parametrize("channels", VORBIS_ORDERS)
@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_left_and_right_of_surround_sound_in_ogg(tmp_path, channels, subtype):
    path = tmp_path / "song.ogg"
    write_tones(path, "OGG", subtype, VORBIS_ORDERS[channels])
    assert tones(path)[:2] == [LEFT, RIGHT]


def with_mask(data, mask):
    """Return a WAVEFORMATEXTENSIBLE file with another channel mask."""
    at = data.index(b"fmt ") + 8 + 20
    return data[:at] + struct.pack("<I", mask) + data[at + 4 :]


def test_left_and_right_by_the_channel_mask(tmp_path):
    path = tmp_path / "song.wav"
    write_tones(path, "WAVEX", "PCM_16", [LEFT, RIGHT, CENTRE, 60, 2000, 3000])
    data = path.read_bytes()
    # None, the usual one, and one that does not fit the six channels.
    for mask in (0, 0x3F, 0x7):
        path.write_bytes(with_mask(data, mask))
        assert tones(path)[:2] == [LEFT, RIGHT]
    # The stereo downmix of FFmpeg, here before four other channels.
    path.write_bytes(with_mask(data, 0x60000000 | 0x4 | 0x8 | 0x100 | 0x800))
    assert tones(path)[:2] == [2000, 3000]
    # Centre, low frequencies, back left, back right and the two sides.
    path.write_bytes(with_mask(data, 0x63C))
    assert tones(path)[:2] == [CENTRE, 60]
    path.write_bytes(with_mask(data, 0x1 | 0x4 | 0x8 | 0x100 | 0x800 | 0x2000))
    with pytest.raises(
        AudioFileError, match=r"6 channels of mask 0x290d, so it has no left and right .* -ac 2 OUT\.flac"
    ):
        read_audio(path)


def test_channel_mask_in_flac(tmp_path):
    """RFC 9639, 8.6.2: a comment names the mask of an unusual order."""
    path = tmp_path / "song.flac"
    data = made("FLAC", 60_000, "PCM_16", channels=3)
    comment = b"WAVEFORMATEXTENSIBLE_CHANNEL_MASK=0x0304"
    body = struct.pack("<II", 0, 1) + struct.pack("<I", len(comment)) + comment
    block = b"\4" + len(body).to_bytes(3, "big") + body
    path.write_bytes(data[:4] + b"\0" + data[5:42] + block + data[42:])
    with pytest.raises(AudioFileError, match="mask 0x304, so it has no left and right"):
        read_audio(path)


# Core Audio layout tags (CoreAudioBaseTypes.h): number, order of left, right and centre; None if there are none.
LAYOUTS = {
    "MPEG 3.0 A": (113, [LEFT, RIGHT, CENTRE]),
    "MPEG 3.0 B": (114, [CENTRE, LEFT, RIGHT]),
    "AC-3 3.0": (150, [LEFT, CENTRE, RIGHT]),
    "mid and side": (104, None),
    "unknown": (400, None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("container", ["AIFF", "CAF"])
def test_left_and_right_by_the_core_audio_layout(tmp_path, container, layout):
    number, order = LAYOUTS[layout]
    path = tmp_path / "song.bin"
    write_tones(path, container, "PCM_16", order or [LEFT, RIGHT, CENTRE])
    data = path.read_bytes()
    body = struct.pack(">III", number << 16 | 3, 0, 0)
    if container == "AIFF":
        new = b"CHAN" + struct.pack(">I", len(body)) + body
        at = data.index(b"SSND")
        data = data[:4] + struct.pack(">I", len(data) + len(new) - 8) + data[8:at] + new + data[at:]
    else:
        at = data.index(b"data")
        data = data[:at] + b"chan" + struct.pack(">Q", len(body)) + body + data[at:]
    path.write_bytes(data)
    if order:
        assert tones(path)[:2] == [LEFT, RIGHT]
    else:
        with pytest.raises(AudioFileError, match="no left and right"):
            read_audio(path)


@pytest.mark.parametrize("second", [False, True])
def test_left_and_right_beyond_the_channels(read, second):
    """The layout describes five channels of a file of two, or a second header counts six."""
    data = made("CAF", 60_000, "PCM_16")
    if second:
        header = data.index(b"desc")
        end = header + 12 + 32
        # Channel bitmap: the stereo downmix of FFmpeg after four other channels.
        body = struct.pack(">III", 1 << 16, 0x60000000 | 0x4 | 0x8 | 0x100 | 0x800, 0)
        data = data[:end] + data[header : header + 36] + struct.pack(">I", 6) + data[header + 40 : end] + data[end:]
    else:
        labels = (3, 4, 5, 1, 2)
        body = struct.pack(">III", 0, 0, 5) + b"".join(struct.pack(">II12x", label, 0) for label in labels)
    at = data.index(b"data")
    data = data[:at] + b"chan" + struct.pack(">Q", len(body)) + body + data[at:]
    assert_refused(read, data, "names left and right among more channels than the 2 that it holds; convert it")


MANY_STREAMS = {
    "WAV": lambda: b"RIFF\4\0\0\0WAVE" * 20_000,
    "FLAC": lambda: (made("FLAC", 1000, "PCM_16")[:42] + b"\x81\0\0\0" + bytes(8)) * 20_000,
    "Ogg": lambda: b"".join(
        mangle.page(b"OggS\0\2" + bytes(8) + struct.pack("<III", serial, 0, 0) + b"\1\0") for serial in range(20_000)
    ),
    # Stereo and mono frames of 72 bytes: MPEG-2.5 layer III, 8 kbit/s, 8 kHz.
    "MP3": lambda: b"".join(b"\xff\xe3\x18" + mode + bytes(68) for mode in [b"\0"] * 3 + [b"\xc0", b"\0"] * 10_000),
}


@pytest.mark.parametrize("make", MANY_STREAMS.values(), ids=MANY_STREAMS)
def test_many_streams_take_no_memory(read, make):
    assert_refused(read, make(), "holds more than 10000 streams; split it")


# --- How files are read -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="/proc is Linux")
@pytest.mark.parametrize(
    ("container", "tag", "frames"),
    [("WAV", b"", 280_000), ("FLAC", b"", 280_000), ("OGG", b"", 280_000), ("WAV", mangle.id3v2(), 4_300_000)],
    ids=["WAV", "FLAC", "OGG", "behind a tag"],
)
def test_disk_that_fails(tmp_path, container, tag, frames):
    """The descriptor is replaced by that of a folder, from which nothing can be read.

    Behind a tag, a file of 16 MiB or less is read completely when it is opened.
    """
    path = tmp_path / "song.bin"
    path.write_bytes(tag + made(container, frames))
    folder = os.open(tmp_path, os.O_RDONLY)
    with AudioReader(path, block=4096) as reader:
        blocks = iter(reader)
        next(blocks)
        (descriptor,) = (
            int(name) for name in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{name}") == str(path)
        )
        os.dup2(folder, descriptor)
        with pytest.raises(AudioFileError, match=r"cannot be read \(.*\); check the disk$"):
            list(blocks)
    os.close(folder)


def test_mp3_whose_length_libmpg123_estimates_wrong_is_read_from_its_beginning(tmp_path):
    """It is opened twice, the second time with a frame that counts the others."""
    path = tmp_path / "song.mp3"
    path.write_bytes(mp3(280_000, xing=False, loud_first=False))
    audio, _ = read_audio(path)
    path.write_bytes(mangle.id3v2() + path.read_bytes())
    assert np.array_equal(read_audio(path)[0], audio)


def test_system_without_files_in_memory(tmp_path, monkeypatch):
    """Containers may forbid them. Then the decoder calls Python to read parts of a file."""

    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    path = tmp_path / "song.mp3"
    path.write_bytes(mangle.id3v2() + mp3(60_000))
    audio, _ = read_audio(path)
    monkeypatch.setattr(os, "memfd_create", refuse, raising=False)
    assert np.array_equal(read_audio(path)[0], audio)


def test_memory_of_long_streams_is_flat(tmp_path):
    path = tmp_path / "song.bin"
    for data in (mp3(280_000, xing=False) * 8, made("OGG", 280_000) * 8, made("FLAC", 280_000, "PCM_16") * 8):
        path.write_bytes(data)
        with AudioReader(path, block=4096) as reader:
            next(iter(reader))
            tracemalloc.start()
            try:
                frames = sum(block.shape[1] for block in reader)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
        assert frames > 2_000_000
        assert peak < 2e6


def read_often(path):
    for _ in range(50):
        read_audio(path)


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_interrupt_while_the_decoder_reads_is_not_lost(tmp_path):
    """The decoder calls Python to read such files. An exception there would be printed and lost."""
    path = tmp_path / "song.mp3"
    path.write_bytes(mp3(280_000, loud_first=False, xing=False) * 20)
    before = signal.getsignal(signal.SIGINT)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        read_often(path)
    timer.join()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("container", ["WAV", "FLAC", "MP3", "OGG", "AIFF"])
def test_files_with_the_suffix_of_raw_samples(read, container):
    """Some recorders and scripts give this suffix to all files. The content tells the format."""
    data = made(container, 60_000)
    assert read(data, "song.RAW") == read(data, "song.raw") == read(data)


def test_files_are_read_in_any_thread(tmp_path):
    path = tmp_path / "song.mp3"
    path.write_bytes(mp3(60_000, xing=False))
    found = []
    thread = threading.Thread(target=lambda: found.append(read_audio(path)[0]))
    thread.start()
    thread.join()
    assert np.array_equal(found[0], read_audio(path)[0])


def test_reading_needs_no_torch(tmp_path):
    path = tmp_path / "song.wav"
    sf.write(path, sound(1000), RATE)
    code = (
        "import sys; from samekit.audio import read_audio; read_audio(sys.argv[1]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True, timeout=60)
