"""Keep the memory of Ray Serve flat for long bodies, and its answers complete: two ASGI middlewares.

Ray Serve passes bodies through as a stream, but its queues have no limit: its proxy reads a body as fast as the client
sends it, and a replica's answer is read as fast as it is made. So each side counts what the other has taken, and tells
it by ASGI messages with new types, which Serve passes on like all others. At most about `WINDOW` bytes are under way
in each direction of a request.

    client -> ProxyFlow, in Serve's proxy -> Serve -> ReplicaFlow, in the replica -> application

Serve imports `middlewares` into its proxies if RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it. Without it, memory
is bounded by the limits of a request only, and an answer is cut off if the replica dies while it is sent.
"""

from __future__ import annotations

import asyncio
import json
import math
from contextlib import suppress
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING, Any, Final

from samekit.serving.limits import BODY_RATE, BODY_SECONDS, STALLED_SECONDS, disk_error

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping
    from typing import Self

    from starlette.middleware import Middleware

    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

IMPORT_PATH: Final = "samekit.serving.flow:middlewares"
"""What RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names."""
WINDOW: Final = 2**22
"""Most bytes of a body that are under way. Each message can exceed it once, by its own size."""
# A body is passed on in parts of about so many bytes, or of what arrives in so many seconds. Each part costs a remote
# call, which takes milliseconds.
_PART: Final = WINDOW // 2
_GATHER_SECONDS: Final = 0.05
# Longer answers wait in a temporary file.
_IN_MEMORY: Final = 2**21
# A replica does not wait until shorter answers are sent.
_LONG_ANSWER: Final = 2**20
_HEADER: Final = b"x-samekit-flow"
_TAKEN: Final = "samekit.taken"
_SENT: Final = "samekit.sent"
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
# Most bytes of a body that are read after its answer was sent.
_DROPPED_BYTES: Final = 2**28
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
        self.given = self.taken = self._told = 0
        self._changed = asyncio.Event()

    def give(self, message: Message) -> None:
        self.given += len(message.get("body", b""))

    def take(self, message: Message) -> Message | None:
        """Count a message that was taken; return a message to the other side if it is time for one."""
        self.taken += len(message.get("body", b""))
        if self.taken - self._told < WINDOW // 2 or not message.get("more_body"):
            return None
        self._told = self.taken
        return {"type": _TAKEN, "bytes": self.taken}

    def told(self, message: Message) -> None:
        """Handle a message of the other side."""
        self.taken = message["bytes"]
        self._changed.set()

    async def until(self, most: int) -> None:
        """Wait until at most so many bytes are under way."""
        while self.given - self.taken > most:
            self._changed.clear()
            await self._changed.wait()


