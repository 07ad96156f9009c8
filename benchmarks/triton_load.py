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
    from collections.abc import Callable

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
    from tritonclient import grpc

    spec, name = engine.spec, model_name(engine.spec.name, ENCODER)
    samples = round(clip * spec.sample_rate)
    codec = open_codec(engine.folder, "onnxruntime", "fp32", max(1, available_cpus() // instances))
    codec.backend.use_packed_weights(ENCODER)
    arrays = [
        np.random.RandomState(seed).standard_normal((1, spec.channels, samples)).astype(np.float32) * np.float32(0.2)
        for seed in range(4)
    ]
    expected = [codec.encode_audio(array) for array in arrays]
    bare = open_codec(engine.folder, "onnxruntime", "fp32", available_cpus())
    bare.backend.use_packed_weights(ENCODER)
    bare.encode_audio(arrays[0])

    def alone() -> int:
        until, done = time.monotonic() + seconds / 4, 0
        while time.monotonic() < until:
            bare.encode_audio(arrays[done % len(arrays)])
            done += 1
        return done

    def ask(server: TritonServer, number: int, until: float) -> tuple[list[float], int, int]:
        """Send requests until a time is past; return their seconds, and how many answers were wrong or errors."""
        latencies, wrong, errors = [], 0, 0
        with grpc.InferenceServerClient(server.grpc) as client:
            while time.monotonic() < until:
                index = (number + len(latencies)) % len(arrays)
                tensor = grpc.InferInput("audio", list(arrays[index].shape), "FP32")
                tensor.set_data_from_numpy(arrays[index])
                start = time.perf_counter()
                try:
                    answer = client.infer(name, [tensor]).as_numpy("latents")
                except grpc.InferenceServerException:
                    errors += 1
                    continue
                latencies.append(time.perf_counter() - start)
                wrong += not np.array_equal(answer, expected[index])
        return latencies, wrong, errors

    options = TritonOptions("python", max_batch=max_batch, queue_delay=queue_delay, instances=instances)
    found: list[tuple[list[float], int, int]] = []
    with tempfile.TemporaryDirectory() as scratch:
        write_repository(engine, Path(scratch, "models"), options)
        start = time.perf_counter()
        with TritonServer(Path(scratch, "models")) as server:
            ready = time.perf_counter() - start
            before = timed(alone)
            ask(server, 0, time.monotonic() + 1)

            def load() -> int:
                until = time.monotonic() + seconds
                with ThreadPoolExecutor(clients) as pool:
                    found.extend(pool.map(lambda number: ask(server, number, until), range(clients)))
                return sum(len(latencies) for latencies, _, _ in found)

            memory_before = memory(server)
            loaded = timed(load)
            memory_after = memory(server)
            after = timed(alone)
    alone_clips, alone_seconds, alone_cpu = map(sum, zip(before, after, strict=True))
    share = loaded[0] / loaded[1] / (alone_clips / alone_seconds)
    share_of_cpu = loaded[0] / loaded[2] / (alone_clips / alone_cpu)
    latencies = [each for row, _, _ in found for each in row]
    results: dict[str, Any] = {
        "seconds_to_ready": ready,
        "audio_seconds_per_second": {
            "encoder": alone_clips * clip / alone_seconds,
            "server": loaded[0] * clip / loaded[1],
        },
        "share": share,
        "share_per_processor_second": share_of_cpu,
        "latency": dict(zip(("p50", "p95", "p99"), np.percentile(latencies, [50, 95, 99]).tolist(), strict=True)),
        "answers": len(latencies),
        "wrong": sum(wrong for _, wrong, _ in found),
        "errors": sum(errors for _, _, errors in found),
        "memory_mb": {"before": memory_before, "after": memory_after},
    }
    print(
        f"{share:.0%} of the encoder's throughput, {share_of_cpu:.0%} per processor second; {results['answers']} "
        f"answers, {results['wrong']} wrong, {results['errors']} errors; memory {memory_before:.0f} -> "
        f"{memory_after:.0f} MB"
    )
    finish("triton_load", results)


if __name__ == "__main__":
    main()
