"""How much load does `samekit serve` hold, and are its answers right?

The server is started on a free port of the loopback interface. Clients send clips to it, each one after the other, and
compare every answer with the library's, which were computed before. The bare encoder is measured in a process alone,
before and after the load. Client and server share the cores, so the client only compares bytes.

    python benchmarks/serve_load.py engines/same-s --clients 64 --seconds 300
    python benchmarks/serve_load.py engines/same-s --kill-every 20
    python benchmarks/serve_load.py engines/same-s --hostile 5000 --clients 4
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
import shlex
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import httpx
import numpy as np
from common import engine_argument, finish, plot_lines, plot_option, question
from hostile_requests import Hostile, send
from load_clips import Clip, Task, alone, bare_speed, outcome_of, read_clips, write_clips
from load_server import Sample, Server

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from samekit.engine.folder import Engine

ANSWER_SECONDS = 120
LONGEST_RETRY = 5.0
HOSTILE_AT_ONCE = 16
SAMPLES = 40
"""How often memory is measured in a run, at most once a second. Each time takes about 40 ms of processor time."""


@dataclass
class Answer:
    """One answered request of a client."""

    seconds: float
    """When it was complete, since the beginning of the load."""
    latency: float
    outcome: str
    """`equal`, `close`, `wrong`, a status that was announced, or a fault."""


@dataclass
class Tally:
    """What the clients saw."""

    answers: list[Answer] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    """Errors that the server must not make, with their number."""
    hostile: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    killed: Counter[str] = field(default_factory=Counter)


class Load:
    """Clients, hostile clients and a killer of replicas, that work on one server for some seconds."""

    def __init__(self, server: Server, task: Task, clips: list[Clip], seconds: float, rate: float | None) -> None:
        self._server, self._task, self._clips, self._rate = server, task, clips, rate
        self.tally = Tally()
        self.begin = time.perf_counter()
        self.end = self.begin + seconds
        self._starts = itertools.count()
        self._chance = random.Random(0)

    async def run(self, clients: int, kill_every: float | None, hostile: Iterator[Any]) -> None:
        """Load the server until the time is over and all hostile requests are sent."""
        limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
        async with httpx.AsyncClient(
            base_url=self._server.url, timeout=ANSWER_SECONDS, limits=limits, trust_env=False
        ) as http:
            rest = [asyncio.create_task(self._every(max(1.0, (self.end - self.begin) / SAMPLES), self._sample))]
            if kill_every:
                rest.append(asyncio.create_task(self._every(kill_every, self._kill)))
            work = [self._client(http, random.Random(number)) for number in range(clients)]
            work += [self._hostile_client(hostile) for _ in range(HOSTILE_AT_ONCE)]
            await asyncio.gather(*work)
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)
            self._sample()

    async def _client(self, http: httpx.AsyncClient, chance: random.Random) -> None:
        while (begin := await self._turn()) < self.end:
            clip, pause = chance.choice(self._clips), 0.0
            try:
                answer = await http.post(f"/v1/{self._task}", content=clip.body)
            except httpx.HTTPError as error:
                outcome, pause = f"{type(error).__name__}: {error}", 0.1
            else:
                outcome = outcome_of(self._task, answer, clip.expected)
                if outcome in ("429", "503"):
                    after = answer.headers.get("Retry-After", "")
                    pause = min(float(after), LONGEST_RETRY) if after.isdecimal() else 1.0
            now = time.perf_counter()
            self.tally.answers.append(Answer(now - self.begin, now - begin, outcome))
            if outcome not in ("equal", "close", "429", "503"):
                self.tally.faults[outcome] += 1
            # The clients must not all return at the same moment.
            await asyncio.sleep(pause * chance.uniform(0.5, 1))

    async def _turn(self) -> float:
        """Wait for the time of the next request, if a rate was given, and return it."""
        if self._rate is None:
            return time.perf_counter()
        due = self.begin + next(self._starts) / self._rate
        await asyncio.sleep(min(due, self.end) - time.perf_counter())
        return due

    async def _hostile_client(self, requests: Iterator[Any]) -> None:
        for request in requests:
            kind, answer, fault = await send(request, self._server.port)
            self.tally.hostile[f"{kind}: {answer}"] += 1
            if fault:
                self.tally.faults[f"{kind}: {fault}"] += 1

    async def _every(self, seconds: float, action: Callable[[], object]) -> None:
        while True:
            await asyncio.sleep(seconds)
            action()

    def _sample(self) -> None:
        self.tally.samples.append(self._server.sample())

    def _kill(self) -> None:
        if title := self._server.kill_replica(self._chance):
            self.tally.killed[title] += 1


async def with_trap(action: Callable[[str], Awaitable[None]]) -> int:
    """Run an action with the address of a listener; return how many connections the listener got."""
    connections = 0

    async def count(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        writer.close()

    async with await asyncio.start_server(count, "127.0.0.1", 0) as listener:
        host, port = listener.sockets[0].getsockname()
        await action(f"{host}:{port}")
    return connections


def results_of(load: Load, clip_seconds: float, bare: list[tuple[float, float]], cpu: float) -> dict[str, Any]:
    """Return the figures of a run."""
    tally, duration = load.tally, load.end - load.begin
    right = [answer for answer in tally.answers if answer.outcome in ("equal", "close")]
    speed = sum(clip_seconds for answer in right if answer.seconds <= duration) / duration
    per_cpu = len(right) * clip_seconds / cpu if cpu else 0.0
    latencies = sorted(answer.latency for answer in right) or [float("nan")]
    return {
        "requests": len(tally.answers),
        "outcomes": dict(Counter(answer.outcome for answer in tally.answers)),
        "audio_seconds_per_second": speed,
        "bare_audio_seconds_per_second": [speed for speed, _ in bare],
        "share_of_bare": speed / (sum(speed for speed, _ in bare) / len(bare)),
        "share_of_bare_by_cpu": per_cpu / (sum(speed for _, speed in bare) / len(bare)),
        "latency": {f"p{share}": float(np.percentile(latencies, share)) for share in (50, 95, 99, 100)},
        "killed": dict(tally.killed),
        "hostile": dict(sorted(tally.hostile.items())),
        "faults": dict(tally.faults),
        "memory": memory_of(tally.samples),
    }


def memory_of(samples: list[Sample]) -> dict[str, Any]:
    """Return how memory, descriptors and files grew from the second quarter of a run to the last one."""
    quarter = max(1, len(samples) // 4)
    early, late = samples[quarter : 2 * quarter] or samples, samples[-quarter:]

    def mean(part: list[Sample], name: str) -> float:
        return round(float(np.mean([getattr(sample, name) for sample in part])), 1)

    names = ("mib", "replica_mib", "processes", "descriptors", "files")
    return {name: [mean(early, name), mean(late, name)] for name in names}


def points_of(load: Load, clip_seconds: float) -> Iterator[tuple[str, str, float, float]]:
    """Yield the points of the picture: memory, latency and throughput over time."""
    first = load.tally.samples[0].seconds
    for sample in load.tally.samples:
        yield "memory in MiB", "all processes", sample.seconds - first, sample.mib
        yield "memory in MiB", "replicas", sample.seconds - first, sample.replica_mib
    duration = load.end - load.begin
    step = duration / min(30, max(1, duration))
    done: dict[int, list[float]] = {}
    for answer in load.tally.answers:
        if answer.outcome in ("equal", "close") and answer.seconds <= duration:
            done.setdefault(int(answer.seconds / step), []).append(answer.latency)
    for interval, latencies in sorted(done.items()):
        middle = (interval + 0.5) * step
        yield "latency in seconds", "median", middle, float(np.median(latencies))
        yield "latency in seconds", "p95", middle, float(np.percentile(latencies, 95))
        yield "seconds of audio per second", "answered", middle, len(latencies) * clip_seconds / step


@question
@engine_argument
@click.option("--task", default="encode", show_default=True, type=click.Choice(["encode", "decode"]))
@click.option("--clients", default=64, show_default=True, type=click.IntRange(1, 1000))
@click.option("--seconds", default=60.0, show_default=True, type=click.FloatRange(1, 3600))
@click.option("--clip-seconds", default=10.0, show_default=True, type=click.FloatRange(0.1, 600))
@click.option("--rate", type=click.FloatRange(0.01, 10_000), help="Requests per second.  [default: without pauses]")
@click.option("--precision", default="fp32", show_default=True)
@click.option("--kill-every", type=click.FloatRange(1), help="Kill a replica every so many seconds.")
@click.option("--hostile", default=0, show_default=True, type=click.IntRange(0, 100_000), help="Hostile requests.")
@click.option("--bare-seconds", default=10.0, show_default=True, type=click.FloatRange(0, 600))
@click.option("--serve", "serve_options", default="", help="Further options of `samekit serve`, in quotes.")
@plot_option
def main(
    engine: Engine,
    task: Task,
    clients: int,
    seconds: float,
    clip_seconds: float,
    rate: float | None,
    precision: str,
    kill_every: float | None,
    hostile: int,
    bare_seconds: float,
    serve_options: str,
    plot_path: Path | None,
) -> None:
    """Print the table for one ENGINE folder; the last line is JSON."""
    folder = engine.folder.absolute()
    bare_arguments = (folder, precision, task, clip_seconds, bare_seconds)
    with tempfile.TemporaryDirectory(prefix="load-") as scratch:
        clips_folder, server_folder, canary = (Path(scratch, name) for name in ("clips", "s", "canary"))
        clips_folder.mkdir()
        server_folder.mkdir()
        alone(write_clips, folder, precision, task, clip_seconds, clips_folder)
        clips = read_clips(task, clips_folder)
        bare = [alone(bare_speed, *bare_arguments)]
        server = Server(folder, server_folder, ["--precision", precision, *shlex.split(serve_options)])
        try:
            first = httpx.post(f"{server.url}/v1/{task}", content=clips[0].body, timeout=ANSWER_SECONDS)
            first_seconds = time.perf_counter() - server.started
            before, files, cpu = server.replicas(), server.temporary_files(), server.cpu_seconds()
            load = Load(server, task, clips, seconds, rate)

            async def loaded(trap: str) -> None:
                maker = Hostile(engine.spec.latent_width, trap, canary)
                await load.run(clients, kill_every, map(maker.request, range(hostile)))

            opened = asyncio.run(with_trap(loaded))
            cpu = server.cpu_seconds() - cpu
            after = server.wait_for_replicas(len(before))
            crashed = 0 if kill_every else len(set(before) - set(after))
            new_files = server.wait_for_new_files(files)
        finally:
            stopped = server.stop()
        left_files = server.temporary_files()
        bare.append(alone(bare_speed, *bare_arguments))
        results = results_of(load, clip_seconds, bare, cpu)
        results |= {
            "first_answer": {"outcome": outcome_of(task, first, clips[0].expected), "seconds": first_seconds},
            "start_seconds": server.start_seconds,
            "replicas": [len(before), len(after)],
            "crashed_replicas": crashed,
            "new_files": new_files,
            "left_files": left_files,
            "opened_addresses": opened,
            "unpickled": canary.exists(),
            "stop": stopped,
            "samples": [dataclasses.astuple(sample) for sample in load.tally.samples],
        }
    show(engine.folder.name, results)
    if plot_path:
        plot_lines(plot_path, points_of(load, clip_seconds), x="seconds", y="", xscale="linear")
    finish("serve_load", results)


def show(name: str, results: dict[str, Any]) -> None:
    """Print the table."""
    latency, memory = results["latency"], results["memory"]
    rows = {
        "start, first answer": f"{results['start_seconds']:.1f} s, {results['first_answer']['seconds']:.1f} s",
        "throughput": f"{results['audio_seconds_per_second']:.1f} seconds of audio per second, "
        f"{results['share_of_bare']:.0%} of the bare model ({results['share_of_bare_by_cpu']:.0%} by processor time)",
        "latency": ", ".join(f"{share} {value:.2f} s" for share, value in latency.items()),
        "answers": ", ".join(f"{count} {outcome}" for outcome, count in results["outcomes"].items()),
        "replicas": f"{results['replicas'][0]} before, {results['replicas'][1]} after; "
        f"{sum(results['killed'].values())} killed, {results['crashed_replicas']} crashed",
        "hostile requests": f"{sum(results['hostile'].values())}",
        "memory": f"{memory['mib'][0]} MiB early, {memory['mib'][1]} MiB late "
        f"(replicas {memory['replica_mib'][0]}, {memory['replica_mib'][1]})",
        "open files": f"{memory['descriptors'][0]} early, {memory['descriptors'][1]} late",
        "temporary files": f"{len(results['new_files'])} more after the load, "
        f"{len(results['left_files'])} after the stop",
        "stop": f"{results['stop']['seconds']} s, exit code {results['stop']['exit_code']}, "
        f"{len(results['stop']['left_processes'])} processes left",
    }
    print(name)
    for label, value in rows.items():
        print(f"  {label:26}{value}")
    for fault, count in results["faults"].items():
        print(f"  FAULT, {count} times: {fault}")


if __name__ == "__main__":
    main()