class ProxyFlow:
    """Middleware of Serve's proxy.

    It passes on an answer when the answer is complete. So a client gets status 503, and no part of an answer, if the
    replica dies. A long answer waits in a temporary file without a name.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        dropped = _SERVE_HEADERS | {_HEADER}
        kept = [(name, value) for name, value in scope["headers"] if name.replace(b"_", b"-") not in dropped]
        with _Exchange(receive, send) as exchange:
            await self._app({**scope, "headers": [*kept, (_HEADER, b"1")]}, exchange.receive, exchange.send)
            await exchange.finish()


class _Exchange:
    """A request in Serve's proxy: body and answer."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._body, self._answer = _Window(), _Window()
        self._body_ended = False
        self._reports: asyncio.Queue[Message] = asyncio.Queue()
        self._tasks: dict[str, asyncio.Task[Message]] = {}
        self._start: Message = {}
        self._file = SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 closed in __exit__
        self._answered = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for task in self._tasks.values():
            task.cancel()
        self._file.close()

    async def receive(self) -> Message:
        """Return what the client sends, or a report of how much of the answer was taken."""
        await self._body.until(WINDOW)
        for name, source in (("client", self._part), ("report", self._reports.get)):
            if name not in self._tasks:
                self._tasks[name] = asyncio.ensure_future(source())
        await asyncio.wait(self._tasks.values(), return_when=asyncio.FIRST_COMPLETED)
        name = next(name for name, task in self._tasks.items() if task.done())
        message = self._tasks.pop(name).result()
        self._body.give(message)
        return message

    async def _part(self) -> Message:
        """Return a large part of the body, because Serve passes on each message by a remote call."""
        message = await self._next()
        parts = [message.get("body", b"")]
        with suppress(TimeoutError):
            async with asyncio.timeout(_GATHER_SECONDS):
                while message.get("more_body") and sum(map(len, parts)) < _PART:
                    message = await self._next()
                    parts.append(message.get("body", b""))
        return {**message, "body": b"".join(parts)} if message["type"] == "http.request" else message

    async def _next(self) -> Message:
        message = await self._receive()
        self._body_ended = not message.get("more_body")
        return message

    async def send(self, message: Message) -> None:
        """Take a part of the answer. The errors of Serve itself are plain text; they become JSON."""
        if message["type"] == _TAKEN:
            self._body.told(message)
            return
        if report := self._answer.take(message):
            self._reports.put_nowait(report)
        if self._answered:
            return
        if message["type"] == "http.response.start":
            self._start = message
            plain = any(
                name.lower() == b"content-type" and value[:10] == b"text/plain" for name, value in message["headers"]
            )
            if plain and message["status"] >= 400:
                await self._refuse(*_PROXY_STATUSES.get(message["status"], (message["status"], "the request failed")))
            return
        try:
            self._file.write(message.get("body", b""))
        except OSError as error:
            failure = disk_error(error)
            await self._refuse(failure.status, str(failure))
            return
        if not message.get("more_body"):
            await self._deliver()

    async def finish(self) -> None:
        """Answer if the replica died before its answer was complete."""
        if not self._answered:
            await self._refuse(*_PROXY_STATUSES[500])

    async def _refuse(self, status: int, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        headers += [(b"retry-after", b"1")] if status in (429, 503) else []
        self._start = {"type": "http.response.start", "status": status, "headers": headers}
        self._file.close()
        self._file = SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 closed in __exit__
        self._file.write(body)
        await self._deliver()

    async def _deliver(self) -> None:
        """Send the answer to the client."""
        self._answered = True
        is_early = not self._body_ended
        if is_early:
            self._start = {**self._start, "headers": [*self._start["headers"], (b"connection", b"close")]}
        await self._give(self._start)
        left, is_last = self._file.tell(), False
        self._file.seek(0)
        while not is_last:
            part = self._file.read(_PART)
            left -= len(part)
            is_last = left == 0
            await self._give({"type": "http.response.body", "body": part, "more_body": is_early or not is_last})
        if is_early:
            await self._drop_body()
            await self._give({"type": "http.response.body", "body": b""})
        if self._answer.taken > _LONG_ANSWER:
            self._reports.put_nowait({"type": _SENT})

    async def _give(self, message: Message) -> None:
        async with asyncio.timeout(STALLED_SECONDS):
            await self._send(message)

    async def _drop_body(self) -> None:
        """Read the rest of the body, within limits. Closing the connection before could lose the answer."""
        if task := self._tasks.get("client"):
            task.cancel()
        with suppress(TimeoutError):
            begin, size = asyncio.get_running_loop().time() + BODY_SECONDS, 0
            async with asyncio.timeout_at(begin) as limit:
                while not self._body_ended and size < _DROPPED_BYTES:
                    size += len((await self._next()).get("body", b""))
                    limit.reschedule(begin + size / BODY_RATE)


class ReplicaFlow:
    """Middleware of the application in a replica."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass a request on; do nothing else if it does not come from a `ProxyFlow`."""
        if scope["type"] != "http" or all(name != _HEADER for name, _ in scope["headers"]):
            await self._app(scope, receive, send)
            return
        work = _Work(receive, send)
        sorting = asyncio.ensure_future(work.sort())
        try:
            await self._app(scope, work.receive, work.send)
            await work.finish()
        finally:
            sorting.cancel()


class _Work:
    """A request in a replica: body and answer."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._body, self._answer = _Window(), _Window()
        self._body_ended = False
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._gone: Message | None = None
        self._sent = asyncio.Event()

    async def sort(self) -> None:
        """Receive the body and the reports of the proxy, until the client has gone."""
        while not self._gone:
            try:
                message = await self._receive()
            except Exception:  # noqa: BLE001 Serve's proxy died
                message = {"type": _DISCONNECT}
            if message["type"] == _TAKEN:
                self._answer.told(message)
            elif message["type"] == _SENT:
                self._sent.set()
            else:
                self._messages.put_nowait(message)
            if message["type"] == _DISCONNECT:
                self._gone = message
                self._answer.told({"bytes": math.inf})
                self._sent.set()

    async def receive(self) -> Message:
        if self._gone and self._messages.empty():
            return self._gone
        message = await self._messages.get()
        self._body_ended = not message.get("more_body")
        if report := self._body.take(message):
            await self._send(report)
        return message

    async def send(self, message: Message) -> None:
        await self._send(message)
        self._answer.give(message)
        async with asyncio.timeout(STALLED_SECONDS):
            await self._answer.until(WINDOW)

    async def finish(self) -> None:
        """Wait until the proxy has sent a long answer, because a server that stops waits for requests in replicas."""
        if self._answer.given > _LONG_ANSWER and self._body_ended:
            await self._sent.wait()
