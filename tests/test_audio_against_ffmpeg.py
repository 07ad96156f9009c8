"""Compare how much audio samekit and ffmpeg read: from formats of libsndfile, files of other encoders, changed files.

The tests need ffmpeg on PATH. With sox, lame, opusenc, oggenc and flac they try more files.
"""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter

import mangle
import numpy as np
import pytest
import soundfile as sf

from samekit.audio import AudioReader
from samekit.errors import AudioFileError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not on PATH; on Debian: apt install ffmpeg"),
]

RATE = 44_100
FFMPEG = "ffmpeg -v error -y -i"
# Name of the file: the command that makes it from a stereo WAV file, IN, or from one of 5.1 channels, SURROUND.
COMMANDS = {
    "lame-cbr.mp3": "lame --quiet -b 128 IN OUT",
    "lame-cbr-without-header.mp3": "lame --quiet -t -b 128 IN OUT",
    "lame-vbr.mp3": "lame --quiet -V2 IN OUT",
    "lame-vbr-without-header.mp3": "lame --quiet -t -V2 IN OUT",
    "lame-vbr-pipe.mp3": "lame --quiet -V4 - - < IN > OUT",
    "lame-mono.mp3": "lame --quiet -t -V4 -m m IN OUT",
    "lame-22050.mp3": "lame --quiet -V4 --resample 22.05 IN OUT",
    "lame-22050-without-header.mp3": "lame --quiet -t -V4 --resample 22.05 IN OUT",
    "lame-8000.mp3": "lame --quiet -t -V4 --resample 8 IN OUT",
    "lame-checksums.mp3": "lame --quiet -p -V4 IN OUT",
    "lame-tagged.mp3": "lame --quiet -V4 --tt song --add-id3v2 IN OUT",
    "lame-abr.mp3": "lame --quiet --abr 150 IN OUT",
    "lame-free-format.mp3": "lame --quiet --freeformat -b 200 IN OUT",
    "ffmpeg.mp2": f"{FFMPEG} IN -c:a mp2 OUT",
    "ffmpeg-without-header.mp3": f"{FFMPEG} IN -q:a 2 -write_xing 0 OUT",
    "ffmpeg-pipe.mp3": f"{FFMPEG} IN -q:a 2 -f mp3 - > OUT",
    "mp3-in.wav": f"{FFMPEG} IN -c:a libmp3lame -q:a 2 OUT",
    "mp2-in.wav": f"{FFMPEG} IN -c:a mp2 OUT",
    "oggenc.ogg": "oggenc -Q IN -o OUT",
    "surround.ogg": f"{FFMPEG} SURROUND -c:a libvorbis OUT",
    "surround.opus": f"{FFMPEG} SURROUND -c:a libopus -mapping_family 1 OUT",
    "opusenc.opus": "opusenc --quiet IN OUT",
    "opusenc-small-pages.opus": "opusenc --quiet --max-delay 0 IN OUT",
    "voice.opus": f"{FFMPEG} IN -ar 16000 -ac 1 -c:a libopus -page_duration 20000 OUT",
    "speex.ogg": f"{FFMPEG} IN -ar 16000 -ac 1 -c:a libspeex OUT",
    "ffmpeg-flac.oga": f"{FFMPEG} IN -c:a flac OUT",
    "flac.oga": "flac -s --ogg IN -o OUT",
    "flac.flac": "flac -s IN -o OUT",
    "flac-pipe.flac": "flac -s -c - < IN > OUT",
    "ffmpeg.flac": f"{FFMPEG} IN OUT",
    "ffmpeg-pipe.flac": f"{FFMPEG} IN -f flac - > OUT",
    "surround.flac": f"{FFMPEG} SURROUND OUT",
    "ffmpeg-pipe.wav": f"{FFMPEG} IN -f wav - > OUT",
    "ffmpeg.w64": f"{FFMPEG} IN -f w64 OUT",
    "ffmpeg-pipe.w64": f"{FFMPEG} IN -f w64 - > OUT",
    "ffmpeg-rf64.wav": f"{FFMPEG} IN -rf64 always OUT",
    "ffmpeg-rf64-pipe.wav": f"{FFMPEG} IN -rf64 always -f wav - > OUT",
    "ffmpeg-pipe.aiff": f"{FFMPEG} IN -f aiff - > OUT",
    "ffmpeg.caf": f"{FFMPEG} IN OUT",
    "ffmpeg-pipe.caf": f"{FFMPEG} IN -f caf - > OUT",
    "alac.caf": f"{FFMPEG} IN -c:a alac -f caf OUT",
    "ffmpeg-pipe.au": f"{FFMPEG} IN -f au - > OUT",
    "adpcm-ms.wav": f"{FFMPEG} IN -c:a adpcm_ms OUT",
    "adpcm-ima.wav": f"{FFMPEG} IN -c:a adpcm_ima_wav OUT",
    "surround.aiff": f"{FFMPEG} SURROUND OUT",
    "surround.caf": f"{FFMPEG} SURROUND OUT",
    "ffmpeg.voc": f"{FFMPEG} IN OUT",
}
for _suffix in ("wav", "aiff", "aifc", "au", "voc", "w64", "caf", "sph", "avr", "ircam", "paf", "pvf", "flac"):
    COMMANDS[f"sox.{_suffix}"] = f"sox IN -t {_suffix} OUT"
    COMMANDS[f"sox-pipe.{_suffix}"] = f"sox IN -t {_suffix} - > OUT"

