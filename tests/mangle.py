"""Irregular audio files as other programs write them: tagged, concatenated, truncated, padded, with wrong lengths.

The functions take the bytes of a sound file and return the bytes of a changed file.
"""

from __future__ import annotations

import random
import struct


def _checksums():
    """Return the lookup table of the Ogg checksum: CRC-32 with polynomial 0x04C11DB7 (RFC 3533, section 6)."""
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value & 0x80000000 else 0)) & 0xFFFFFFFF
        table.append(value)
    return table


_TABLE = _checksums()


def page_checksum(content):
    """Return the checksum of an Ogg page whose checksum field is zero."""
    value = 0
    for byte in content:
        value = (value << 8 & 0xFFFFFFFF) ^ _TABLE[value >> 24 ^ byte]
    return value


def id3v2(size=300, *, version=4, footer=False):
    """Return an ID3v2 tag (ID3v2.4, section 3.1): header, a title, padding and, on request, a footer."""
    count = bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))
    body = b"TIT2" + bytes(3) + b"\x05" + bytes(2) + b"\0song" + bytes(size)
    flags = 0x10 if footer else 0
    tag = b"ID3" + bytes((version, 0, flags)) + count + body[:size]
    return tag + (b"3DI" + bytes((version, 0, flags)) + count if footer else b"")


def picture(size=300_000):
    """Return an ID3v2 tag with a large picture, whose bytes look like MPEG frame headers."""
    noise = bytearray(random.Random(7).randbytes(size))
    for at in range(0, size - 4, 5000):
        noise[at : at + 4] = b"\xff\xfb\x90\x00"
    return b"ID3\4\0\0" + bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0)) + bytes(noise)


ID3V1 = b"TAG" + b"a song".ljust(125, b"\0")
# APEv2 (wiki.hydrogenaud.io, APEv2 specification): header and footer of 32 bytes; the size does not count the header.
_APE_ITEM = struct.pack("<II", 4, 0) + b"Title\0song"
APE = b"".join(
    b"APETAGEX" + struct.pack("<IIII", 2000, len(_APE_ITEM) + 32, 1, flags) + bytes(8) + rest
    for flags, rest in ((0xA0000000, _APE_ITEM), (0x80000000, b""))
)
# Lyrics3 v2 (id3.org/Lyrics3v2): the size field does not count itself and the end mark.
_LYRICS = b"LYRICSBEGIN" + b"IND0000210" + b"LYR00005hello"
LYRICS = _LYRICS + b"%06dLYRICS200" % len(_LYRICS) + ID3V1
LYRICS1 = b"LYRICSBEGIN" + b"hello " * 9 + b"LYRICSEND" + ID3V1


def noise(size, seed=3):
    """Return random bytes."""
    return random.Random(seed).randbytes(size)


def pages(data):
    """Split an Ogg file into its pages."""
    found = []
    while data:
        size = 27 + data[26] + sum(data[27 : 27 + data[26]])
        found.append(data[:size])
        data = data[size:]
    return found


def page(content, *, flags=None, granule=None, serial=None, number=None):
    """Return an Ogg page with changed header fields and a valid checksum."""
    new = bytearray(content)
    if flags is not None:
        new[5] = flags
    if granule is not None:
        new[6:14] = granule.to_bytes(8, "little", signed=True)
    if serial is not None:
        new[14:18] = serial.to_bytes(4, "little")
    if number is not None:
        new[18:22] = number.to_bytes(4, "little")
    new[22:26] = bytes(4)
    new[22:26] = page_checksum(bytes(new)).to_bytes(4, "little")
    return bytes(new)


def without_end_flag(data):
    """Return an Ogg file whose last page lacks the end-of-stream flag."""
    *first, last = pages(data)
    return b"".join([*first, page(last, flags=last[5] & ~4)])


def granule_of(content):
    """Return the granule position of a page."""
    return int.from_bytes(content[6:14], "little", signed=True)


def shifted(data, samples):
    """Return an Ogg file with later granule positions, as in an excerpt of a longer recording."""
    return b"".join(
        page(content, granule=granule_of(content) + samples) if granule_of(content) > 0 else content
        for content in pages(data)
    )


def set_size(data, name, size, order="<"):
    """Return a file of chunks (WAV, AIFF) with another size field in the named chunk."""
    at = data.index(name) + 4
    return data[:at] + struct.pack(f"{order}I", size % 2**32) + data[at + 4 :]


def flac_count(data, frames):
    """Return a FLAC file with another number of samples in STREAMINFO.

    The field is the last 36 bits of the eight bytes at offset 18 (RFC 9639, section 8.2).
    """
    field = int.from_bytes(data[18:26], "big") >> 36 << 36 | frames
    return data[:18] + field.to_bytes(8, "big") + data[26:]


