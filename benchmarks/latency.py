"""How long does one clip take, by length, against eager PyTorch?

Every candidate runs in the same process, in turn, in inference mode, warmed up, with the same threads. A ratio is
reported only where the outputs agree to the precision's floor.

    python benchmarks/latency.py engines/same-s --latents 32,128 --plot latency.png
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from common import finish, interleaved, machine, summary

from samekit import AutoencoderModel
from samekit.spec import DECODER, ENCODER
from samekit_export.verify import FLOOR_DB, example_input, snr_db

if TYPE_CHECKING:
    from collections.abc import Callable

    from samekit.autoencoder import Autoencoder

EAGER = "torch fp32"


def half_of(codec: Autoencoder, half: str) -> Callable[[Any], Any]:
    """The call that users make."""
    return codec.encode_audio if half == ENCODER else codec.decode_audio


def open_all(engine: Path, precisions: list[str], threads: int, bfloat16: bool) -> dict[str, Autoencoder]:
    """The candidates by name, eager PyTorch first."""

    def opened(backend: str, precision: str) -> Autoencoder:
        return AutoencoderModel.from_pretrained(
            engine, "cpu", backend=backend, precision=precision, threads=threads
        ).autoencoder

    codecs = {EAGER: opened("torch", "fp32")}
    if bfloat16:
        codecs["torch bf16"] = opened("torch", "fp32")
        backend: Any = codecs["torch bf16"].backend
        backend._model.to(torch.bfloat16)  # noqa: SLF001 a yardstick, not a precision that we offer
        backend._dtype = torch.bfloat16  # noqa: SLF001
    return codecs | {f"onnxruntime {p}": opened("onnxruntime", p) for p in precisions}


def measure(codecs: dict[str, Autoencoder], half: str, latents: int, runs: int) -> list[dict[str, Any]]:
    """A row for each candidate on one length."""
    given = example_input(codecs[EAGER].spec, half, 1, latents, seed=latents)
    for codec in codecs.values():
        # What a service sees: the engine would otherwise pack its weights in one of the counted runs.
        codec.backend.expect_many_calls(half)
    calls = {name: half_of(codec, half) for name, codec in codecs.items()}
    expected = calls[EAGER](given)
    accuracy = {name: snr_db(expected, call(given)) for name, call in calls.items()}
    times = interleaved({name: partial(call, given) for name, call in calls.items()}, runs)
    eager = summary(times[EAGER])["median"]
    rows = []
    for name, measured in times.items():
        figures = summary(measured)
        floor = FLOOR_DB.get(name.split()[1], 0.0)
        agrees = name == EAGER or accuracy[name] >= floor
        rows.append(
            {
                "half": half,
                "latents": latents,
                "candidate": name,
                "seconds": figures,
                "per_latent_ms": 1e3 * figures["median"] / latents,
                "audio_seconds_per_second": latents * codecs[EAGER].spec.hop / 44100 / figures["median"],
                "snr_db": None if name == EAGER else accuracy[name],
                "times_eager": eager / figures["median"] if agrees else None,
            }
        )
    return rows


def show(row: dict[str, Any]) -> str:
    """One line of the table."""
    ratio = "refused" if row["times_eager"] is None else f"{row['times_eager']:.2f} x"
    snr = "" if row["snr_db"] is None else f"{row['snr_db']:.1f} dB"
    seconds = row["seconds"]
    return (
        f"{row['half']:8}{row['latents']:>6}  {row['candidate']:18}{seconds['median']:>9.3f} s "
        f"({seconds['min']:.3f} ... {seconds['max']:.3f}) {ratio:>9} {snr:>9}"
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time per latent by length, one line a candidate."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, half in zip(axes, (ENCODER, DECODER), strict=True):
        for name in dict.fromkeys(row["candidate"] for row in rows):
            mine = [row for row in rows if row["half"] == half and row["candidate"] == name]
            axis.plot([row["latents"] for row in mine], [row["per_latent_ms"] for row in mine], marker="o", label=name)
        axis.set(title=half, xlabel="latents", xscale="log")
    axes[0].set_ylabel("ms per latent")
    axes[0].set_ylim(bottom=0)
    axes[1].legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


@click.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--latents", default="128", show_default=True, help="Lengths, separated by commas.")
@click.option("--precision", default="fp32", show_default=True, help="Of ONNX Runtime, separated by commas.")
@click.option("--runs", default=5, show_default=True, type=click.IntRange(1))
@click.option("--threads", type=click.IntRange(1), help="For every candidate. [default: all cores]")
@click.option("--bf16", is_flag=True, help="Eager PyTorch in bfloat16, too.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Write a picture; needs matplotlib.")
def main(
    engine: Path, latents: str, precision: str, runs: int, threads: int | None, bf16: bool, plot_path: Path | None
) -> None:
    """Print the table for one ENGINE folder; the last line is JSON."""
    codecs = open_all(engine, precision.split(","), threads or machine()["cores"], bf16)
    rows = []
    for half in (ENCODER, DECODER):
        for length in map(int, latents.split(",")):
            for row in measure(codecs, half, length, runs):
                rows.append(row)
                print(show(row), flush=True)
    if plot_path:
        plot(rows, plot_path)
    finish("latency", rows)


if __name__ == "__main__":
    main()
