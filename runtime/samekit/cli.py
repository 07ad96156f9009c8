"""The `samekit` command: thin click commands over the Python API; everything heavy is imported inside them."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from samekit import __version__
from samekit._files import remove_abandoned
from samekit.errors import BackendUnavailableError, InputError, SamekitError
from samekit.spec import PRECISIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from samekit.autoencoder import AutoencoderModel
    from samekit.dataset import PreEncodeOptions
    from samekit.distributed import RayEncoder
    from samekit.store import Engine


def _printable(text: str) -> str:
    """One line that any terminal takes and that steers none, although names in files and of files may hold anything."""
    shown = (
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in " ".join(text.splitlines())
    )
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return "".join(shown).encode(encoding, "backslashreplace").decode(encoding)


def _say(text: str, *, err: bool = False) -> None:
    """Print one line, if there is somebody to read it; work goes on where there is nobody or no room."""
    try:
        click.echo(_printable(text), err=err)
    except OSError:
        stream = sys.stderr if err else sys.stdout
        # What waits in its buffer would be tried again when the program ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _PrintableFormatter(logging.Formatter):
    """Messages as `_printable` gives them."""

    def format(self, record: logging.LogRecord) -> str:
        return _printable(super().format(record))


class Command(click.Command):
    """Turns every error that samekit raises on purpose into one line and exit code 2, and what stops it into one too.

    Ctrl-C gives exit code 130, SIGTERM 143, as shells say it of programs that these end. Files that were being written
    are cleared away first.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run it."""
        with _stops() as came:
            try:
                result = super().invoke(ctx)
                # A library may have caught a stop and gone on.
                if not came:
                    return result
            except SamekitError as error:
                if not came:
                    raise _Failure(_printable(str(error))) from None
            except KeyboardInterrupt:
                # From a library, or a thread that could not ask for signals.
                if not came:
                    came.append(signal.SIGINT)
            # Some libraries turn a stop into errors of their own.
            except Exception:
                if not came:
                    raise
        _say(ctx.meta.get(_STOPPED, "stopped; run the same command again"), err=True)
        sys.exit(128 + came[0])


class _Group(Command, click.Group):
    """Does so for all of its commands."""


class _Failure(click.ClickException):
    exit_code = 2


# Key of what a context has to say when its command is stopped.
_STOPPED = "samekit.stopped"


@contextmanager
def _stops() -> Iterator[list[signal.Signals]]:
    """Yield the signals that came to stop the program; each raises KeyboardInterrupt, where it would end it at once."""
    came: list[signal.Signals] = []

    def stop(number: int, _frame: object) -> None:
        came.append(signal.Signals(number))
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = [number for number, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]
    # No other thread can ask for that.
    if threading.current_thread() is not threading.main_thread():
        ours = []
    for number in ours:
        signal.signal(number, stop)
    try:
        yield came
    finally:
        for number in ours:
            signal.signal(number, before[number])


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("-v", "--verbose", is_flag=True, help="Say which backend was chosen and why others were not.")
def main(verbose: bool) -> None:
    """Run and export the SAME audio autoencoders of Stable Audio 3."""
    handler = logging.StreamHandler()
    handler.setFormatter(_PrintableFormatter("samekit: %(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    # This library has a handler of its own, so that each line would be shown twice.
    logging.getLogger("huggingface_hub").propagate = False


def _model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which model to run, and how."""
    model = click.option("--model", required=True, help="A name, an engine folder or a checkpoint folder.")
    return model(_backend_options(command))


