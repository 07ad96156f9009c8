"""Files that FFmpeg reads through PyAV, compared with what the program ffmpeg reads from them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import zlib

import hostile
import numpy as np
import pytest
import soundfile as sf
from helpers import RATE, FakeBackend, assert_close, assert_one_line, noise

from samekit import AutoencoderModel
from samekit.audio import AV_SUFFIXES, INSTALL_AV, AudioReader, read_audio, readable_suffixes
from samekit.dataset import sources
from samekit.dataset.options import PreEncodeOptions
from samekit.dataset.run import pre_encode
from samekit.errors import AudioFileError

SAMPLES = 100_001

# Options of ffmpeg for each file, which is made from a stereo WAV file. A name with "video" has pictures too, one with
# "surround" is made from 5.1 channels.
COMMANDS = {
    "aac.m4a": "-c:a aac",
    "faststart.m4a": "-c:a aac -movflags +faststart",
    "alac.m4a": "-c:a alac",
    "alac-24.m4a": "-c:a alac -sample_fmt s32p",
    "mono.m4a": "-c:a aac -ac 1",
    "8000.m4a": "-c:a aac -ar 8000",
    "mp3.mp4": "-c:a mp3",
    "opus.mp4": "-c:a libopus -ar 48000",
    "fragments.mp4": "-c:a aac -movflags frag_keyframe+empty_moov+default_base_moof -frag_duration 500000",
    "pcm.mov": "-c:a pcm_s24le",
    "aac.aac": "-c:a aac",
    "wmav2.wma": "-c:a wmav2",
    "opus.webm": "-c:a libopus -ar 48000",
    "opus.mka": "-c:a libopus -ar 48000",
    "flac.mka": "-c:a flac",
    "vorbis.mka": "-c:a libvorbis",
    "aac.mka": "-c:a aac",
    "float.mka": "-c:a pcm_f64le",
    "bytes.avi": "-c:a pcm_u8",
    "aac.flv": "-c:a aac",
    "ac3.ac3": "-c:a ac3",
    "eac3.eac3": "-c:a eac3",
    "wavpack.wv": "-c:a wavpack",
    "tta.tta": "-c:a tta",
    "surround.m4a": "-c:a aac",
    "surround-alac.m4a": "-c:a alac",
    "surround.ac3": "-c:a ac3",
    "surround.webm": "-c:a libopus -ar 48000 -mapping_family 1",
    "video.mp4": "-c:v mpeg4 -c:a aac",
    "video.mov": "-c:v mpeg4 -c:a aac",
    "video.mkv": "-c:v mpeg4 -c:a aac",
    "video.m2ts": "-c:v mpeg2video -c:a aac",
    "video.avi": "-c:v mpeg4 -c:a mp3",
    "video.wmv": "-c:v wmv2 -c:a wmav2",
    "video.mpg": "-c:v mpeg1video -c:a mp2",
}
# Formats that keep each sample.
LOSSLESS = ("alac.m4a", "alac-24.m4a", "pcm.mov", "flac.mka", "float.mka", "wavpack.wv", "tta.tta", "surround-alac.m4a")
# Formats whose files tell the length of the sound.
EXACT = (
    *LOSSLESS,
    "aac.m4a",
    "faststart.m4a",
    "mono.m4a",
    "opus.webm",
    "opus.mka",
    "surround.m4a",
    "video.mp4",
)


def ffmpeg(*arguments):
    return subprocess.run(["ffmpeg", "-v", "error", "-y", *map(str, arguments)], capture_output=True, check=True).stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function that makes a file, once: name -> path. `source.wav` and `surround.wav` are there."""
    pytest.importorskip("av", reason="needs samekit[av]")
    if shutil.which("ffmpeg") is None:
        pytest.skip("ffmpeg is not on PATH; on Debian: apt install ffmpeg")
    folder = tmp_path_factory.mktemp("made")
    time = np.arange(SAMPLES) / RATE
    tones = [np.sin(2 * np.pi * (300 + 100 * index) * time + 40 * time**2) for index in range(6)]
    # The left and right channels of 5.1 sound, the centre, the low frequencies, and those behind.
    audio = 0.2 * np.stack(tones, axis=1) + noise((SAMPLES, 6), level=0.01)
    sf.write(folder / "source.wav", audio[:, :2], RATE, "PCM_16")
    sf.write(folder / "plain.wav", audio, RATE, "PCM_16")
    ffmpeg("-channel_layout", "5.1", "-i", folder / "plain.wav", "-c", "copy", folder / "surround.wav")

    def make(name):
        if not (folder / name).exists():
            source = folder / ("surround.wav" if "surround" in name else "source.wav")
            pictures = ["-f", "lavfi", "-i", "testsrc=s=160x120:r=25:d=2.2"] if "video" in name else []
            ffmpeg("-i", source, *pictures, *COMMANDS[name].split(), folder / name)
        return folder / name

    return make


