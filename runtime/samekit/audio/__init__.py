"""Audio in and out: float32 `[channels, samples]`, full scale at ±1."""

from samekit.audio.channels import Audio, pad_to, to_channels
from samekit.audio.reader import AudioInfo, AudioReader, PreparedReader, prepare, read_audio
from samekit.audio.resampler import StreamResampler, resample, resampled_length
from samekit.audio.writer import AudioWriter, format_of

__all__ = [
    "Audio",
    "AudioInfo",
    "AudioReader",
    "AudioWriter",
    "PreparedReader",
    "StreamResampler",
    "format_of",
    "pad_to",
    "prepare",
    "read_audio",
    "resample",
    "resampled_length",
    "to_channels",
]
