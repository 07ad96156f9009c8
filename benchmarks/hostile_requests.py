"""Hostile requests to a server on the loopback interface: damaged files, broken HTTP, slow and vanishing clients.

Every request is made from its number alone, so that one that found a fault can be repeated.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import pickle
import random
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import soundfile as sf

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from hostile import mutated_bytes, mutated_npy
from mangle import manglings

if TYPE_CHECKING:
    from collections.abc import Callable

ANSWER_SECONDS = 60
"""How long the answer to valid HTTP may take."""
PATIENCE = 3
"""How long a client with invalid HTTP waits. A server may wait longer for the rest of a request."""
LARGEST_ANSWER = 1 << 26
REFUSED = (400, 401, 404, 405, 408, 411, 413, 414, 415, 422, 426, 429, 431, 501, 503, 505)
"""Statuses with which a server may refuse a request."""
FORMATS = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "ogg": ("OGG", "VORBIS"), "mp3": ("MP3", None)}
FORMATS |= {"aiff": ("AIFF", "PCM_24"), "au": ("AU", "FLOAT"), "caf": ("CAF", "PCM_16"), "opus": ("OGG", "OPUS")}
RATE = 48_000


class Request(NamedTuple):
    """One hostile request."""

    kind: str
    parts: list[bytes]
    """What is sent."""
    pause: float = 0
    """Seconds between the parts."""
    valid_http: bool = True
    """Whether the server must answer. If not, it may also close the connection."""
    vanishes: bool = False
    """Whether the client resets the connection instead of reading the answer."""


class Outcome(NamedTuple):
    """What came of a request."""

    kind: str
    answer: str
    """The status, "closed" or "vanished"."""
    fault: str | None
    """What the server did wrong, if anything."""


class Hostile:
    """Makes hostile requests.

    Args:
        latent_width: features of a latent of the served model.
        trap: HOST:PORT of a listener that must get no connection.
        canary: a folder that a pickle would create.
    """

    def __init__(self, latent_width: int, trap: str, canary: Path) -> None:
        self._trap, self._canary = trap, canary
        chance = np.random.default_rng(0)
        samples = chance.standard_normal((RATE // 4, 2)).astype(np.float32) * 0.1
        self._audio = [_file_of(samples, *kind) for kind in FORMATS.values()]
        self._mangled = [data for audio in self._audio for _, data in manglings(audio)]
        latents = chance.standard_normal((latent_width, 3)).astype(np.float32)
        self._latents = _npy(latents)
        self._kinds: list[tuple[int, Callable[[random.Random], Request]]] = [
            (6, self._damaged_audio),
            (4, self._mangled_audio),
            (4, self._damaged_latents),
            (2, self._no_audio),
            (1, self._large_header_of_npy),
            (1, self._pickle),
            (2, self._chunking),
            (2, self._length),
            (1, self._headers),
            (1, self._slow_body),
            (1, self._vanishing),
            (2, self._request_line),
            (1, self._no_http),
        ]

    def request(self, number: int) -> Request:
        """Return request `number`."""
        chance = random.Random(number)
        weights, makers = zip(*self._kinds, strict=True)
        maker: Callable[[random.Random], Request] = chance.choices(makers, weights)[0]
        return maker(chance)

    def _damaged_audio(self, chance: random.Random) -> Request:
        return Request("damaged audio", [_post("encode", mutated_bytes(chance, chance.choice(self._audio)))])

    def _mangled_audio(self, chance: random.Random) -> Request:
        return Request("irregular audio", [_post("encode", chance.choice(self._mangled))])

    def _damaged_latents(self, chance: random.Random) -> Request:
        query = chance.choice(("", "?bits=24", "?bits=float&peak=raw", "?bits=99", "?peak=%00", "?bits=16&bits=24"))
        return Request("damaged latents", [_post(f"decode{query}", mutated_npy(chance, self._latents))])

    def _no_audio(self, chance: random.Random) -> Request:
        url = f"http://{self._trap}/song.wav"
        body = chance.choice(
            (
                "",
                url,
                "/etc/passwd",
                "file:///etc/passwd",
                f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n",
                f"ffconcat version 1.0\nfile '{url}'\n",
                f"<?xml version='1.0'?><MPD><Period><BaseURL>{url}</BaseURL></Period></MPD>",
                f"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=audio {self._trap.split(':')[1]} RTP/AVP 0\n",
                json.dumps({"path": "/etc/passwd", "url": url}),
                "[" * 100_000,
                "\0" * 100_000,
            )
        )
        kind = chance.choice(("application/octet-stream", "application/json", "multipart/form-data", "text/\x80"))
        task = chance.choice(("encode", "decode"))
        return Request("no audio", [_post(task, body.encode(), f"Content-Type: {kind}")])

    def _large_header_of_npy(self, chance: random.Random) -> Request:
        width = len(np.load(io.BytesIO(self._latents)))
        shape = chance.choice((f"({width}, {10**12})", f"({width}, {2**62})", f"({'1,' * 5000})", f"({width}, 10)"))
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        length = chance.choice((len(text), 2**32 - 1, 2**31))
        header = b"\x93NUMPY\x02\x00" + struct.pack("<I", length) + text
        return Request("large header of .npy", [_post("decode", header + bytes(chance.choice((0, 1000))))])

    def _pickle(self, chance: random.Random) -> Request:
        loaded = pickle.dumps(_Trap(str(self._canary)), chance.choice((0, 2, 5)))
        text = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"
        npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + loaded
        return Request("pickle", [_post(chance.choice(("decode", "encode")), chance.choice((loaded, npy)))])

    def _chunking(self, chance: random.Random) -> Request:
        head = _head("encode", "Transfer-Encoding: chunked")
        body = chance.choice(
            (
                b"zz\r\nabc\r\n0\r\n\r\n",
                b"-5\r\nabcde\r\n0\r\n\r\n",
                b"ffffffffffffffffffff\r\nabc",
                b"7fffffffffffffff\r\nabc",
                b"3\r\nabcdefgh\r\n0\r\n\r\n",
                b"5\r\nab",
                b"3;" + b"x" * 200_000 + b"\r\nabc\r\n0\r\n\r\n",
                b"\r\n\r\n\r\n",
                b"3\nabc\n0\n\n",
                b"0\r\nTrailer: " + b"x" * 200_000 + b"\r\n\r\n",
            )
        )
        return Request("broken chunks", [head, body], valid_http=False)

    def _length(self, chance: random.Random) -> Request:
        body = chance.choice(self._audio)
        fields = chance.choice(
            (
                f"Content-Length: {len(body) + 1000}",
                f"Content-Length: {len(body) // 2}",
                "Content-Length: -1",
                "Content-Length: 0x10",
                "Content-Length: 1e3",
                f"Content-Length: {10**18}",
                f"Content-Length: {'9' * 400}",
                f"Content-Length: {len(body)}\r\nContent-Length: 5",
                f"Content-Length: {len(body)}\r\nTransfer-Encoding: chunked",
                "Transfer-Encoding: gzip, identity",
                "Content-Length:",
                f"Content-Length: {len(body)}\r\nExpect: 200-nothing",
            )
        )
        return Request("wrong length", [_head("encode", fields), body], valid_http=False)

    def _headers(self, chance: random.Random) -> Request:
        fields = chance.choice(
            (
                "X: " + "x" * 1_000_000,
                "\r\n".join(f"X-{number}: y" for number in range(10_000)),
                "no colon",
                "X\0: y",
                ": y",
                "X: a\r\n folded",
                "Host: other\r\nHost: third",
                "Authorization: Bearer " + "\xff" * 1000,
                "Accept: " + ",".join(["application/json;q=x"] * 2000),
            )
        )
        return Request("headers", [_post("encode", self._audio[0], fields)], valid_http=False)

    def _slow_body(self, chance: random.Random) -> Request:
        message = _post("encode", chance.choice(self._audio))
        cuts = sorted(chance.sample(range(1, len(message)), 5))
        parts = [message[a:b] for a, b in zip([0, *cuts], [*cuts, len(message)], strict=True)]
        kept = len(parts) - chance.choice((0, 1))
        return Request("slow body", parts[:kept], 0.5, valid_http=kept == len(parts), vanishes=kept < len(parts))

    def _vanishing(self, chance: random.Random) -> Request:
        message = _post(chance.choice(("encode", "decode")), chance.choice(self._audio))
        sent = chance.choice((10, 100, len(message) // 2, len(message)))
        return Request("vanishing client", [message[:sent]], 0.1, vanishes=True)

    def _request_line(self, chance: random.Random) -> Request:
        method = chance.choice(("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "BREW"))
        path = chance.choice(
            (
                "/v1/encode",
                "/v1/encode",
                "/v1/no-such",
                "/v1/../../../etc/passwd",
                "/v1/encode/%2e%2e/%2e%2e/etc/passwd",
                "/v1/encode%00",
                "//etc/passwd",
                "/v1/decode?" + "bits=16&" * 5000,
                "/" + "a" * 100_000,
                "/v1/model/../../spec.json",
                f"/v1/encode?url=http://{self._trap}/x",
                "/\xff\xfe",
            )
        )
        line = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        plain = method in ("GET", "PUT", "DELETE") and path in ("/v1/encode", "/v1/no-such")
        return Request("request line", [line.encode("latin1")], valid_http=plain)

    def _no_http(self, chance: random.Random) -> Request:
        data = chance.choice(
            (
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(500),
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + chance.randbytes(50),
                b"GET /\r\n\r\n",
                b"POST /v1/encode HTTP/9.9\r\n\r\n",
                b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
                chance.randbytes(100_000),
                b"\r\n" * 50_000,
            )
        )
        return Request("no HTTP", [data], valid_http=False)


class _Trap:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self._path,)


def _file_of(samples: np.ndarray, container: str, subtype: str | None) -> bytes:
    file = io.BytesIO()
    sf.write(file, samples, RATE, format=container, subtype=subtype)
    return file.getvalue()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _head(task: str, *fields: str) -> bytes:
    lines = (f"POST /v1/{task} HTTP/1.1", "Host: localhost", "Connection: close", *fields)
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin1")


def _post(task: str, body: bytes, *fields: str) -> bytes:
    return _head(task, *fields, f"Content-Length: {len(body)}") + body


async def send(request: Request, port: int) -> Outcome:
    """Send a request and judge what comes of it."""
    try:
        # What is sent slowly takes its time, whether it is valid or not.
        allowed = ANSWER_SECONDS if request.valid_http else PATIENCE + len(request.parts) * request.pause
        async with asyncio.timeout(allowed):
            data = await _exchange(request, port)
    except TimeoutError:
        fault = f"no answer within {ANSWER_SECONDS} s" if request.valid_http else None
        return Outcome(request.kind, "no answer", fault)
    except OSError as error:
        return Outcome(request.kind, "no connection", f"no connection: {error}")
    if request.vanishes:
        return Outcome(request.kind, "vanished", None)
    return judged(request, data)


async def _exchange(request: Request, port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        # A server may answer and close before it has read everything.
        with suppress(OSError):
            for part in request.parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(request.pause)
        data = b""
        with suppress(OSError):
            while not request.vanishes and len(data) < LARGEST_ANSWER and (more := await reader.read(1 << 20)):
                data += more
        return data
    finally:
        writer.transport.abort()


def judged(request: Request, data: bytes) -> Outcome:
    """Judge the bytes of an answer."""
    head, _, body = data.partition(b"\r\n\r\n")
    words = head.split(maxsplit=2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        fault = "no answer to valid HTTP" if request.valid_http else None
        return Outcome(request.kind, "closed" if not data else "no HTTP", fault)
    status, fault = int(words[1]), None
    if status >= 300 and status not in REFUSED:
        fault = f"status {status}: {body[:200]!r}"
    elif status >= 400 and request.valid_http:
        fault = _fault_of_line(body)
    return Outcome(request.kind, str(status), fault)


def _fault_of_line(body: bytes) -> str | None:
    """Return what is wrong with the body of a refusal, which must be JSON with one line."""
    with suppress(ValueError, LookupError, TypeError):
        text = body if body.startswith(b"{") else body.split(b"\r\n")[1]
        line = json.loads(text)["error"]
        if isinstance(line, str) and line and line.isprintable():
            return None
    return f"no line of error: {body[:200]!r}"
