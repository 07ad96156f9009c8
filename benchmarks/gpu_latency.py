"""How accurate and how fast is one backend on a GPU, and how much of its memory does it take?

Each call is timed from arrays to arrays, after two warm-up calls. Accuracy is measured against eager PyTorch in float32
on the CPU, at the shortest length.

    python benchmarks/gpu_latency.py same-s --backend torch --precision fp32 --latents 128,256,512,1024,4096
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import click
import torch
from common import GPU_LATENTS, counts, finish, listed, question

from samekit.backends.base import BackendOptions
from samekit.backends.selection import open_backend
from samekit.batches import Autoencoder
from samekit.engine.accuracy import FLOOR_DB, example_input, snr_db
from samekit.engine.spec import DIRECTIONS, ENCODER, GPU_PRECISIONS
from samekit.errors import BackendError, BackendUnavailableError

# A case is measured for at most so many seconds.
SECONDS = 10


def free_memory() -> int | None:
    """Return the free bytes of the GPU, which other programs use too; None without CUDA."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None


def times_of(codec: Autoencoder, direction: str, array: Any, runs: int) -> list[float]:
    """Return the seconds of each call."""
    call = codec.encode_audio if direction == ENCODER else codec.decode_audio
    for _ in range(2):
        call(array)
    times: list[float] = []
    while len(times) < runs and sum(times) < SECONDS:
        start = time.perf_counter()
        call(array)
        times.append(time.perf_counter() - start)
    return times


@question
@click.argument("model")
@click.option("--backend", required=True, help="As the commands of samekit take it.")
@click.option("--precision", default="fp32", show_default=True, type=click.Choice(GPU_PRECISIONS))
@click.option("--device", default="cuda", show_default=True, help="webgpu for any GPU; cpu for a trial.")
@click.option("--latents", default=listed(GPU_LATENTS), show_default=True, callback=counts)
@click.option("--batches", default="1", show_default=True, callback=counts, help="Clips of each length, by commas.")
@click.option("--window", type=click.IntRange(1), help="Latents of a window. [default: that of the backend]")
@click.option("--runs", default=20, show_default=True, type=click.IntRange(1), help="Most calls of each case.")
def main(
    model: str,
    backend: str,
    precision: str,
    device: str,
    latents: list[int],
    batches: list[int],
    window: int | None,
    runs: int,
) -> None:
    """Print a table about one MODEL and backend; the last line is JSON."""
    before = free_memory()
    try:
        opened = open_backend(model, backend, BackendOptions(precision=precision, device=device))
    except BackendUnavailableError as error:
        print(f"left out: {error}")
        finish("gpu_latency", {"left_out": str(error)})
        return
    eager = open_backend(model, "torch", BackendOptions(device="cpu"))
    codec, reference, rows = Autoencoder(opened, window), Autoencoder(eager), []
    for direction in DIRECTIONS:
        array = example_input(opened.spec, direction, 1, latents[0], seed=0)
        outputs = [c.encode_audio(array) if direction == ENCODER else c.decode_audio(array) for c in (reference, codec)]
        snr = snr_db(*outputs)
        if not snr >= FLOOR_DB[precision]:
            raise BackendError(
                f"the {precision} {direction} is {snr:.1f} dB from eager PyTorch, {FLOOR_DB[precision]} dB is the "
                "least; its times do not count, please report this"
            )
        for batch in batches:
            for length in latents:
                row: dict[str, Any] = {"direction": direction, "batch": batch, "latents": length, "snr_db": snr}
                try:
                    times = times_of(
                        codec, direction, example_input(opened.spec, direction, batch, length, seed=1), runs
                    )
                except BackendError as error:
                    print(f"{direction:8}{batch:>3} x {length:>5} latents: {error}")
                    rows.append(row | {"failure": str(error)})
                    break
                after = free_memory()
                row["median_ms"], row["least_ms"] = 1e3 * statistics.median(times), 1e3 * min(times)
                row["memory_bytes"] = None if before is None or after is None else before - after
                rows.append(row)
                print(f"{direction:8}{batch:>3} x {length:>5} latents: {row['median_ms']:>9.2f} ms, {snr:.1f} dB")
    finish("gpu_latency", rows)


if __name__ == "__main__":
    main()
