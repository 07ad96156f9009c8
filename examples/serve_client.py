"""Encode a file to latents on a server that `samekit serve` started, then decode them again.

samekit serve same-s --port 8000
python examples/serve_client.py song.flac http://127.0.0.1:8000
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import httpx

ATTEMPTS = 10


def main(song: str, url: str) -> None:
    """Write SONG.npy and SONG.decoded.wav beside the audio file."""
    token = os.environ.get("SAMEKIT_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with httpx.Client(base_url=url, headers=headers, timeout=300) as server:
        for task, source, target in (("encode", song, f"{song}.npy"), ("decode", f"{song}.npy", f"{song}.decoded.wav")):
            for _ in range(ATTEMPTS):
                answer = server.post(f"/v1/{task}", content=Path(source).read_bytes())
                if answer.status_code not in (429, 503):
                    break
                # The queue is full, or a replica died. The server says when to try again.
                time.sleep(float(answer.headers["Retry-After"]))
            if answer.is_error:
                raise SystemExit(f"{task}: {answer.status_code}: {answer.json()['error']}")
            Path(target).write_bytes(answer.content)


if __name__ == "__main__":
    main(*sys.argv[1:])