def decoded_by_ffmpeg(path, channels):
    samples = np.frombuffer(ffmpeg("-i", path, "-f", "f32le", "-"), np.float32)
    return samples.reshape(-1, channels).T


def refusal(path, match="; "):
    """Read a file to its end, and check how it is refused."""
    with pytest.raises(AudioFileError, match=match) as caught:
        read_audio(path)
    assert_one_line(caught.value)
    assert str(path) in str(caught.value)


# --- What is read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_samples_are_those_of_ffmpeg(made, name):
    path = made(name)
    with AudioReader(path, 5000) as reader:
        audio = np.concatenate(list(reader), axis=1)
        assert reader.info.frames in (None, audio.shape[1])
        assert reader.info.channels == audio.shape[0]
        assert reader.info.decoder.startswith("FFmpeg ")
        assert "(PyAV " in reader.info.decoder
    expected = decoded_by_ffmpeg(path, audio.shape[0])
    # ffmpeg keeps the padding of the encoder in MP4 files, at most two of its frames.
    assert (
        audio.shape[1] <= expected.shape[1] <= audio.shape[1] + (2048 if path.suffix in (".m4a", ".mp4", ".mov") else 0)
    )
    assert_close(expected[:, : audio.shape[1]], audio, 110)
    if name in LOSSLESS:
        source, _ = read_audio(path.with_name("surround.wav" if "surround" in name else "source.wav"))
        assert np.array_equal(audio, source)
    if name in EXACT:
        assert audio.shape[1] == -(-SAMPLES * reader.info.sample_rate // RATE)


def test_names_of_formats_and_codecs(made):
    found = {}
    for name in ("aac.m4a", "alac.m4a", "mp3.mp4", "opus.webm", "wmav2.wma", "aac.aac", "pcm.mov", "video.avi"):
        with AudioReader(made(name)) as reader:
            found[name] = f"{reader.info.format} {reader.info.subtype}"
    assert found == {
        "aac.m4a": "MP4 aac",
        "alac.m4a": "MP4 alac",
        "mp3.mp4": "MP4 mp3",
        "opus.webm": "Matroska opus",
        "wmav2.wma": "ASF wmav2",
        "aac.aac": "AAC aac",
        "pcm.mov": "MP4 pcm_s24le",
        "video.avi": "AVI mp3",
    }


def box(kind, *contents):
    content = b"".join(contents)
    return struct.pack(">I4s", 8 + len(content), kind) + content


def with_box(data, kind, addition):
    """Append a box to the last box of a file, which is of this kind."""
    at = data.rindex(kind) - 4
    (size,) = struct.unpack_from(">I", data, at)
    assert at + size == len(data)
    return data[:at] + struct.pack(">I", size + len(addition)) + data[at + 4 :] + addition


@pytest.mark.parametrize("tag", [False, True])
def test_length_that_itunes_writes(made, tmp_path, tag):
    """The fields of the tag iTunSMPB: 0, samples of delay, samples of padding, samples of the sound, and more."""
    data = made("aac.m4a").read_bytes().replace(b"edts", b"free")
    if tag:
        # Less than the packets hold, as in files whose last packet is full.
        text = f" 00000000 00000400 000003D7 {SAMPLES - 200:016X} 00000000 00000000".encode()
        item = box(
            b"----",
            box(b"mean", bytes(4), b"com.apple.iTunes"),
            box(b"name", bytes(4), b"iTunSMPB"),
            box(b"data", struct.pack(">II", 1, 0), text),
        )
        handler = box(b"hdlr", bytes(8), b"mdirappl", bytes(9))
        data = with_box(data, b"moov", box(b"udta", box(b"meta", bytes(4), handler, box(b"ilst", item))))
    (tmp_path / "song.m4a").write_bytes(data)
    audio, _ = read_audio(tmp_path / "song.m4a")
    whole, _ = read_audio(made("aac.m4a"))
    if tag:
        assert np.array_equal(audio, whole[:, : SAMPLES - 200])
    else:
        assert np.array_equal(audio[:, 1024:], whole)


def test_length_of_an_edit(made, tmp_path):
    """It is in milliseconds here. Other programs write it in samples, and fill the last packet."""
    data = bytearray(made("aac.m4a").read_bytes())
    movie, edit = data.index(b"mvhd") + 4, data.index(b"elst") + 4
    assert struct.unpack_from(">I", data, movie + 12) == (1000,)
    assert struct.unpack_from(">II", data, edit + 8)[1] == 1024
    for length in (SAMPLES - 200, SAMPLES - 1500):
        struct.pack_into(">II", data, movie + 12, RATE, length)
        struct.pack_into(">I", data, edit + 8, length)
        (tmp_path / "song.m4a").write_bytes(data)
        with AudioReader(tmp_path / "song.m4a") as reader:
            assert reader.info.frames == length
            audio = np.concatenate(list(reader), axis=1)
        assert np.array_equal(audio, read_audio(made("aac.m4a"))[0][:, :length])


def test_default_sound_of_several(made, tmp_path, caplog):
    for default in (0, 1):
        path = tmp_path / f"{default}.mka"
        dispositions = [f"-disposition:a:{index} {'default' if index == default else '0'}" for index in (0, 1)]
        inputs = ["-i", made("aac.m4a").with_name("source.wav"), "-i", made("aac.m4a").with_name("surround.wav")]
        ffmpeg(*inputs, "-map", "0", "-map", "1", "-c:a", "flac", *" ".join(dispositions).split(), path)
        caplog.clear()
        with AudioReader(path) as reader:
            assert reader.info.channels == (2, 6)[default]
        assert [record.getMessage() for record in caplog.records] == [
            f"{path}: holds 2 sounds; number {1 + default} is read"
        ]


def test_files_with_tags_and_other_suffixes(made, tmp_path):
    """The content tells the format."""
    whole, _ = read_audio(made("aac.aac"))
    tag = b"ID3\x04\x00\x00\x00\x00\x00\x0a" + bytes(10)
    (tmp_path / "song.bin").write_bytes(tag + made("aac.aac").read_bytes())
    assert np.array_equal(read_audio(tmp_path / "song.bin")[0], whole)
    name = "a song: größer %d \udcff.wav"
    (tmp_path / name).write_bytes(made("aac.m4a").read_bytes())
    assert np.array_equal(read_audio(tmp_path / name)[0], read_audio(made("aac.m4a"))[0])


def test_latents_and_what_is_recorded(made, tmp_path):
    model = AutoencoderModel(FakeBackend(lambda _, audio: np.repeat(audio[:, :, ::8], 2, axis=1)))
    records = {}
    for name in ("alac.m4a", "source.wav"):
        records[name] = model.encode_file(made("alac.m4a").with_name(name), tmp_path / f"{name}.npy")
    one, other = (np.load(tmp_path / f"{name}.npy") for name in records)
    assert np.array_equal(one, other)
    assert np.abs(one).max() > 0.1
    assert records["alac.m4a"]["samples"] == records["source.wav"]["samples"] == SAMPLES
    assert records["alac.m4a"]["decoder"].startswith("FFmpeg ")
    assert records["source.wav"]["decoder"].startswith("libsndfile ")


def test_dataset(made, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("aac.m4a", "video.mkv", "opus.webm"):
        shutil.copyfile(made(name), data / name)
        (data / name).with_suffix(".txt").write_text("a caption")
    for crop in ("start", "random"):
        out = tmp_path / crop
        report = pre_encode(AutoencoderModel(FakeBackend()), data, out, PreEncodeOptions(crop=crop, sample_size=8000))
        assert report.statuses == {"encoded": 3}
        decoders = [json.loads(path.read_text())["decoder"] for path in sorted(out.glob("0*.json"))]
        assert len(decoders) == 3
        assert all(decoder.startswith("FFmpeg ") for decoder in decoders)


# --- What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "aac.m4a",
        "faststart.m4a",
        "fragments.mp4",
        "aac.aac",
        "wmav2.wma",
        "opus.webm",
        "flac.mka",
        "video.mp4",
        "video.mkv",
        "video.avi",
        "ac3.ac3",
        "wavpack.wv",
        "tta.tta",
    ],
)
@pytest.mark.parametrize("part", [0.001, 0.3, 0.7, 0.999])
def test_files_that_are_cut_off(made, tmp_path, name, part):
    data = made(name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: max(100, int(part * len(data)))])
    refusal(path)


