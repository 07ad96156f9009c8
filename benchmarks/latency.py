"""How long does one clip take, or a batch of clips, by length, compared with eager PyTorch?

All candidates run in the same process in turn, in inference mode, after a warm-up, with the same number of threads. A
ratio is reported only if the outputs agree to the floor of the precision.

    python benchmarks/latency.py engines/same-s --latents 32,128 --plot latency.png
    python benchmarks/latency.py engines/same-s --device cuda --precision fp32,fp16 --batches 1,8
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING, Any

import click
import torch
from common import (
    GPU_LATENTS,
    call_of,
    counts,
    engine_argument,
    finish,
    listed,
    open_codec,
    plot_lines,
    plot_option,
    question,
)

from samekit.backends.cpu import available_cpus
from samekit.engine.spec import DIRECTIONS, Direction
from samekit.errors import BackendUnavailableError
from samekit_export.config import BandSpan
from samekit_export.diffusers import published_key
from samekit_export.measure import interleaved, summary
from samekit_export.verify import FLOOR_DB, example_input, snr_db

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from samekit.batches import Autoencoder
    from samekit.engine.folder import Engine
    from samekit_export.model import Same

EAGER = "torch fp32"

FLOORS = FLOOR_DB | {"bf16": 30.0}
"""Least SNR in dB for which the time of a candidate counts, by precision."""


# Device -> the backend of our engines, and the lengths that are measured.
ENGINES = {"cpu": "onnxruntime", "cuda": "tensorrt"}
LENGTHS = {"cpu": (32, 128), "cuda": GPU_LATENTS}


def open_all(
    engine: Path, precisions: list[str], threads: int, yardsticks: list[str], device: str = "cpu"
) -> dict[str, Autoencoder]:
    """Open the candidates by name, eager PyTorch first. On a GPU, those that cannot be opened are left out."""
    codecs = {EAGER: open_codec(engine, "torch", "fp32", threads, device)}
    for name in yardsticks:
        codecs[name] = open_codec(engine, "torch", "fp32", threads, device)
        YARDSTICKS[name](codecs[name].backend)
    # Each precision as in "onnxruntime int8", or "int8" for our engines of the device.
    for backend, precision in (each.split() if " " in each else [ENGINES[device], each] for each in precisions):
        try:
            codecs[f"{backend} {precision}"] = open_codec(engine, backend, precision, threads, device)
        except BackendUnavailableError as error:
            if device == "cpu":
                raise
            print(f"{backend} {precision} left out: {error}")
    return codecs


def compile_(backend: Any) -> None:
    """Compile the model for each length, with packed weights; this happens in the warm-up."""
    # By default, PyTorch runs shapes beyond a limit without compilation. No public setting for this exists.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    model = backend._model
    compiled = partial(torch.compile, dynamic=False, options={"freezing": True})
    model.encode, model.decode = compiled(model.encode), compiled(model.decode)


def bfloat16_(backend: Any) -> None:
    """Use bfloat16 for all weights and steps."""
    backend._model.to(torch.bfloat16)
    backend._dtype = torch.bfloat16


def compile_bfloat16_(backend: Any) -> None:
    """Use bfloat16 and compile the model."""
    bfloat16_(backend)
    compile_(backend)


def diffusers_(backend: Any) -> None:
    """Use the same weights in the class of `diffusers`, for models whose attention is a `BandSpan`."""
    backend._model = DiffusersModel(backend._model)


def diffusers_tensor(key: str, tensor: Tensor) -> Tensor:
    """Return a published tensor, given with the key of `diffusers`, in the order of rows of that class."""
    if not key.endswith("to_qkv.weight"):
        return tensor
    q1, k1, v, q2, k2 = tensor.chunk(5)
    return torch.cat([q1, q2, k1, k2, v])


class DiffusersModel:
    """`diffusers`' `AutoencoderSAME` with the weights of one of our models."""

    def __init__(self, ours: Same) -> None:
        import diffusers

        encoder, decoder = ours.config.encoder, ours.config.decoder
        if not isinstance(encoder.span, BandSpan):
            raise click.UsageError("diffusers has models with sliding windows only; leave its yardstick out")
        theirs: Any = diffusers.AutoencoderSAME
        self._theirs = theirs(
            encoder_c_mults=(encoder.width // 128,),
            encoder_transformer_depths=(encoder.depth,),
            decoder_sinusoidal_blocks=(decoder.sine_blocks,),
            latent_dim=ours.config.latent_width,
        ).eval()
        tensors = ours.state_dict()
        self._theirs.load_state_dict(
            {
                key: diffusers_tensor(key, tensors[published_key(key)]).reshape(own.shape)
                for key, own in self._theirs.state_dict().items()
            }
        )

    def encode(self, audio: Tensor) -> Tensor:
        """Return latents `[batch, latent_width, latents]` from audio `[batch, channels, samples]`."""
        latents: Tensor = self._theirs.encode(audio).latents
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Return audio `[batch, channels, samples]` from latents `[batch, latent_width, latents]`."""
        audio: Tensor = self._theirs.decode(latents).sample
        return audio


YARDSTICKS: dict[str, Callable[[Any], None]] = {
    "compiled fp32": compile_,
    "torch bf16": bfloat16_,
    "compiled bf16": compile_bfloat16_,
    "diffusers fp32": diffusers_,
}
"""Further candidates by name: each function changes an eager backend in place."""


def measure(
    codecs: dict[str, Autoencoder], direction: Direction, latents: int, runs: int, batch: int = 1
) -> list[dict[str, Any]]:
    """Return a row for each candidate on one length."""
    spec = codecs[EAGER].spec
    inputs = example_input(spec, direction, batch, latents, seed=latents)
    for codec in codecs.values():
        # Otherwise ONNX Runtime would pack the weights in one of the counted runs.
        codec.backend.use_packed_weights(direction)
    calls = {name: call_of(codec, direction) for name, codec in codecs.items()}
    expected = calls[EAGER](inputs)
    accuracy = {name: snr_db(expected, call(inputs)) for name, call in calls.items()}
    times = interleaved({name: partial(call, inputs) for name, call in calls.items()}, runs)
    eager = summary(times[EAGER])["median"]
    rows = []
    for name, measured in times.items():
        figures = summary(measured)
        floor = FLOORS[name.split()[1]]
        agrees = name == EAGER or accuracy[name] >= floor
        rows.append(
            {
                "direction": direction,
                "batch": batch,
                "latents": latents,
                "candidate": name,
                "seconds": figures,
                "per_latent_ms": 1e3 * figures["median"] / (batch * latents),
                "audio_seconds_per_second": batch * latents * spec.hop / spec.sample_rate / figures["median"],
                "snr_db": None if name == EAGER else accuracy[name],
                "times_eager": eager / figures["median"] if agrees else None,
            }
        )
    return rows


def show(row: dict[str, Any]) -> str:
    """Format one line of the table."""
    ratio = "refused" if row["times_eager"] is None else f"{row['times_eager']:.2f} x"
    snr = "" if row["snr_db"] is None else f"{row['snr_db']:.1f} dB"
    shape, seconds = f"{row['direction']:8}{row['batch']:>3} x {row['latents']:>4}", row["seconds"]
    return (
        f"{shape}  {row['candidate']:18}{seconds['median']:>9.4f} s "
        f"({seconds['min']:.4f} ... {seconds['max']:.4f}) {ratio:>9} {snr:>9}"
    )


@question
@engine_argument
@click.option("--device", type=click.Choice(list(ENGINES)), help="[default: cuda if PyTorch finds a GPU]")
@click.option(
    "--latents",
    callback=counts,
    help=f"Lengths, by commas. [default: {listed(LENGTHS['cpu'])}; on a GPU {listed(LENGTHS['cuda'])}]",
)
@click.option("--batches", default="1", show_default=True, callback=counts, help="Clips at once, by commas.")
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    help="Of our engines, or as in 'openvino bf16'; by commas.",
)
@click.option("--runs", default=5, show_default=True, type=click.IntRange(1))
@click.option("--threads", type=click.IntRange(1), help="For every candidate. [default: all cores]")
@click.option(
    "--yardstick",
    "yardsticks",
    multiple=True,
    type=click.Choice(list(YARDSTICKS)),
    help="Measure this candidate as well; may be repeated.",
)
@plot_option
def main(
    engine: Engine,
    device: str | None,
    latents: list[int] | None,
    batches: list[int],
    precision: str,
    runs: int,
    threads: int | None,
    yardsticks: tuple[str, ...],
    plot_path: Path | None,
) -> None:
    """Print the table for one ENGINE folder; the last line is JSON."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    codecs = open_all(engine.folder, precision.split(","), threads or available_cpus(), list(yardsticks), device)
    rows = []
    for direction in DIRECTIONS:
        for batch, length in itertools.product(batches, latents or LENGTHS[device]):
            for row in measure(codecs, direction, length, runs, batch):
                rows.append(row)
                print(show(row), flush=True)
    if plot_path:
        points = [
            (row["direction"], f"{row['candidate']}, batch {row['batch']}", row["latents"], row["per_latent_ms"])
            for row in rows
        ]
        plot_lines(plot_path, points, x="latents", y="ms per latent")
    finish("latency", rows)


if __name__ == "__main__":
    main()
