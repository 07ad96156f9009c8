"""Recognise files that FFmpeg reads and libsndfile does not.

FFmpeg itself could take any file for a playlist that names other files. So its demuxer is chosen here.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

from samekit.packages import install_command

if TYPE_CHECKING:
    from samekit.audio.source import Source

AV_SUFFIXES: Final = (
    *(".m4a", ".m4b", ".mp4", ".m4v", ".mov", ".3gp", ".aac", ".wma", ".wmv", ".asf", ".mka", ".mkv", ".webm", ".avi"),
    *(".flv", ".mpg", ".mpeg", ".m2ts", ".mts", ".wv", ".ape", ".tta", ".tak", ".mpc", ".dsf", ".ac3", ".eac3", ".amr"),
)
"""Suffixes of such files."""
INSTALL_AV: Final = install_command("av")
"""The command that installs PyAV, through which FFmpeg reads them."""

# Demuxer of FFmpeg -> name of the format in messages and in `AudioInfo`.
NAMES: Final = {
    "mov": "MP4",
    "matroska": "Matroska",
    "asf": "ASF",
    "aac": "AAC",
    "avi": "AVI",
    "flv": "FLV",
    "mpegts": "MPEG-TS",
    "mpeg": "MPEG-PS",
    "wv": "WavPack",
    "ape": "APE",
    "tta": "TTA",
    "tak": "TAK",
    "mpc": "Musepack",
    "mpc8": "Musepack",
    "dsf": "DSF",
    "ac3": "AC-3",
    "eac3": "AC-3",
    "dts": "DTS",
    "amr": "AMR",
    "rm": "RealMedia",
}
_MAGICS: Final = {
    b"\x1a\x45\xdf\xa3": "matroska",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": "asf",
    b"FLV\x01": "flv",
    b"\x00\x00\x01\xba": "mpeg",
    b"wvpk": "wv",
    b"MAC ": "ape",
    b"TTA1": "tta",
    b"tBaK": "tak",
    b"MP+": "mpc",
    b"MPCK": "mpc8",
    b"DSD ": "dsf",
    b"\x7f\xfe\x80\x01": "dts",
    b"#!AMR": "amr",
    b".RMF": "rm",
}
# ISO/IEC 14496-12 and QuickTime.
_FIRST_BOXES: Final = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
ADTS_HEADER: Final = 7
"""Bytes at the beginning of a frame of AAC that tell its size."""
TS_PACKET: Final = 188
"""Bytes of a packet of MPEG-TS. Blu-ray puts four more before each."""
# AC-3, annex E: bit stream identifications up to this one are AC-3, higher ones E-AC-3.
_AC3: Final = 10


def readable_suffixes() -> tuple[str, ...]:
    """Return `AV_SUFFIXES` if PyAV is installed, else nothing."""
    return AV_SUFFIXES if find_spec("av") else ()


def find_demuxer(source: Source, start: int) -> str:
    """Return the demuxer of FFmpeg for a file whose tags end at `start`; empty if libsndfile is to read the file."""
    head = source.read(start, 16)
    if head[4:8] in _FIRST_BOXES:
        return "mov"
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        return "avi"
    if head.startswith(b"\x0b\x77") and source.path.suffix.lower() in (".ac3", ".eac3"):
        return "ac3" if head[5:6] <= bytes([_AC3 << 3 | 7]) else "eac3"
    found = next((demuxer for magic, demuxer in _MAGICS.items() if head.startswith(magic)), "")
    if not found and _is_adts(source, start):
        return "aac"
    return found or ("mpegts" if _is_transport_stream(source, start) else "")


def _is_transport_stream(source: Source, start: int) -> bool:
    """Return whether four packets of MPEG-TS follow each other; Blu-ray puts four bytes before each."""
    return any(
        all(source.read(start + before + (TS_PACKET + before) * packet, 1) == b"G" for packet in range(4))
        for before in (0, 4)
    )


def _is_adts(source: Source, start: int) -> bool:
    """Return whether a frame of AAC with an ADTS header is here, and another one or the end behind it."""
    size = adts_size(source.read(start, ADTS_HEADER))
    behind = source.read(start + size, ADTS_HEADER)
    return size > 0 and (adts_size(behind) > 0 or (not behind and source.path.suffix.lower() == ".aac"))


def adts_size(head: bytes) -> int:
    """Return the bytes of the ADTS frame (ISO/IEC 14496-3, 1.A.2.2) that begins like this; 0 if none does."""
    if len(head) < ADTS_HEADER or head[0] != 0xFF or head[1] & 0xF6 != 0xF0 or (head[2] >> 2 & 15) > 12:
        return 0
    size = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    return size if size > ADTS_HEADER else 0