def _backend_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how to run a model."""
    for option in reversed(
        (
            click.option("--backend", default="auto", show_default=True, help="auto, tensorrt, onnxruntime or torch."),
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
    from samekit.audio import AudioReader  # noqa: PLC0415
    from samekit.latents import require_replaceable  # noqa: PLC0415
    from samekit.progress import bar  # noqa: PLC0415
    from samekit.recordings import require_other_file  # noqa: PLC0415

    # Before a model is opened, which may be downloaded.
    with AudioReader(audio) as reader:
        frames = reader.info.frames
    require_other_file(latents, audio)
    require_replaceable(latents)
    for name in (latents.name, f"{latents.stem}.json"):
        remove_abandoned(latents.parent, name)
    with _open(**options) as model, bar(total=frames, unit="frame", unit_scale=True) as shown:
        done = model.encode_file(audio, latents, shown.update)
    _say(
        f"{latents}: {done['latents']} latents of {model.latent_dim} from {done['samples'] / done['sample_rate']:.2f} s"
    )


@main.command()
@click.argument("latents", type=click.Path(path_type=Path))
@click.argument("audio", type=click.Path(path_type=Path))
@click.option("--bits", default="16", show_default=True, type=click.Choice(["16", "24", "32", "float"]))
@click.option("--clip", is_flag=True, help="Clip floating-point samples to -1 ... 1; integers always are.")
@click.option("--force", is_flag=True, help="Replace AUDIO even if it may be the recording of these latents.")
@_model_options
def decode(latents: Path, audio: Path, bits: str, clip: bool, force: bool, **options: Any) -> None:
    """Decode a LATENTS.npy file to an AUDIO file, .wav or .flac."""
    from samekit.audio import format_of  # noqa: PLC0415
    from samekit.latents import LatentsReader  # noqa: PLC0415
    from samekit.progress import bar  # noqa: PLC0415
    from samekit.recordings import require_no_recording, require_other_file  # noqa: PLC0415

    # Before a model is opened, which may be downloaded.
    reader = LatentsReader(latents)
    subtype = "FLOAT" if bits == "float" else f"PCM_{bits}"
    format_of(audio, subtype)
    require_other_file(audio, latents)
    if not force:
        require_no_recording(audio, latents, reader.metadata)
    remove_abandoned(audio.parent, audio.name)
    with _open(**options) as model, bar(total=reader.latents, unit="latent") as shown:
        samples = model.decode_file(latents, audio, subtype, clip, shown.update, force)
    _say(f"{audio}: {samples / model.sample_rate:.2f} s at {model.sample_rate} Hz")


@main.command("pre-encode")
@click.option("--model", default="same-l", show_default=True, help="A name, an engine folder or a checkpoint folder.")
@click.option("--data_dir", "--data-dir", multiple=True, help="Folder with audio files and .txt captions; repeatable.")
@click.option("--output_path", "--output-path", help="Folder (or URL) for the latents.")
@click.option(
    "--batch_size", "--batch-size", default=1, show_default=True, help="Windows encoded at once; none is padded."
)
@click.option("--sample_size", "--sample-size", default=12582912, show_default=True, help="Samples a clip is cut to.")
@click.option("--model_half", "--model-half", "float16", is_flag=True, help="Encode in fp16 and write float16.")
@click.option("--pad", is_flag=True, help="Pad every clip to --sample_size.")
@click.option("--full", is_flag=True, help="Keep clips longer than --sample_size whole.")
@click.option("--crop", default="start", show_default=True, type=click.Choice(["start", "random"]))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of --crop random.")
@click.option("--shard", metavar="I/N", default="1/1", show_default=True, help="Encode one of N parts, I from 1.")
@click.option("--checksum", is_flag=True, help="Judge by contents whether a file has changed, not by size and time.")
@click.option("--strict", is_flag=True, help="Exit with code 2 if a clip is bad, once the others are encoded.")
@click.option(
    "--reencode",
    is_flag=True,
    help="Encode everything again if the folder holds latents of other settings; removes those of clips that are gone.",
)
@click.option("--workers", "readers", default=0, help="Threads that read ahead. [default: one a core, at most 4]")
@click.option(
    "--ray",
    "address",
    metavar="[ADDRESS]",
    is_flag=False,
    flag_value="",
    help="Encode on a Ray cluster: HOST:PORT, or local; without ADDRESS that of RAY_ADDRESS, else one on this machine.",
)
@click.option("--actors", type=click.IntRange(min=1), help="Encoders on the cluster. [default: as many as fit]")
@click.option("--cpus-per-actor", type=click.IntRange(min=1), help="Cores, and threads, of each. [default: 1]")
@click.option("--gpus-per-actor", type=click.FloatRange(min=0), help="GPUs of each, or a share. [default: the CPU]")
@click.option("--verify", "verified", help="Check a folder of latents instead.")
@_backend_options
def pre_encode(
    model: str,
    data_dir: tuple[str, ...],
    output_path: str | None,
    verified: str | None,
    address: str | None,
    **options: Any,
) -> None:
    """Encode a dataset for training: a pair of .npy and .json for each audio file with a caption.

    Run it again to go on after a stop, or to encode what is new or changed.
    """
    if verified is not None:
        _verify_dataset(verified)
        return
    if not data_dir or output_path is None:
        raise InputError("pre-encode needs a dataset and a folder; pass --data_dir and --output_path")
    from samekit.clips import require_folders  # noqa: PLC0415
    from samekit.dataset import PreEncodeOptions, pre_encode  # noqa: PLC0415
    from samekit.manifest import Shard  # noqa: PLC0415
    from samekit.progress import Display  # noqa: PLC0415

    backend = {name: options.pop(name) for name in ("backend", "precision", "device", "threads", "window")}
    if options["float16"]:
        if backend["precision"] == "int8":
            raise InputError("--model_half means --precision fp16, not int8; pass one of them")
        backend["precision"] = "fp16"
    asked = {name: options.pop(name) for name in ("actors", "cpus_per_actor", "gpus_per_actor")}
    settings = PreEncodeOptions(shard=Shard.parse(options.pop("shard")), **options)
    # Before a model is opened, which may be downloaded.
    require_folders(data_dir)
    click.get_current_context().meta[_STOPPED] = "stopped; run the same command again to go on"
    with _encoder(model, backend, settings, address, asked) as encoder, Display() as display:
        report = pre_encode(encoder, data_dir, output_path, settings, display)
    for row in report.bad[:10]:
        _say(f"{row['status']}: {row['reason'] or row['relpath']}", err=True)
    _say(report.summary())
    _say(report.to_json())


def _encoder(
    model: str, backend: dict[str, Any], settings: PreEncodeOptions, address: str | None, asked: dict[str, Any]
) -> AutoencoderModel | RayEncoder:
    """What encodes a dataset: a model in this process, or actors on a cluster."""
    given = {name: value for name, value in asked.items() if value is not None}
    if address is None:
        if given:
            names = " ".join(f"--{name.replace('_', '-')}" for name in given)
            raise InputError(f"{names} is of the encoders on a Ray cluster; pass --ray too")
        return _open(model, **backend)
    if settings.shard.count > 1:
        raise InputError("--shard and --ray both split the work; pass one of them")
    from samekit.distributed import RayEncoder, RayOptions  # noqa: PLC0415

    return RayEncoder(model, RayOptions(address, **given), **backend)


def _verify_dataset(folder: str) -> None:
    """Print every problem of a folder of latents."""
    from samekit.dataset_check import verify as check  # noqa: PLC0415

    problems = check(folder)
    for problem in problems:
        _say(problem)
    if problems:
        raise InputError(f"{folder}: {len(problems)} problem{'s' * (len(problems) > 1)}; see above")
    _say(f"{folder}: sound")


@main.command()
@click.argument("model")
@click.option("--weights", default="hub", show_default=True, help="hub, random, or a checkpoint folder.")
@click.option("--revision", help="Branch, tag or commit on the hub.")
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    help="fp32, fp16 or int8; several separated by commas.",
)
@click.option("--out", default="engines", show_default=True, type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Export even if it is current, and let random weights replace others.")
@click.option(
    "--tensorrt",
    default="off",
    show_default=True,
    type=click.Choice(["auto", "rtx", "off"]),
    help="Build TensorRT engines too: for this GPU, else with TensorRT-RTX for many; rtx: with that.",
)
def export(
    model: str, weights: str, revision: str | None, precision: str, out: Path, force: bool, tensorrt: str
) -> None:
    """Export MODEL (same-s, same-l, same-tiny, a checkpoint folder, or owner/name on the hub) to an engine folder."""
    _need_export()
    from samekit_export.checkpoint import load  # noqa: PLC0415
    from samekit_export.export import check_precisions  # noqa: PLC0415
    from samekit_export.export import export as run  # noqa: PLC0415
    from samekit_export.hub import PUBLISHED_WEIGHTS  # noqa: PLC0415

    # Before gigabytes are downloaded.
    precisions = check_precisions(precision.split(","))
    _say(f"loading {model}")
    checkpoint = load(model, weights, revision)
    if checkpoint.source.get("weights") == PUBLISHED_WEIGHTS:
        _say(f"{PUBLISHED_WEIGHTS} of {checkpoint.source['name']}, revision {checkpoint.source['revision']}")
    engine = run(checkpoint, out, precisions, force=force, report=_say)
    if tensorrt != "off":
        from samekit_export.to_tensorrt import add_engines  # noqa: PLC0415

        add_engines(engine, precisions, tensorrt, _say)


def _need_export() -> None:
    """Say what to install where the export's packages are missing."""
    from samekit._packages import import_package  # noqa: PLC0415

    install = "pip install 'samekit[export]'"
    try:
        for package in ("torch", "safetensors", "onnx", "onnxscript"):
            import_package(package, install)
    except BackendUnavailableError as error:
        raise InputError(f"this command needs packages that are missing ({error.cause}); run: {install}") from None


