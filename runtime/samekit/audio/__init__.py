"""Audio in and out: float32 `[channels, samples]`, full scale at ±1."""

from samekit.audio.av_formats import AV_SUFFIXES, INSTALL_AV, readable_suffixes
from samekit.audio.channels import Audio, pad_to, to_channels
from samekit.audio.limiter import Limiter
from samekit.audio.peaks import PEAK_POLICIES, checked_policy, write_blocks
from samekit.audio.reader import AudioInfo, AudioReader, PreparedReader, prepare, read_audio
from samekit.audio.resampler import StreamResampler, resample, resampled_length
from samekit.audio.writer import AudioWriter, format_of

__all__ = [
    "AV_SUFFIXES",
    "INSTALL_AV",
    "PEAK_POLICIES",
    "Audio",
    "AudioInfo",
    "AudioReader",
    "AudioWriter",
    "Limiter",
    "PreparedReader",
    "StreamResampler",
    "checked_policy",
    "format_of",
    "pad_to",
    "prepare",
    "read_audio",
    "readable_suffixes",
    "resample",
    "resampled_length",
    "to_channels",
    "write_blocks",
]
