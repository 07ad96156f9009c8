"""The HTTP interface of a replica, as a FastAPI application."""

from __future__ import annotations

import base64
import hashlib
import hmac
import io
import mimetypes
import re
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Final, Literal

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from samekit import __version__
from samekit.audio import readable_suffixes
from samekit.errors import (
    AudioFileError,
    InputError,
    LatentsFileError,
    NonFiniteError,
    OutputError,
    SamekitError,
)
from samekit.serving import metrics
from samekit.serving import service as services
from samekit.serving.flow import ReplicaFlow
from samekit.serving.limits import RefusedError
from samekit.serving.service import DecodedAudio, Service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from samekit.serving.flow import App, Message, Receive, Send

NPY: Final = "application/x-npy"
"""Media type of latents."""
JSON: Final = "application/json"
"""Media type of latents in base64 with metadata."""
WITHOUT_TOKEN: Final = ("/", "/healthz", "/readyz")
"""Paths that need no token: probes, and the page, in which a person enters the token."""
_CLIENT_ERRORS: Final = (AudioFileError, LatentsFileError, InputError, NonFiniteError)
_CHUNK: Final = 2**20
# The status that logs of nginx give to a request whose client has gone.
_GONE: Final = 499
_QUALITY: Final = re.compile(r"[01](\.\d{0,3})?")
_PAGE: Final = Path(__file__).with_name("page.html")
_RAW_BODY: Final = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


