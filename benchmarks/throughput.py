"""How many seconds of audio are encoded in a second, by window, batch and length?

Windows and lengths are measured in turn, so that changes of the processor's speed affect all of them equally.

    python benchmarks/throughput.py engines/same-s --windows 32,64,128,256 --batches 1,2,4
    python benchmarks/throughput.py engines/same-s --windows 128 --batches 1 --latents 64,512,4096
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click
from common import call_of, counts, engine_argument, finish, open_codec, plot_lines, plot_option, question

from samekit.arguments import MOST_THREADS
from samekit.backends.cpu import available_cpus
from samekit.engine.spec import DECODER, ENCODER
from samekit_export.measure import interleaved, summary
from samekit_export.verify import example_input

if TYPE_CHECKING:
    from pathlib import Path

    from samekit.engine.folder import Engine


@question
@engine_argument
@click.option("--windows", default="32,64,128,256", show_default=True, callback=counts, help="In latents.")
@click.option("--batches", default="1,2,4", show_default=True, callback=counts, help="Sequences encoded at once.")
@click.option("--latents", default="1024", show_default=True, callback=counts, help="Total of each batch.")
@click.option("--precision", default="fp32", show_default=True)
@click.option("--runs", default=3, show_default=True, type=click.IntRange(1))
@click.option("--threads", type=click.IntRange(1, MOST_THREADS), help="[default: all cores]")
@plot_option
def main(
    engine: Engine,
    windows: list[int],
    batches: list[int],
    latents: list[int],
    precision: str,
    runs: int,
    threads: int | None,
    plot_path: Path | None,
) -> None:
    """Print seconds of audio a second for one ENGINE folder; the last line is JSON."""
    if min(latents) < max(batches):
        raise click.UsageError("fewer latents than sequences in a batch")
    # One backend for all windows, so that the weights are in memory once.
    default = open_codec(engine.folder, "onnxruntime", precision, threads or available_cpus())
    codecs = {window: type(default)(default.backend, window) for window in windows}
    rows: list[dict[str, Any]] = []
    for direction in (ENCODER, DECODER):
        default.backend.use_packed_weights(direction)
        print(f"{direction}: the default window is {default.windows(direction).size} latents")
        for batch in batches:
            inputs = {
                count: example_input(engine.spec, direction, batch, count // batch, seed=batch) for count in latents
            }
            calls = {(w, n): partial(call_of(codecs[w], direction), inputs[n]) for w in windows for n in latents}
            for (window, count), times in interleaved(calls, runs).items():
                seconds = batch * (count // batch) * engine.spec.hop / engine.spec.sample_rate
                speed = summary([seconds / time for time in times])
                shape = {"direction": direction, "batch": batch, "window": window, "latents": count}
                rows.append({**shape, "audio_seconds_per_second": speed})
                print(
                    f"{direction} batch {batch:>3}  window {window:>5}  latents {count:>5} {speed['median']:7.2f} s/s "
                    f"({speed['min']:.2f} ... {speed['max']:.2f})",
                    flush=True,
                )
    if plot_path:
        points = [
            (
                row["direction"],
                f"batch {row['batch']}, {row['latents']} latents",
                row["window"],
                row["audio_seconds_per_second"]["median"],
            )
            for row in rows
        ]
        plot_lines(plot_path, points, x="window in latents", y="seconds of audio a second")
    finish("throughput", rows)


if __name__ == "__main__":
    main()