@pytest.mark.parametrize(
    "name", ["aac.m4a", "alac.m4a", "aac.aac", "flac.mka", "aac.mka", "video.mp4", "ac3.ac3", "wavpack.wv"]
)
def test_files_that_lack_bytes(made, tmp_path, name):
    data = made(name).read_bytes()
    path = tmp_path / name
    for at in (0.3, 0.6, 0.8):
        begin = int(at * len(data))
        path.write_bytes(data[:begin] + data[begin + 100 :])
        refusal(path)


def test_damage_that_ffmpeg_steps_over(made, tmp_path):
    """It searches for the next cluster of Matroska, and logs an error."""
    data = bytearray(made("opus.webm").read_bytes())
    cluster = data.index(b"\x1f\x43\xb6\x75")
    data[cluster + 2000 : cluster + 6000] = noise(1000).tobytes()
    (tmp_path / "song.webm").write_bytes(data)
    assert decoded_by_ffmpeg(tmp_path / "song.webm", 2).shape[1] < SAMPLES
    refusal(tmp_path / "song.webm", r"time stamps jump|lacks \d\.\d s at its end|damaged")


def test_files_without_sound(made, tmp_path):
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=160x120:r=25:d=1", "-c:v", "mpeg4", tmp_path / "silent.mp4")
    refusal(tmp_path / "silent.mp4", "holds no sound; give a file that holds sound$")
    (tmp_path / "empty.m4a").touch()
    refusal(tmp_path / "empty.m4a", "is empty")
    for content in (b"\0\0\0\x18ftypM4A " + bytes(20), b"\x1a\x45\xdf\xa3", b"RIFF\x04\0\0\0AVI ", b"FLV\x01", b"wvpk"):
        (tmp_path / "song.bin").write_bytes(content)
        refusal(tmp_path / "song.bin")
    assert made


