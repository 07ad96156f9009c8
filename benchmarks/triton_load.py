"""How much of the encoder's throughput does a Triton server of the Python backend give to many clients?

The encoder alone runs in this process before and after the load, with every core. The clients run in this process too,
so their work is a part of the server's cost. Each answer is compared with the library's.

    python benchmarks/triton_load.py engines/same-s --clients 32 --seconds 60
"""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import psutil
from common import engine_argument, finish, open_codec, question
from ray_overhead import cpu_seconds

from samekit.backends.cpu import available_cpus
from samekit.engine.spec import ENCODER
from samekit.serving.triton import TritonOptions, model_name, write_repository
from samekit.serving.triton_server import TritonServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from samekit.arrays import Array
    from samekit.engine.folder import Engine


def memory(server: TritonServer) -> float:
    """Return the MB that the server and the processes of its models occupy, without what they share."""
    process = psutil.Process(server.process.pid)
    return float(sum(each.memory_full_info().uss for each in (process, *process.children())) / 1e6)


def timed(work: Callable[[], int]) -> tuple[int, float, float]:
    """Return the result of some work, its seconds, and its processor time with that of all child processes."""
    cpu, start = cpu_seconds(), time.perf_counter()
    result = work()
    return result, time.perf_counter() - start, cpu_seconds() - cpu


Load = tuple[list[float], int, int]
"""Seconds of each answer of a client, and how many answers were wrong or errors."""


def ask(url: str, model: str, clips: list[tuple[Array, Array]], until: float) -> Load:
    """Send clips, each with the right answer, until a time is past."""
    from tritonclient import grpc

    latencies: list[float] = []
    wrong, errors = 0, 0
    with grpc.InferenceServerClient(url) as client:
        while time.monotonic() < until:
            audio, latents = clips[len(latencies) % len(clips)]
            tensor = grpc.InferInput("audio", list(audio.shape), "FP32")
            tensor.set_data_from_numpy(audio)
            start = time.perf_counter()
            try:
                answer = client.infer(model, [tensor]).as_numpy("latents")
            except grpc.InferenceServerException:
                errors += 1
                continue
            latencies.append(time.perf_counter() - start)
            wrong += not np.array_equal(answer, latents)
    return latencies, wrong, errors


def summarised(clip: float, alone: Iterable[float], loaded: Iterable[float], found: list[Load]) -> dict[str, Any]:
    """Return the figures of a load; `alone` and `loaded` are sums of what `timed` returns."""
    (alone_clips, alone_seconds, alone_cpu), (clips, seconds, cpu) = alone, loaded
    latencies = [each for row, _, _ in found for each in row]
    return {
        "audio_seconds_per_second": {"encoder": alone_clips * clip / alone_seconds, "server": clips * clip / seconds},
        "share": clips / seconds / (alone_clips / alone_seconds),
        "share_per_processor_second": clips / cpu / (alone_clips / alone_cpu),
        "latency": dict(zip(("p50", "p95", "p99"), np.percentile(latencies, [50, 95, 99]).tolist(), strict=True)),
        "answers": len(latencies),
        "wrong": sum(wrong for _, wrong, _ in found),
        "errors": sum(errors for _, _, errors in found),
    }


@question
@engine_argument
@click.option("--clients", default=32, show_default=True, type=click.IntRange(1))
@click.option("--seconds", default=60.0, show_default=True, help="Of load.")
@click.option("--clip", default=10.0, show_default=True, help="Seconds of each clip.")
@click.option("--instances", default=1, show_default=True, type=click.IntRange(1))
@click.option("--max-batch", default=8, show_default=True, type=click.IntRange(1))
@click.option("--queue-delay", default=2000, show_default=True, type=click.IntRange(0))
def main(
    engine: Engine, clients: int, seconds: float, clip: float, instances: int, max_batch: int, queue_delay: int
) -> None:
    """Print the throughput for one ENGINE folder; the last line is JSON."""
    spec, name = engine.spec, model_name(engine.spec.name, ENCODER)
    samples = round(clip * spec.sample_rate)
    codec = open_codec(engine.folder, "onnxruntime", "fp32", max(1, available_cpus() // instances))
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

    options = TritonOptions("python", max_batch=max_batch, queue_delay=queue_delay, instances=instances)
    found: list[Load] = []
    with tempfile.TemporaryDirectory() as scratch:
        write_repository(engine, Path(scratch, "models"), options)
        start = time.perf_counter()
        with TritonServer(Path(scratch, "models")) as server:
            ready = time.perf_counter() - start
            before = timed(alone)
            ask(server.grpc, name, clips, time.monotonic() + 1)

            def load() -> int:
                until = time.monotonic() + seconds
                with ThreadPoolExecutor(clients) as pool:
                    turns = (clips[first % 4 :] + clips[: first % 4] for first in range(clients))
                    found.extend(pool.map(lambda turn: ask(server.grpc, name, turn, until), turns))
                return sum(len(latencies) for latencies, _, _ in found)

            memory_before = memory(server)
            loaded = timed(load)
            memory_after = memory(server)
            after = timed(alone)
    results = summarised(clip, map(sum, zip(before, after, strict=True)), loaded, found)
    results |= {"seconds_to_ready": ready, "memory_mb": {"before": memory_before, "after": memory_after}}
    print(
        f"{results['share']:.0%} of the encoder's throughput, {results['share_per_processor_second']:.0%} for the same "
        f"processor time; {results['answers']} answers, {results['wrong']} wrong, {results['errors']} errors; "
        f"memory {memory_before:.0f} -> {memory_after:.0f} MB"
    )
    finish("triton_load", results)


if __name__ == "__main__":
    main()
