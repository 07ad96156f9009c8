"""The `samekit` command: thin click commands over the Python API; everything heavy is imported inside them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from samekit import __version__
from samekit.errors import InputError, SamekitError
from samekit.spec import PRECISIONS

if TYPE_CHECKING:
    from collections.abc import Callable

    from samekit.autoencoder import AutoencoderModel


class _Group(click.Group):
    """Turns every error that samekit raises on purpose into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SamekitError as error:
            raise _Failure(" ".join(str(error).split())) from None


class _Failure(click.ClickException):
    exit_code = 2


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("-v", "--verbose", is_flag=True, help="Say which backend was chosen and why others were not.")
def main(verbose: bool) -> None:
    """Run and export the SAME audio autoencoders of Stable Audio 3."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="samekit: %(message)s")


def _model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which model to run, and how."""
    for option in reversed(
        (
            click.option("--model", required=True, help="A name, an engine folder or a checkpoint folder."),
            click.option("--backend", default="auto", show_default=True, help="auto, onnxruntime or torch."),
            click.option("--precision", default="fp32", show_default=True, type=click.Choice(PRECISIONS)),
            click.option("--device", type=click.Choice(["cpu", "cuda"]), help="The best there is, unless given."),
            click.option("--threads", type=click.IntRange(min=1), help="CPU threads. [default: all cores]"),
            click.option("--window", type=click.IntRange(min=1), help="Latents computed at once; bounds the memory."),
        )
    ):
        command = option(command)
    return command


def _open(model: str, **options: Any) -> AutoencoderModel:
    from samekit.autoencoder import AutoencoderModel  # noqa: PLC0415

    return AutoencoderModel.from_pretrained(model, **options)


@main.command()
@click.argument("audio", type=click.Path(path_type=Path))
@click.argument("latents", type=click.Path(path_type=Path))
@_model_options
def encode(audio: Path, latents: Path, **options: Any) -> None:
    """Encode an AUDIO file to a LATENTS.npy file and a .json beside it."""
    from tqdm import tqdm  # noqa: PLC0415

    from samekit.audio import AudioReader  # noqa: PLC0415

    with AudioReader(audio) as reader:
        frames = reader.info.frames
    with _open(**options) as model, tqdm(total=frames, unit="frame", unit_scale=True, disable=None) as bar:
        done = model.encode_file(audio, latents, bar.update)
    click.echo(
        f"{latents}: {done['latents']} latents of {model.latent_dim} from {done['samples'] / done['sample_rate']:.2f} s"
    )


@main.command()
@click.argument("latents", type=click.Path(path_type=Path))
@click.argument("audio", type=click.Path(path_type=Path))
@click.option("--bits", default="16", show_default=True, type=click.Choice(["16", "24", "32", "float"]))
@click.option("--clip", is_flag=True, help="Clip floating-point samples to -1 ... 1; integers always are.")
@_model_options
def decode(latents: Path, audio: Path, bits: str, clip: bool, **options: Any) -> None:
    """Decode a LATENTS.npy file to an AUDIO file, .wav or .flac."""
    from tqdm import tqdm  # noqa: PLC0415

    from samekit.latents import read_latents  # noqa: PLC0415

    total = read_latents(latents)[0].shape[-1]
    subtype = "FLOAT" if bits == "float" else f"PCM_{bits}"
    with _open(**options) as model, tqdm(total=total, unit="latent", disable=None) as bar:
        samples = model.decode_file(latents, audio, subtype, clip, bar.update)
    click.echo(f"{audio}: {samples / model.sample_rate:.2f} s at {model.sample_rate} Hz")


@main.command()
@click.argument("model")
@click.option("--weights", default="hub", show_default=True, help="hub, random, or a checkpoint folder.")
@click.option("--revision", help="Branch, tag or commit on the hub.")
@click.option("--precision", default="fp32", show_default=True, help="fp32; several separated by commas.")
@click.option("--out", default="engines", show_default=True, type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Export even if the engine folder is current.")
def export(model: str, weights: str, revision: str | None, precision: str, out: Path, force: bool) -> None:
    """Export MODEL (same-s, same-l, a checkpoint folder, or owner/name on the hub) to an engine folder."""
    _need_export()
    from samekit_export.checkpoint import load  # noqa: PLC0415
    from samekit_export.export import export as run  # noqa: PLC0415

    click.echo(f"loading {model}")
    checkpoint = load(model, weights, revision)
    run(checkpoint, out, precision.split(","), force=force, report=click.echo)


def _need_export() -> None:
    """Say what to install where the export's packages are missing."""
    try:
        import onnx  # noqa: F401, PLC0415
        import onnxscript  # noqa: F401, PLC0415
        import safetensors  # noqa: F401, PLC0415
        import torch  # noqa: F401, PLC0415
    except ImportError as error:
        raise InputError(
            f"exporting needs packages that are missing ({error}); run: pip install 'samekit[export]'"
        ) from None


@main.command()
@click.argument("engine", type=click.Path(path_type=Path))
def info(engine: Path) -> None:
    """Show what an ENGINE folder (or a model's name) holds."""
    from samekit.store import find_engine  # noqa: PLC0415

    found = find_engine(engine)
    spec = found.spec
    click.echo(f"{spec.name} in {found.folder}")
    click.echo(f"  audio      {spec.sample_rate} Hz, {spec.channels} channels, {spec.hop} samples per latent")
    click.echo(f"  latents    {spec.latent_width} wide")
    click.echo(
        f"  windows    start at multiples of {spec.alignment}; "
        + ", ".join(f"{half} context {context}" for half, context in spec.contexts.items())
    )
    click.echo(f"  source     {', '.join(f'{k} {v}' for k, v in spec.source.items())}")
    click.echo(f"  tools      {', '.join(f'{k} {v}' for k, v in spec.tools.items())}")
    for precision, halves in spec.graphs.items():
        size = sum(sum(graph.sizes.values()) for graph in halves.values())
        worst = min((case["snr_db"] for case in spec.verification.get(precision, [])), default=None)
        against = "not verified" if worst is None else f"at least {worst} dB against eager PyTorch"
        for half in halves:
            found.graph(half, precision)
        click.echo(f"  {precision:10} {size / 1e6:.0f} MB, {against}")


@main.command()
@click.argument("engine", type=click.Path(path_type=Path))
def verify(engine: Path) -> None:
    """Measure every graph of an ENGINE folder (or a model's name) against eager PyTorch again."""
    _need_export()
    from samekit.store import find_engine  # noqa: PLC0415
    from samekit_export.checkpoint import load_source  # noqa: PLC0415
    from samekit_export.model import Same  # noqa: PLC0415
    from samekit_export.verify import verify as measure  # noqa: PLC0415

    found = find_engine(engine)
    found.check_digests()
    checkpoint = load_source(found.spec.source)
    if checkpoint.sha256 != found.spec.source_sha256:
        raise InputError(f"{engine}: its checkpoint has changed since the export; export again")
    for precision in found.spec.graphs:
        measure(found, Same.from_checkpoint(checkpoint), precision, click.echo)