@main.command()
@click.argument("audio", metavar="IN", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="A name or an engine folder.")
@click.option("--out", default="report.html", show_default=True, type=click.Path(path_type=Path))
@click.option("--seconds", default=60.0, show_default=True, help="How much of the file to take, from its start.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. [default: all cores]")
def report(audio: Path, model: str, out: Path, seconds: float, threads: int | None) -> None:
    """Write a page about a model on the audio file IN: players, pictures, accuracy and speed of all that runs here."""
    _need_export()
    from samekit.recordings import require_other_file  # noqa: PLC0415
    from samekit.store import find_engine  # noqa: PLC0415
    from samekit_export.report import write_report  # noqa: PLC0415

    require_other_file(out, audio)
    remove_abandoned(out.parent, out.name)
    measured = write_report(audio, find_engine(model), out, seconds=seconds, threads=threads, report=_say)
    for line in measured.table().splitlines():
        _say(line)
    _say(f"{out} is ready")


@main.command()
@click.argument("engine", type=click.Path(path_type=Path))
def info(engine: Path) -> None:
    """Show what an ENGINE folder (or a model's name) holds."""
    from samekit.store import find_engine  # noqa: PLC0415

    found = find_engine(engine)
    spec = found.spec
    _say(f"{spec.name} in {found.folder}")
    _say(f"  audio      {spec.sample_rate} Hz, {spec.channels} channels, {spec.hop} samples per latent")
    _say(f"  latents    {spec.latent_width} wide")
    _say(
        f"  windows    start at multiples of {spec.alignment}; "
        + ", ".join(f"{half} context {context}" for half, context in spec.contexts.items())
    )
    _say(f"  source     {spec.origin}")
    _say(f"  tools      {', '.join(f'{k} {v}' for k, v in spec.tools.items())}")
    for precision, halves in spec.graphs.items():
        size = sum(sum(graph.sizes.values()) for graph in halves.values())
        worst = min((case["snr_db"] for case in spec.verification.get(precision, [])), default=None)
        against = "not verified" if worst is None else f"at least {worst} dB against eager PyTorch"
        found.check(precision)
        _say(f"  {precision:10} {size / 1e6:.0f} MB, {against}")
    for line in _describe_builds(found):
        _say(f"  tensorrt   {line}")