def test_sound_that_is_not_finite(made, tmp_path):
    samples = noise((20_000, 2))
    samples[15_000, 1] = np.nan
    sf.write(tmp_path / "song.wav", samples, RATE, "FLOAT")
    ffmpeg("-i", tmp_path / "song.wav", "-c:a", "copy", tmp_path / "song.mka")
    refusal(tmp_path / "song.mka", "holds NaN or infinity")
    assert made


def test_sound_without_left_and_right(made, tmp_path):
    source = made("aac.m4a").with_name("source.wav")
    ffmpeg(
        "-i", source, "-af", "channelmap=map=0-FC|1-BC:channel_layout=FC+BC", "-c:a", "pcm_s16le", tmp_path / "a.mov"
    )
    refusal(tmp_path / "a.mov", "so it has no left and right channel")


def test_samples_of_a_type_that_pyav_does_not_convert(made, tmp_path):
    ffmpeg("-i", made("aac.m4a").with_name("source.wav"), "-c:a", "pcm_s64le", tmp_path / "song.mka")
    refusal(tmp_path / "song.mka", r"'s64' format to numpy array is not supported\); convert it: ffmpeg")


def test_file_that_changes_while_it_is_read(made, tmp_path):
    path = tmp_path / "song.m4a"
    shutil.copyfile(made("alac.m4a"), path)
    with AudioReader(path, 1000) as reader:
        blocks = iter(reader)
        next(blocks)
        path.write_bytes(path.read_bytes() + bytes(8))
        with pytest.raises(AudioFileError, match="was changed while it was read"):
            list(blocks)