def create_app(service: Service, token_sha256: str | None = None) -> FastAPI:
    """Return the application that answers requests with a service, which it closes at its end.

    Args:
        service: does the work.
        token_sha256: SHA-256 of the bearer token that requests need; None for no token.
    """
    html = _PAGE.read_bytes()

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    # The pages for people would load scripts from the internet. A redirection would lead to the host that the client
    # names.
    app = FastAPI(
        title="samekit",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.add_middleware(_Measured)
    app.add_middleware(_Guarded, token_sha256=token_sha256)
    app.add_middleware(ReplicaFlow)
    app.add_exception_handler(SamekitError, _refuse)
    app.add_exception_handler(HTTPException, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse)
    app.add_exception_handler(ClientDisconnect, _refuse)
    app.add_exception_handler(Exception, _refuse)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Say that the server runs."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """Say whether this replica takes requests now."""
        full = service.in_work >= service.options.max_queue
        return JSONResponse({"status": "busy" if full else "ok"}, 503 if full else 200)

    @app.get("/metrics", response_class=Response)
    async def show_metrics() -> Response:
        """Return the metrics of the replicas on this machine, for Prometheus."""
        return Response(metrics.page(), media_type=metrics.CONTENT_TYPE)

    @app.get("/v1/model")
    async def model() -> dict[str, Any]:
        """Return facts about the model, and the limits of a request."""
        return service.facts()

    @app.post("/v1/encode", openapi_extra=_RAW_BODY, response_class=Response)
    async def encode(request: Request) -> Response:
        """Encode the audio file in the body; the answer is `.npy`, or JSON if `Accept` is `application/json`."""
        _check_content(request)
        async with services.Request(service) as work:
            path = await work.receive(request.stream(), _announced(request), f"body{_suffix(request)}")
            encoded = await work.run(service.encode, path)
        npy, metadata = encoded.npy, encoded.metadata
        metrics.AUDIO.labels("encode").inc(metadata["samples"] / metadata["sample_rate"])
        if _preferred(request, NPY, JSON) == JSON:
            return JSONResponse({**metadata, "npy": base64.b64encode(npy).decode("ascii")})
        headers = {f"x-samekit-{name.replace('_', '-')}": str(value) for name, value in metadata.items()}
        return _FileAnswer(io.BytesIO(npy), len(npy), NPY, headers)

    @app.post("/v1/decode", openapi_extra=_RAW_BODY, response_class=Response)
    async def decode(
        request: Request,
        kind: Annotated[Literal["wav", "flac"] | None, Query(alias="format")] = None,
        bits: Literal["16", "24", "32", "float"] = "16",
        peak: Literal["attenuate", "limit", "clip", "raw"] | None = None,
        samples: Annotated[int | None, Query(ge=1)] = None,
    ) -> Response:
        """Decode the `.npy` latents in the body to WAV, or to FLAC by `format` or `Accept`."""
        _check_content(request)
        kind = kind or ("flac" if _preferred(request, "audio/wav", "audio/flac") == "audio/flac" else "wav")
        wanted = DecodedAudio(kind, "FLOAT" if bits == "float" else f"PCM_{bits}", peak, samples)
        async with services.Request(service) as work:
            path = await work.receive(request.stream(), _announced(request), "body.npy")
            audio, written = await work.run(service.decode, path, wanted)
            size = audio.stat().st_size
            # The open file outlives its folder.
            file = audio.open("rb")
        metrics.AUDIO.labels("decode").inc(written / service.model.sample_rate)
        return _FileAnswer(file, size, f"audio/{kind}", {"x-samekit-samples": str(written)})

    return app


async def _refuse(_request: Request, error: Exception) -> JSONResponse:
    """Answer a request that failed: one line of JSON."""
    status, message, headers = 500, "the server failed; see its log", None
    if isinstance(error, ClientDisconnect):
        status, message = _GONE, "the client has gone"
    elif isinstance(error, HTTPException):
        status, message, headers = error.status_code, error.detail, error.headers
    elif isinstance(error, RequestValidationError):
        problem = error.errors()[0]
        status, message = 400, f"{problem['loc'][-1]}: {problem['msg']}"
    elif isinstance(error, SamekitError):
        status, message = 500, str(error)
        if isinstance(error, RefusedError):
            status = error.status
        elif isinstance(error, _CLIENT_ERRORS):
            status = 422
        elif isinstance(error, OutputError):
            status = 503
    if status in (429, 503):
        headers = {"retry-after": "1"}
    return JSONResponse({"error": " ".join(message.split())}, status, headers)


def _check_content(request: Request) -> None:
    """Refuse bodies that are no plain file."""
    content = request.headers.get("content-type", "")
    if content.lower().startswith("multipart/"):
        raise RefusedError(415, f"the body is {content.partition(';')[0]}; send the file itself as the body")
    if coding := request.headers.get("content-encoding"):
        raise RefusedError(415, f"the content encoding {coding[:20]!r} is not supported; send the file as it is")


def _announced(request: Request) -> int:
    """Return the length of the body if the client announces it, else 0. The server has checked that it is a number."""
    return int(request.headers.get("content-length", 0))


def _preferred(request: Request, *offers: str) -> str:
    """Return the media type that the client prefers (RFC 9110, 12.5.1); the first one if it names none of them."""
    qualities = {}
    for entry in ",".join(request.headers.getlist("accept")).lower().split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        given = [part[2:] for part in parameters if part.startswith("q=")]
        qualities[name] = float(given[0]) if given and _QUALITY.fullmatch(given[0]) else float(not given)

    def preference(offer: str) -> tuple[float, bool]:
        ranges = (offer, f"{offer.partition('/')[0]}/*", "*/*")
        quality = next((qualities[name] for name in ranges if name in qualities), 0.0)
        return quality, quality > 0 and offer in qualities

    return max(offers, key=preference)


def _suffix(request: Request) -> str:
    """Return the suffix for a media type; a few formats are recognised by their names only."""
    suffix = mimetypes.guess_extension(request.headers.get("content-type", "").partition(";")[0]) or ""
    return suffix if suffix in readable_suffixes() else ""


class _FileAnswer(Response):
    """An answer with the contents of a file. The announced length shows the client when the answer is cut off.

    Unlike `StreamingResponse`, it needs no tasks and no empty message at the end. Serve itself ends requests whose
    clients have gone.
    """

    def __init__(self, file: BinaryIO, size: int, media_type: str, headers: Mapping[str, str]) -> None:
        super().__init__(headers={"content-length": str(size), **headers}, media_type=media_type)
        self._file, self._size = file, size

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        with self._file as file:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            left = self._size
            while left:
                part = file.read(_CHUNK)
                left -= len(part)
                await send({"type": "http.response.body", "body": part, "more_body": left > 0})


class _Guarded:
    """Middleware that refuses requests without the bearer token."""

    def __init__(self, app: App, token_sha256: str | None) -> None:
        self._app, self._token_sha256 = app, token_sha256

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and self._token_sha256 and scope["path"] not in WITHOUT_TOKEN:
            # A server in front of this one may have checked another one of several tokens.
            given = ", ".join(Request(scope).headers.getlist("authorization"))
            scheme, _, token = given.partition(" ")
            # Starlette decodes headers as Latin-1, whatever the client's encoding is.
            digest = hashlib.sha256(token.strip().encode("latin-1")).hexdigest()
            if not hmac.compare_digest(digest, self._token_sha256) or scheme.lower() != "bearer":
                message = "this server needs a token; send the header Authorization: Bearer TOKEN"
                app = JSONResponse({"error": message}, 401, {"www-authenticate": "Bearer"})
        await app(scope, receive, send)


class _Measured:
    """Middleware that counts requests and measures their time."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = time.monotonic(), _GONE
        metrics.IN_WORK.inc()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            metrics.ended(route, status, time.monotonic() - begin)
            metrics.IN_WORK.dec()
