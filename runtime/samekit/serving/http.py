"""The HTTP interface of a replica, as a FastAPI application."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse

from samekit import __version__
from samekit.errors import AudioFileError, InputError, LatentsFileError, NonFiniteError, SamekitError
from samekit.serving.service import RefusedError, Service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

NPY = "application/x-npy"
_CLIENT_ERRORS = (AudioFileError, LatentsFileError, InputError, NonFiniteError)
_CHUNK = 2**18
PAGE = Path(__file__).with_name("page.html")


def create_app(service: Service) -> FastAPI:
    """Return the application that answers requests with a service."""
    app = FastAPI(title="samekit", version=__version__, docs_url=None, redoc_url=None)

    @app.exception_handler(SamekitError)
    async def refuse(_request: Request, error: SamekitError) -> JSONResponse:
        status = 500
        if isinstance(error, RefusedError):
            status = error.status
        elif isinstance(error, _CLIENT_ERRORS):
            status = 422
        return JSONResponse({"error": str(error)}, status)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response("", media_type="text/plain")

    @app.get("/v1/model")
    async def model() -> dict[str, Any]:
        return service.facts()

    async def answer(request: Request, name: str, work: Callable[[Path, threading.Event], Awaitable[Response]]) -> Any:
        """Receive a body in a folder of its own and do the work."""
        with service.admitted():
            folder, stop = Path(tempfile.mkdtemp(prefix="samekit-")), threading.Event()
            try:
                await _receive(request, folder / name, service.options.max_bytes)
                return await work(folder, stop)
            finally:
                stop.set()
                shutil.rmtree(folder)

    @app.post("/v1/encode")
    async def encode(request: Request) -> Response:
        async def work(folder: Path, stop: threading.Event) -> Response:
            npy, metadata = await asyncio.wrap_future(service.encode(folder / "audio", stop))
            if "application/json" in request.headers.get("accept", ""):
                return JSONResponse({**metadata, "npy": base64.b64encode(npy).decode()})
            headers = {f"x-samekit-{key.replace('_', '-')}": str(value) for key, value in metadata.items()}
            return Response(npy, media_type=NPY, headers=headers)

        return await answer(request, "audio", work)

    @app.post("/v1/decode")
    async def decode(
        request: Request,
        format: Literal["wav", "flac"] | None = None,  # noqa: A002 the name of the parameter in the URL
        bits: Literal["16", "24", "32", "float"] = "16",
        peak: Literal["attenuate", "limit", "clip", "raw"] | None = None,
        samples: int | None = None,
    ) -> Response:
        kind = format or ("flac" if "audio/flac" in request.headers.get("accept", "") else "wav")
        subtype = "FLOAT" if bits == "float" else f"PCM_{bits}"

        async def work(folder: Path, stop: threading.Event) -> Response:
            audio = folder / f"audio.{kind}"
            done = service.decode(folder / "latents.npy", audio, subtype, peak, samples, stop)
            await asyncio.wrap_future(done)
            size = audio.stat().st_size
            # The open file outlives its name.
            chunks = _chunks(os.open(audio, os.O_RDONLY))
            return StreamingResponse(chunks, media_type=f"audio/{kind}", headers={"content-length": str(size)})

        return await answer(request, "latents.npy", work)

    return app


async def _receive(request: Request, path: Path, most: int) -> None:
    """Write a body to a file; raise RefusedError if it is too long."""
    too_long = RefusedError(413, f"the body is longer than {most} bytes; send the audio in parts, or compressed")
    if int(request.headers.get("content-length", 0)) > most:
        raise too_long
    size = 0
    with path.open("wb") as file:
        async for chunk in request.stream():
            size += len(chunk)
            if size > most:
                raise too_long
            file.write(chunk)
    if not size:
        raise RefusedError(400, "the body is empty; send the file itself as body")


async def _chunks(descriptor: int) -> AsyncIterator[bytes]:
    with open(descriptor, "rb") as file:  # noqa: ASYNC230 the file is in the system's cache
        while chunk := file.read(_CHUNK):
            yield chunk