def test_tables_that_announce_more_than_the_file_holds(made, tmp_path):
    data = made("aac.m4a").read_bytes()
    at = data.index(b"stsz") + 12
    (tmp_path / "a.m4a").write_bytes(data[:at] + struct.pack(">I", 2**28) + data[at + 4 :])
    refusal(tmp_path / "a.m4a", "is damaged, its box stsz is too large")
    at = data.index(b"elst") + 8
    (tmp_path / "b.m4a").write_bytes(data[:at] + struct.pack(">I", 2**20) + data[at + 4 :])
    refusal(tmp_path / "b.m4a", "holds more than 100 edits; convert it")
    data = made("fragments.mp4").read_bytes()
    at = data.index(b"trun") + 8
    (tmp_path / "c.mp4").write_bytes(data[:at] + struct.pack(">I", 2**28) + data[at + 4 :])
    refusal(tmp_path / "c.mp4", "is damaged, its box trun is too large")


def children(box):
    """Return the boxes in an MP4 box, by name."""
    found, position = {}, 8
    while position < len(box):
        size, name = struct.unpack_from(">I4s", box, position)
        found[name] = box[position : position + size]
        position += size
    return found


def new_box(name, content):
    return struct.pack(">I4s", 8 + len(content), name) + content


def with_header(path, target, change, *names):
    """Write an MP4 file with another box in place of that with the last of these names, each in the one before."""

    def changed(box, name, *below):
        boxes = children(box)
        boxes[name] = changed(boxes[name], *below) if below else change(boxes[name])
        return new_box(box[4:8], b"".join(boxes.values()))

    target.write_bytes(changed(bytes(8) + path.read_bytes(), *names)[8:])


# The boxes in which FFmpeg 8.1 finds the tables of a file from which they were moved there.
@pytest.mark.parametrize(
    "name",
    ["dinf", "edts", "ilst", "mdia", "minf", "moof", "moov", "mvex", "schi", "sinf", "stbl", "traf", "tref", "udta"],
)
def test_tables_in_unusual_boxes(made, tmp_path, name):
    def moved(stbl):
        at = stbl.index(b"stsz") + 12
        return new_box(name.encode(), stbl[:at] + struct.pack(">I", 2**28) + stbl[at + 4 :])

    with_header(made("aac.m4a"), tmp_path / "a.m4a", moved, b"moov", b"trak", b"mdia", b"minf", b"stbl")
    refusal(tmp_path / "a.m4a", "is damaged, its box stsz is too large")


def test_tables_in_the_description_of_the_codec(made, tmp_path):
    def longer(stsd):
        return new_box(b"stsd", stsd[8:] + new_box(b"stsz", struct.pack(">III", 0, 1, 2**28)))

    names = b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd"
    with_header(made("aac.m4a"), tmp_path / "a.m4a", longer, *names)
    refusal(tmp_path / "a.m4a", "is damaged, its box stsd contains a table")
    with_header(made("aac.m4a"), tmp_path / "b.m4a", lambda stsd: new_box(b"stsd", stsd[8:] + bytes(2**20)), *names)
    refusal(tmp_path / "b.m4a", "is damaged, its box stsd is too large")


def test_compressed_header(made, tmp_path):
    """FFmpeg would allocate memory for all of it. An inflated header also hides its tables from the checks."""

    def compressed(moov):
        content = struct.pack(">I", len(moov)) + zlib.compress(moov)
        return new_box(b"moov", new_box(b"cmov", new_box(b"dcom", b"zlib") + new_box(b"cmvd", content)))

    with_header(made("aac.m4a"), tmp_path / "a.m4a", compressed, b"moov")
    refusal(tmp_path / "a.m4a", "holds a compressed header; convert it")


def test_playlists_are_not_followed(made, tmp_path):
    """FFmpeg would open the files that they name."""
    shutil.copyfile(made("aac.aac"), tmp_path / "secret.aac")
    for name, text in {
        "list.m4a": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{tmp_path}/secret.aac\n#EXT-X-ENDLIST\n",
        "list.mkv": f"ffconcat version 1.0\nfile '{tmp_path}/secret.aac'\n",
    }.items():
        (tmp_path / name).write_text(text)
        refusal(tmp_path / name, "cannot be read as audio")


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    """The process that opens damaged files in limited memory."""
    work = tmp_path_factory.mktemp("work")
    process = hostile.Child(work, work)
    yield process
    process.close()