# libsndfile reads these without a sign of their kind, or ffmpeg does not read them: it takes MAT files of doubles for
# 300 s of another format, and NMS ADPCM in WAV, whose format tag it does not know, for twice the length.
_UNREADABLE = ("RAW", "SD2", "MAT4", "MAT5")
KINDS = [
    (name, sub)
    for name in sf.available_formats()
    if name not in _UNREADABLE
    for sub in sf.available_subtypes(name)
    if not sub.startswith("NMS_")
]


def sound(seconds, rate=RATE, channels=2):
    """Return `[frames, channels]`: a tone in each channel, and noise that becomes louder."""
    time = np.arange(int(seconds * rate))[:, None] / rate
    noise = np.random.RandomState(1).standard_normal((len(time), channels))
    loud = np.where(time < seconds / 2, 0.02, 0.2)
    return (0.15 * np.sin(2 * np.pi * (300 + 150 * np.arange(channels)) * time) + noise * loud).clip(-0.99, 0.99)


def seconds_by_ffmpeg(path):
    """Return how many seconds of audio ffmpeg decodes from the first stream."""
    command = ["ffmpeg", "-v", "error", "-i", path, "-map", "0:a:0", "-ac", "1", "-ar", "48000", "-f", "f32le", "-"]
    return len(subprocess.run(command, capture_output=True, check=False, timeout=120).stdout) / 4 / 48_000


def check(path, outcomes):
    """Read a file, which must be refused, or be no shorter than what ffmpeg decodes, within the delays of codecs."""
    try:
        with AudioReader(path) as reader:
            rate = reader.info.sample_rate
            seconds = sum(block.shape[1] for block in reader) / rate
    except AudioFileError:
        outcomes["refused"] += 1
        return
    outcomes["read"] += 1
    expected = seconds_by_ffmpeg(path)
    # ffmpeg keeps an encoder's delay where no header tells it, decodes the rest of a cut frame, and resamples.
    slack = (2 * 1152 + 1105) / rate + 0.003 * expected
    assert seconds >= expected - slack, f"{path.name}: {seconds:.3f} s, ffmpeg finds {expected:.3f} s"


def check_all(folder, name, data, outcomes):
    """Check a file, and the changed files that `mangle.manglings` makes of it."""
    path = folder / name
    for kind, mangled in mangle.manglings(data):
        path = folder / f"{kind.replace(' ', '-')}-{name}"
        path.write_bytes(mangled)
        check(path, outcomes)
        path.unlink()


def finish(outcomes, inputs, record_property):
    """Report the counts."""
    inputs["audio files against ffmpeg"] += outcomes.total()
    record_property("outcomes", str(dict(outcomes)))
    print(dict(outcomes))


@pytest.mark.parametrize("seconds", [0.7, 7.0])
@pytest.mark.parametrize("name", COMMANDS)
def test_files_of_other_encoders(tmp_path, name, seconds, inputs, record_property):
    command = COMMANDS[name]
    if shutil.which(command.split()[0]) is None:
        pytest.skip(f"{command.split()[0]} is not on PATH")
    sources = {"IN": (RATE, 2, "WAV"), "SURROUND": (48_000, 6, "WAVEX")}
    for source, (rate, channels, container) in sources.items():
        path = tmp_path / f"{source}.wav"
        sf.write(path, sound(seconds, rate, channels), rate, "PCM_16", format=container)
        command = command.replace(source, str(path))
    made = tmp_path / name
    subprocess.run(command.replace("OUT", str(made)), shell=True, check=True, timeout=120, cwd=tmp_path)
    outcomes = Counter()
    check_all(tmp_path, name, made.read_bytes(), outcomes)
    finish(outcomes, inputs, record_property)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_files_of_libsndfile(tmp_path, kind, inputs, record_property):
    container, subtype = kind
    rates = {"WVE": 8000, "OPUS": 48_000}
    rate = rates.get(container, rates.get(subtype, RATE))
    path = tmp_path / f"song.{container.lower()}"
    for channels in (2, 1):
        try:
            sf.write(path, sound(0.7, rate, channels), rate, subtype, format=container)
        except sf.SoundFileError:
            continue
        break
    else:
        pytest.skip("libsndfile does not write it")
    outcomes = Counter()
    check_all(tmp_path, path.name, path.read_bytes(), outcomes)
    finish(outcomes, inputs, record_property)
