"""Encode a file to latents on a server that `samekit serve` started, then decode them again.

samekit serve same-s --port 8000
python examples/serve_client.py song.flac http://127.0.0.1:8000

It needs only Python.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen


def main(song: str, url: str) -> None:
    """Write SONG.npy and SONG.decoded.wav beside the audio file."""
    token = os.environ.get("SAMEKIT_TOKEN")
    headers = {"Content-Type": "application/octet-stream"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    for task, source, target in (("encode", song, f"{song}.npy"), ("decode", f"{song}.npy", f"{song}.decoded.wav")):
        body = Path(source).read_bytes()
        request = Request(f"{url.rstrip('/')}/v1/{task}", body, headers)  # noqa: S310 the user names the server
        Path(target).write_bytes(answer_to(request))
        print(target)


def answer_to(request: Request, attempts: int = 10) -> bytes:
    """Send a request, again if the server asks for it."""
    try:
        with urlopen(request, timeout=300) as answer:  # noqa: S310
            content: bytes = answer.read()
            return content
    except HTTPError as error:
        if error.code not in (429, 503) or attempts == 1:
            raise SystemExit(f"{request.full_url}: {error.code}: {json.load(error)['error']}") from None
        # The queue is full, or a replica died. The server says when to try again.
        time.sleep(float(error.headers["Retry-After"]))
    except URLError as error:
        raise SystemExit(f"{request.full_url} does not answer ({error.reason})") from None
    return answer_to(request, attempts - 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Encode and decode a file on a server.")
    parser.add_argument("song", help="an audio file")
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000", help="default: %(default)s")
    arguments = parser.parse_args()
    main(arguments.song, arguments.url)
