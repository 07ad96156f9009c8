"""Encode a file to latents on a server that `samekit serve` started, then decode them again.

samekit serve same-s --port 8000
python examples/serve_client.py song.flac http://127.0.0.1:8000

It needs only Python.
"""

from __future__ import annotations

import argparse
import json
import os
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
        try:
            with urlopen(request, timeout=300) as answer:  # noqa: S310
                Path(target).write_bytes(answer.read())
        except HTTPError as error:
            raise SystemExit(f"{task}: {error.code}: {json.load(error)['error']}") from None
        except URLError as error:
            raise SystemExit(f"{url} does not answer ({error.reason})") from None
        print(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Encode and decode a file on a server.")
    parser.add_argument("song", help="an audio file")
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000", help="default: %(default)s")
    arguments = parser.parse_args()
    main(arguments.song, arguments.url)
