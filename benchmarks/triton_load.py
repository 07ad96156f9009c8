"""How much of the encoder's throughput does a Triton server of the Python backend give to many clients?

The encoder alone runs in this process before and after the load, with every core. The clients run in this process too,
so their work is a part of the server's cost. Each answer is compared with the library's.

    python benchmarks/triton_load.py engines/same-s --clients 32 --seconds 60
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import psutil
from common import engine_argument, finish, open_codec, question
from ray_overhead import cpu_seconds
from tritonclient import grpc

from samekit.backends.cpu import available_cpus
from samekit.engine.spec import ENCODER
from samekit.errors import first_line
from samekit.serving.triton import TritonOptions, model_name, write_repository
from samekit.serving.triton_server import TritonServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from samekit.arrays import Array
    from samekit.engine.folder import Engine

RETRY_SECONDS = 0.1
"""Pause of a client after an error."""
ANSWER_SECONDS = 120


def memory(server: TritonServer) -> float:
    """Return the MB that the server and the processes of its models occupy, without what they share."""
    process = psutil.Process(server.process.pid)
    return float(sum(each.memory_full_info().uss for each in (process, *process.children())) / 1e6)


def timed(work: Callable[[], int]) -> tuple[int, float, float]:
    """Return the result of some work, its seconds, and its processor time with that of all child processes."""
    cpu, start = cpu_seconds(), time.perf_counter()
    result = work()
    return result, time.perf_counter() - start, cpu_seconds() - cpu


@dataclass
class Answers:
    """What one client saw."""

    latencies: list[float] = field(default_factory=list)
    """Seconds of each answer."""
    wrong: int = 0
    errors: Counter[str] = field(default_factory=Counter)


def ask(client: grpc.InferenceServerClient, model: str, clips: list[tuple[Array, Array]], until: float) -> Answers:
    """Send clips, each with the right answer, until a time is past."""
    found = Answers()
    while time.monotonic() < until:
        audio, latents = clips[len(found.latencies) % len(clips)]
        tensor = grpc.InferInput("audio", list(audio.shape), "FP32")
        tensor.set_data_from_numpy(audio)
        start = time.perf_counter()
        try:
            answer = client.infer(model, [tensor], client_timeout=ANSWER_SECONDS).as_numpy("latents")
        except grpc.InferenceServerException as error:
            found.errors[first_line(error)] += 1
            time.sleep(RETRY_SECONDS)
            continue
        found.latencies.append(time.perf_counter() - start)
        found.wrong += not np.array_equal(answer, latents)
    return found


def ask_all(url: str, model: str, clips: list[tuple[Array, Array]], clients: int, until: float) -> list[Answers]:
    """Send clips from many clients until a time is past."""
    with ThreadPoolExecutor(clients) as pool, ExitStack() as stack:
        # If this is interrupted, the connections are closed first. That ends the requests for which the pool waits.
        connections = [stack.enter_context(grpc.InferenceServerClient(url)) for _ in range(clients)]
        turns = [clips[number % len(clips) :] + clips[: number % len(clips)] for number in range(clients)]
        return list(pool.map(lambda each, turn: ask(each, model, turn, until), connections, turns))


def summarised(clip: float, alone: Iterable[float], loaded: Iterable[float], found: list[Answers]) -> dict[str, Any]:
    """Return the figures of a load; `alone` and `loaded` are sums of what `timed` returns."""
    (alone_clips, alone_seconds, alone_cpu), (clips, seconds, cpu) = alone, loaded
    latencies = [each for answers in found for each in answers.latencies]
    errors = sum((answers.errors for answers in found), Counter())
    if not latencies:
        raise click.ClickException(f"no request was answered ({errors}); check the server")
    return {
        "audio_seconds_per_second": {"encoder": alone_clips * clip / alone_seconds, "server": clips * clip / seconds},
        "share": clips / seconds / (alone_clips / alone_seconds),
        "share_per_processor_second": clips / cpu / (alone_clips / alone_cpu),
        "latency": dict(zip(("p50", "p95", "p99"), np.percentile(latencies, [50, 95, 99]).tolist(), strict=True)),
        "answers": len(latencies),
        "wrong": sum(answers.wrong for answers in found),
        "errors": dict(errors),
    }


@question
@engine_argument
@click.option("--clients", default=32, show_default=True, type=click.IntRange(1))
@click.option("--seconds", default=60.0, show_default=True, type=click.FloatRange(1, 3600), help="Of load.")
@click.option("--clip", default=10.0, show_default=True, type=click.FloatRange(0.1, 600), help="Seconds of each clip.")
@click.option("--instances", default=1, show_default=True, type=click.IntRange(1))
@click.option(
    "--kind", default="cpu", show_default=True, type=click.Choice(["cpu", "auto"]), help="auto joins requests."
)
@click.option("--max-batch", default=8, show_default=True, type=click.IntRange(1))
@click.option("--queue-delay", default=2000, show_default=True, type=click.IntRange(0))
def main(engine: Engine, clients: int, seconds: float, clip: float, **options: Any) -> None:
    """Print the throughput for one ENGINE folder; the last line is JSON."""
    spec, name = engine.spec, model_name(engine.spec.name, ENCODER)
    samples = round(clip * spec.sample_rate)
    served = TritonOptions("python", **options)
    codec = open_codec(engine.folder, "onnxruntime", "fp32", max(1, available_cpus() // served.instances))
    codec.backend.use_packed_weights(ENCODER)
    arrays = [
        np.random.RandomState(seed).standard_normal((1, spec.channels, samples)).astype(np.float32) * np.float32(0.2)
        for seed in range(4)
    ]
    clips = [(array, codec.encode_audio(array)) for array in arrays]
    bare = open_codec(engine.folder, "onnxruntime", "fp32", available_cpus())
    bare.backend.use_packed_weights(ENCODER)
    bare.encode_audio(arrays[0])

    def alone() -> int:
        until, done = time.monotonic() + seconds / 4, 0
        while time.monotonic() < until:
            bare.encode_audio(arrays[done % len(arrays)])
            done += 1
        return done

    found: list[Answers] = []
    with tempfile.TemporaryDirectory() as scratch:
        write_repository(engine, Path(scratch, "models"), served)
        start = time.perf_counter()
        with TritonServer(Path(scratch, "models")) as server:
            ready = time.perf_counter() - start
            before = timed(alone)
            # The first requests allocate memory.
            ask_all(server.grpc, name, clips, 2 * served.instances, time.monotonic() + 1)

            def load() -> int:
                found.extend(ask_all(server.grpc, name, clips, clients, time.monotonic() + seconds))
                return sum(len(answers.latencies) for answers in found)

            memory_before = memory(server)
            loaded = timed(load)
            memory_after = memory(server)
            after = timed(alone)
    results = summarised(clip, map(sum, zip(before, after, strict=True)), loaded, found)
    results |= {"seconds_to_ready": ready, "memory_mb": {"before": memory_before, "after": memory_after}}
    print(
        f"{results['share']:.0%} of the encoder's throughput, {results['share_per_processor_second']:.0%} for the same "
        f"processor time; {results['answers']} answers, {results['wrong']} wrong, "
        f"{sum(results['errors'].values())} errors; memory {memory_before:.0f} -> {memory_after:.0f} MB"
    )
    finish("triton_load", results)


if __name__ == "__main__":
    main()
