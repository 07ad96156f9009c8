"""Keep the memory of Ray Serve flat for long bodies: two ASGI middlewares that limit what is under way.

Ray Serve passes bodies through as a stream, but its queues have no limit: its proxy reads a body as fast as the client
sends it, and a replica's answer is read as fast as it is made. So each side counts what the other has taken, and tells
it by ASGI messages with new types, which Serve passes on like all others. At most `WINDOW` bytes are under way in
each direction of a request.

    client -> ProxyFlow, in Serve's proxy -> Serve -> ReplicaFlow, in the replica -> application

Serve imports `middlewares` into its proxies if RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it. Without it, all
works, but memory is bounded by the limits of a request only.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    from starlette.middleware import Middleware

    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

IMPORT_PATH: Final = "samekit.serving.flow:middlewares"
"""What RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names."""
WINDOW: Final = 2**20
"""Most bytes of a body that are under way. Each message can exceed it once, by its own size."""
_HEADER: Final = b"x-samekit-flow"
_TAKEN: Final = "samekit.taken"
_DISCONNECT: Final = "http.disconnect"
# Headers by which any client could tell Serve's proxy how to treat its request, with hyphens for underscores. Serve
# answers with a plain status 500 if their values are not UTF-8.
_SERVE_HEADERS: Final = {
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
    b"x-request-id",
    b"x-session-id",
    b"serve-multiplexed-model-id",
}
# A client that takes less than half a window in so many seconds is given up.
_STALLED_SECONDS: Final = 60
_PROXY_STATUSES: Final = {
    404: (503, "the server has no model at present; try again later"),
    500: (503, "the replica with this request died; send it again"),
    503: (503, "the server has too many requests, or no model at present; try again later"),
}


def middlewares() -> list[Middleware]:
    """Return the middleware for Serve's proxies."""
    from starlette.middleware import Middleware

    return [Middleware(ProxyFlow)]


class _Window:
    """Counts the bytes that one side gave and the other took."""

    def __init__(self) -> None:
        self._given = self._taken = self._told = 0
        self._changed = asyncio.Event()

    def give(self, message: Message) -> None:
        self._given += len(message.get("body", b""))

    def take(self, message: Message) -> Message | None:
        """Count a message that was taken; return a message to the other side if it is time for one."""
        self._taken += len(message.get("body", b""))
        if self._taken - self._told < WINDOW // 2:
            return None
        self._told = self._taken
        return {"type": _TAKEN, "bytes": self._taken}

    def told(self, message: Message) -> None:
        """Handle a message of the other side."""
        self._taken = message["bytes"]
        self._changed.set()

    async def room(self) -> None:
        """Wait until less than a window is under way."""
        while self._given - self._taken > WINDOW:
            self._changed.clear()
            await self._changed.wait()


class ProxyFlow:
    """Middleware of Serve's proxy; also answers with status 503 where a replica died, instead of 500."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        dropped = _SERVE_HEADERS | {_HEADER}
        kept = [(name, value) for name, value in scope["headers"] if name.replace(b"_", b"-") not in dropped]
        exchange = _Exchange(receive, send)
        try:
            await self._app({**scope, "headers": [*kept, (_HEADER, b"1")]}, exchange.receive, exchange.send)
            await exchange.finish()
        finally:
            exchange.close()


class _Exchange:
    """A request in Serve's proxy: body and answer."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._body, self._answer = _Window(), _Window()
        self._reports: asyncio.Queue[Message] = asyncio.Queue()
        self._tasks: dict[str, asyncio.Task[Message]] = {}
        self._started = self._replaced = False

    async def receive(self) -> Message:
        """Return what the client sends, or a report of how much of the answer it has taken."""
        await self._body.room()
        for name, source in (("client", self._receive), ("report", self._reports.get)):
            if name not in self._tasks:
                self._tasks[name] = asyncio.ensure_future(source())
        await asyncio.wait(self._tasks.values(), return_when=asyncio.FIRST_COMPLETED)
        name = next(name for name, task in self._tasks.items() if task.done())
        message = self._tasks.pop(name).result()
        self._body.give(message)
        return message

    async def send(self, message: Message) -> None:
        """Pass on a part of the answer. The errors of Serve itself are plain text; they become JSON."""
        if message["type"] == _TAKEN:
            self._body.told(message)
            return
        if message["type"] == "http.response.start":
            self._started = True
            plain = any(
                name.lower() == b"content-type" and value[:10] == b"text/plain" for name, value in message["headers"]
            )
            if plain and message["status"] >= 400:
                await self._refuse(*_PROXY_STATUSES.get(message["status"], (message["status"], "the request failed")))
        if self._replaced:
            return
        await self._send(message)
        if report := self._answer.take(message):
            self._reports.put_nowait(report)

    async def finish(self) -> None:
        """Answer if the replica died after it had reported how much of the body it had taken."""
        if not self._started:
            await self._refuse(*_PROXY_STATUSES[500])

    def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()

    async def _refuse(self, status: int, message: str) -> None:
        self._started = self._replaced = True
        body = json.dumps({"error": message}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


class ReplicaFlow:
    """Middleware of the application in a replica."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass a request on; do nothing else if it does not come from a `ProxyFlow`."""
        if scope["type"] != "http" or all(name != _HEADER for name, _ in scope["headers"]):
            await self._app(scope, receive, send)
            return
        body, answer = _Window(), _Window()
        messages: asyncio.Queue[Message] = asyncio.Queue()
        gone: list[Message] = []

        async def sort() -> None:
            while not gone:
                message = await receive()
                if message["type"] == _TAKEN:
                    answer.told(message)
                    continue
                if message["type"] == _DISCONNECT:
                    gone.append(message)
                messages.put_nowait(message)

        async def next_message() -> Message:
            if gone and messages.empty():
                return gone[0]
            message = await messages.get()
            if report := body.take(message):
                await send(report)
            return message

        async def paced(message: Message) -> None:
            await send(message)
            answer.give(message)
            async with asyncio.timeout(_STALLED_SECONDS):
                await answer.room()

        sorting = asyncio.ensure_future(sort())
        try:
            await self._app(scope, next_message, paced)
        finally:
            sorting.cancel()