def _describe_builds(engine: Engine) -> Iterator[str]:
    """A line for each TensorRT build; TensorRT itself is imported only if there is one."""
    from samekit.tensorrt_api import builder_versions  # noqa: PLC0415
    from samekit.tensorrt_store import build_folders, describe_builds  # noqa: PLC0415

    if build_folders(engine):
        yield from describe_builds(engine, builder_versions())


@main.command()
def doctor() -> None:
    """Show what of samekit works on this machine, and what would have to be installed for the rest."""
    from samekit.doctor import examine  # noqa: PLC0415

    for line in examine():
        _say(line)


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="A name or an engine folder.")
@click.option("--backend", default="onnxruntime", show_default=True, type=click.Choice(["onnxruntime", "tensorrt"]))
@click.option("--precision", default="fp32", show_default=True, type=click.Choice(PRECISIONS))
@click.option(
    "--max-batch", default=8, show_default=True, type=click.IntRange(min=1), help="Requests of one length run at once."
)
@click.option(
    "--queue-delay", default=2000, show_default=True, type=click.IntRange(min=0), help="Microseconds to wait for more."
)
@click.option("--instances", default=1, show_default=True, type=click.IntRange(min=1), help="Copies on each device.")
@click.option("--kind", default="auto", show_default=True, type=click.Choice(["auto", "gpu", "cpu"]))
def triton(out: Path, model: str, **options: Any) -> None:
    """Write a model repository OUT for the Triton Inference Server."""
    from samekit.store import find_engine  # noqa: PLC0415
    from samekit.triton import TritonOptions, write_repository  # noqa: PLC0415

    for folder in write_repository(find_engine(model), out, TritonOptions(**options)):
        _say(str(folder))


@main.command()
@click.argument("engine", type=click.Path(path_type=Path))
def clean(engine: Path) -> None:
    """Remove the TensorRT engines of an ENGINE folder (or a model's name) that are stale or damaged."""
    from samekit.store import find_engine  # noqa: PLC0415
    from samekit.tensorrt_api import builder_versions  # noqa: PLC0415
    from samekit.tensorrt_store import remove_stale  # noqa: PLC0415

    removed = remove_stale(find_engine(engine), builder_versions())
    for folder, size in removed:
        _say(f"removed {folder}, {size / 1e6:.0f} MB")
    if not removed:
        _say("nothing to remove")


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
    model, unavailable = Same.from_checkpoint(checkpoint), None
    for precision in found.spec.graphs:
        try:
            measure(found, model, precision, _say)
        except BackendUnavailableError as error:
            # The others can be measured all the same.
            unavailable = error
            _say(f"{precision}: not measured, {error}", err=True)
    if unavailable:
        raise InputError(f"{engine}: not every graph can be measured on this machine; verify it on another one")
    _say(f"{found.folder}: every graph computes what eager PyTorch does, within its precision's bounds")