@pytest.mark.parametrize(
    "name", ["aac.m4a", "fragments.mp4", "aac.aac", "wmav2.wma", "opus.webm", "video.mkv", "video.avi"]
)
def test_some_damaged_files(made, child, tmp_path, name, inputs):
    numbers, contents, count = random.Random(0), made(name).read_bytes(), 10
    for _ in range(count):
        (tmp_path / name).write_bytes(hostile.mutated_bytes(numbers, contents))
        answer = child.open("audio", tmp_path / name)
        assert answer in (hostile.ACCEPTED, "AudioFileError"), answer
    inputs["damaged files"] += count


# --- Memory and interrupts ----------------------------------------------------------------------------------------


def test_memory_is_flat(made, tmp_path):
    source = made("aac.m4a").with_name("source.wav")
    peaks = []
    for loops in (2, 60):
        path = tmp_path / "song.m4a"
        ffmpeg("-stream_loop", loops, "-i", source, "-c:a", "alac", path)
        code = (
            "import sys; from samekit.audio import AudioReader\n"
            "print(sum(block.shape[1] for block in AudioReader(sys.argv[1], 10000)))\n"
            "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", code, path], env=environment, capture_output=True, text=True, check=True
        )
        samples, memory = map(int, done.stdout.split())
        assert samples == (loops + 1) * SAMPLES
        peaks.append(memory / 1024)
    # 48 MB of floats.
    assert peaks[1] < peaks[0] + 10


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_interrupt_is_not_lost(made):
    def read_often():
        for _ in range(500):
            read_audio(made("aac.m4a"))

    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    made("aac.m4a")
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        read_often()
    timer.join()


# --- Without PyAV ---------------------------------------------------------------------------------------------------


M4A = b"\0\0\0\x18ftypM4A \0\0\0\0M4A mp42\0\0\0\x08mdat"


@pytest.fixture
def without_av(monkeypatch):
    """Let PyAV be missing, as after `import samekit` in an environment without it."""
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr(sources, "SUFFIXES", tuple(suffix for suffix in sources.SUFFIXES if suffix not in AV_SUFFIXES))


@pytest.mark.usefixtures("without_av")
def test_files_name_the_missing_package(tmp_path):
    (tmp_path / "song.m4a").write_bytes(M4A)
    cause = r"holds MP4, which libsndfile does not read, and av is not installed; run: .*pip install 'samekit\[av\]'"
    refusal(tmp_path / "song.m4a", cause)
    # Other files need no package.
    sf.write(tmp_path / "song.wav", noise((100, 2)), RATE)
    assert read_audio(tmp_path / "song.wav")[0].shape == (2, 100)


@pytest.mark.usefixtures("without_av")
def test_datasets_count_the_files_that_need_the_package(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    sf.write(data / "a.wav", noise((100, 2)), RATE)
    for name in ("a.txt", "b.m4a", "c.MKV", "d.jpg"):
        (data / name).write_bytes(b"a caption")
    report = pre_encode(AutoencoderModel(FakeBackend()), data, tmp_path / "out", PreEncodeOptions(sample_size=800))
    assert f"2 of them can be read after {INSTALL_AV}" in report.summary()


def test_suffixes(monkeypatch):
    monkeypatch.setattr("samekit.audio.av_formats.find_spec", lambda _: None)
    assert readable_suffixes() == ()
    monkeypatch.setattr("samekit.audio.av_formats.find_spec", lambda _: "found")
    assert {".m4a", ".aac", ".wma", ".mka", ".mkv", ".mp4", ".mov", ".webm"} <= set(readable_suffixes())


def test_reading_other_files_does_not_import_av(tmp_path):
    sf.write(tmp_path / "song.wav", noise((100, 2)), RATE)
    code = "import sys; from samekit.audio import read_audio; read_audio(sys.argv[1]); assert 'av' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, tmp_path / "song.wav"], check=True, timeout=60)