def mpeg_frames(data):
    """Split an MP3 file of constant bit rate, without tags, into its frames (MPEG-1 layer III)."""
    rates = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
    frames = []
    while len(data) >= 4 and data[0] == 0xFF:
        rate = (44_100, 48_000, 32_000)[data[2] >> 2 & 3]
        size = 144_000 * rates[data[2] >> 4] // rate + (data[2] >> 1 & 1)
        frames.append(data[:size])
        data = data[size:]
    return frames


def _common(data):
    """Yield changes that apply to files of every format."""
    half = len(data) // 2
    yield "as it is", data
    yield "joined", data + data
    yield "ID3v1", data + ID3V1
    yield "APE", data + APE
    yield "APE and ID3v1", data + APE + ID3V1
    yield "Lyrics3 v2", data + LYRICS
    yield "Lyrics3 v1", data + LYRICS1
    yield "zeros", data + bytes(5000)
    yield "0xFF", data + b"\xff" * 70_000
    yield "300 bytes of noise", data + noise(300)
    yield "9,000 bytes of noise", data + noise(9000)
    yield "100,000 bytes of noise", data + noise(100_000)
    yield "ID3v2", id3v2() + data
    yield "ID3v2 with footer", id3v2(footer=True) + data
    yield "ID3v2 twice", id3v2() + id3v2(5000) + data
    yield "picture", picture() + data
    yield "tagged and joined", (id3v2() + data + ID3V1) * 2
    yield "ID3v2 at the end", data + id3v2(footer=True)
    yield "half", data[:half]
    yield "nine tenths", data[: len(data) * 9 // 10]
    yield "a byte less", data[:-1]
    yield "100 bytes less", data[:-100]
    yield "a byte more", data + b"\0"
    yield "noise in front", noise(200) + data
    yield "zeros in front", bytes(500) + data
    yield "noise inside", data[:half] + noise(7000) + data[half:]
    yield "a hole", data[:half] + data[half + 7000 :]


def _ogg(data):
    """Yield changes to Ogg files."""
    whole = pages(data)
    middle = len(whole) // 2
    yield "no end flag", without_end_flag(data)
    yield "late start", shifted(data, 10**6)
    yield "lost page", b"".join(whole[:middle] + whole[middle + 1 :])
    yield "relay", b"".join(whole[:2] + whole[middle:])
    yield "no last page", b"".join(whole[:-1])
    yield "three links", data + without_end_flag(data) + data
    other = [page(one, serial=77) for one in whole]
    yield "multiplexed", b"".join(one for pair in zip(whole, other, strict=True) for one in pair)


def _flac(data):
    """Yield FLAC files with wrong numbers of samples."""
    count = int.from_bytes(data[18:26], "big") & (1 << 36) - 1
    for counted in (0, 100, count // 2, max(0, count - 1000), count + 1000, 2 * count):
        yield f"counts {counted}", flac_count(data, counted)
        yield f"counts {counted}, ID3v1", flac_count(data, counted) + ID3V1


def _sized(data, name, order):
    """Yield files with wrong sizes of the sample chunk and with additional chunks."""
    size = int.from_bytes(data[data.index(name) + 4 :][:4], "little" if order == "<" else "big")
    for other in (0, size // 8 * 4, max(0, size - 1000), size + 1000, 2 * size, 0x7FFFF000, 0x80000000, 0xFFFFFFFF):
        yield f"size {other:#x}", set_size(data, name, other, order)
    trailing = b"".join(
        one + struct.pack(f"{order}I", len(body)) + body + bytes(len(body) % 2)
        for one, body in ((b"LIST", b"INFOx"), (b"id3 ", id3v2()), (b"odd ", b"xxx"), (b"bext", bytes(700)))
    )
    yield "chunks", data + trailing
    yield "chunks and size 0", set_size(data, name, 0, order) + trailing
    yield "samples twice", data + name + struct.pack(f"{order}I", 40_000) + noise(40_000)


def manglings(data):
    """Yield a description and the contents of each changed copy of a sound file."""
    yield from _common(data)
    if data.startswith(b"OggS"):
        yield from _ogg(data)
    elif data.startswith(b"fLaC"):
        yield from _flac(data)
    elif data[:4] in (b"RIFF", b"RIFX", b"RF64") and b"data" in data:
        yield from _sized(data, b"data", ">" if data[:4] == b"RIFX" else "<")
    elif data.startswith(b"FORM") and b"SSND" in data:
        yield from _sized(data, b"SSND", ">")
    elif data.startswith(b".snd"):
        for size in (0, 1000, 0xFFFFFFFF):
            yield f"size {size:#x}", data[:8] + struct.pack(">I", size) + data[12:]
