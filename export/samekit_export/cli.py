"""The commands `export`, `report` and `verify`, which the entry points of `samekit.commands` name."""

from __future__ import annotations

import dataclasses
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from samekit.cli.group import UserPath, json_option, say, say_json
from samekit.cli.model_options import ENGINE_HELP, model_option
from samekit.engine.fingerprint import HARDWARE
from samekit.engine.spec import INT8_TARGET_DB, INT8_TARGET_RANGE
from samekit.errors import BackendUnavailableError, InputError, VerificationError
from samekit.files.atomic import remove_abandoned
from samekit.packages import INSTALL_EXPORT, import_onnxruntime, import_package

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from samekit.engine.folder import Engine

PROGRESS = (
    *(
        f"samekit_export.{module}"
        for module in ("engine_builder", "export", "progress", "report", "to_tensorrt", "verify")
    ),
    "samekit.tensorrt.check",
)
"""The loggers that report the steps of a command, at level INFO."""


class _SayHandler(logging.Handler):
    def __init__(self, *, err: bool) -> None:
        super().__init__()
        self._err = err

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), err=self._err)


@contextmanager
def progress_on_stdout(*, as_json: bool = False) -> Iterator[None]:
    """Print the records of the `PROGRESS` loggers as lines; on standard error if standard output is for JSON."""
    handler, loggers = _SayHandler(err=as_json), [logging.getLogger(name) for name in PROGRESS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


@click.command()
@click.argument("model")
@click.option("--weights", default="hub", show_default=True, help="hub, random, or a checkpoint folder.")
@click.option("--revision", help="Branch, tag or commit on the hub.")
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    help="fp32, fp16 or int8; several separated by commas.",
)
@click.option(
    "--int8-target",
    metavar="DB",
    type=click.FloatRange(*INT8_TARGET_RANGE),
    help="Accuracy of int8 in dB. For a lower target, more products are int8, which is faster.  "
    f"[default: {INT8_TARGET_DB:g}]",
)
@click.option("--out", default="engines", show_default=True, type=UserPath())
@click.option("--force", is_flag=True, help="Export even if it is current, and let random weights replace others.")
@click.option(
    "--tensorrt",
    default="off",
    show_default=True,
    type=click.Choice(["auto", "rtx", "off"]),
    help="Build TensorRT engines too. auto: for this GPU, else with TensorRT-RTX for many GPUs; rtx: TensorRT-RTX.",
)
@click.option(
    "--tensorrt-level",
    type=click.IntRange(0, 5),
    help="Optimization level of TensorRT's builder; a higher one takes longer. [default: 3]",
)
@click.option(
    "--tensorrt-hardware",
    default="gpu",
    show_default=True,
    type=click.Choice(HARDWARE),
    help="Engines for GPUs like this one, for all of its compute capability, or for all from Ampere on; slower.",
)
@click.option("--tensorrt-later-versions", is_flag=True, help="Engines that later minor versions of TensorRT run too.")
@progress_on_stdout()
def export(
    model: str,
    weights: str,
    revision: str | None,
    precision: str,
    int8_target: float | None,
    out: Path,
    force: bool,
    tensorrt: str,
    tensorrt_level: int | None,
    tensorrt_hardware: str,
    tensorrt_later_versions: bool,
) -> None:
    """Export MODEL (same-s, same-l, same-tiny, a checkpoint folder, or owner/name on the hub) to an engine folder.

    The full models small-music, small-sfx, medium, and each with -base, are known by name too.
    """
    _need_export()
    from samekit.engine.fingerprint import TENSORRT_RTX, BuilderOptions
    from samekit.tensorrt.flavours import import_flavour
    from samekit_export.checkpoint import load
    from samekit_export.export import check_precisions
    from samekit_export.export import export as run
    from samekit_export.hub import PUBLISHED_WEIGHTS
    from samekit_export.to_tensorrt import add_engines, check_options

    # Everything that can be wrong is checked before gigabytes are downloaded and graphs are written.
    precisions = check_precisions(precision.split(","))
    if int8_target is not None and "int8" not in precisions:
        raise InputError("--int8-target is for int8; add int8 to --precision")
    import_onnxruntime()
    options = BuilderOptions(tensorrt_level, tensorrt_hardware, tensorrt_later_versions)
    check_options(tensorrt, options)
    if tensorrt == "rtx":
        import_flavour(TENSORRT_RTX)
    say(f"loading {model}")
    checkpoint = load(model, weights, revision)
    if checkpoint.source.get("weights") == PUBLISHED_WEIGHTS:
        say(f"{PUBLISHED_WEIGHTS} of {checkpoint.source['name']}, revision {checkpoint.source['revision']}")
    engine = run(checkpoint, out, precisions, int8_target_db=int8_target or INT8_TARGET_DB, force=force)
    if tensorrt != "off":
        add_engines(engine, precisions, tensorrt, options)


def _need_export() -> None:
    """Raise InputError with the command that installs what is missing."""
    try:
        for package in ("torch", "safetensors", "onnx", "onnxscript"):
            import_package(package, INSTALL_EXPORT)
    except BackendUnavailableError as error:
        raise InputError(
            f"this command needs packages that are missing ({error.cause}); run: {INSTALL_EXPORT}"
        ) from None


@click.command()
@click.argument("audio", metavar="IN", type=UserPath())
@model_option(ENGINE_HELP)
@click.option("--out", default="report.html", show_default=True, type=UserPath())
@click.option("--seconds", default=60.0, show_default=True, help="How much of the file to take, from its start.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. [default: all cores]")
@progress_on_stdout()
def report(audio: Path, model: str, out: Path, seconds: float, threads: int | None) -> None:
    """Write a page about a model on the audio file IN: players, pictures, accuracy and speed of all that runs here."""
    _need_export()
    from samekit.engine.folder import find_engine
    from samekit.files.overwriting import require_other_file
    from samekit_export.report import write_report

    require_other_file(out, audio)
    remove_abandoned(out.parent, out.name)
    measured = write_report(audio, find_engine(model), out, seconds=seconds, threads=threads)
    for line in measured.table().splitlines():
        say(line)
    say(f"{out} is ready")


@click.command()
@click.argument("engine", type=UserPath())
@json_option("engine, in graphs the measured cases of each precision, and in tensorrt the check of each build")
def verify(engine: Path, as_json: bool) -> None:
    """Measure every graph of an ENGINE folder (or a model's name) against eager PyTorch again.

    Also compare the TensorRT engines that run on this machine with their graphs.
    """
    _need_export()
    from samekit.engine.folder import find_engine
    from samekit_export.checkpoint import load_source
    from samekit_export.model import Same
    from samekit_export.verify import verify as measure

    found = find_engine(engine)
    found.check_digests()
    checkpoint = load_source(found.spec.source)
    if checkpoint.sha256 != found.spec.source_sha256:
        raise InputError(f"{engine}: its checkpoint has changed since the export; export again")
    model, unavailable, graphs = Same.from_checkpoint(checkpoint), None, {}
    for precision in found.spec.graphs:
        try:
            with progress_on_stdout(as_json=as_json):
                graphs[precision] = measure(found, model, precision)
        except BackendUnavailableError as error:
            # The other precisions can still be measured.
            unavailable = error
            say(f"{precision}: not measured, {error}", err=True)
    if unavailable:
        raise InputError(f"{engine}: not every graph can be measured on this machine; verify it on another one")
    with progress_on_stdout(as_json=as_json):
        builds = _check_builds(found)
    if as_json:
        say_json({"engine": str(found.folder), "graphs": graphs, "tensorrt": builds})
        return
    for build in builds:
        say(f"{build['name']}: at least {min(case['snr_db'] for case in build['cases'])} dB")
    say(f"{found.folder}: every graph computes what eager PyTorch does, within its precision's bounds")


def _check_builds(engine: Engine) -> list[dict[str, Any]]:
    """Check the TensorRT engines that this machine's GPU runs; return their names and checks."""
    from samekit.engine.builds import build_folders
    from samekit.engine.spec import GPU_PRECISIONS

    if not build_folders(engine):
        return []
    from samekit.tensorrt.opening import check_builds

    rows = []
    try:
        for precision in GPU_PRECISIONS:
            for build, check in check_builds(engine, precision):
                rows.append({"name": build.folder.name, **dataclasses.asdict(check)})
    except BackendUnavailableError as error:
        say(f"TensorRT engines: not checked, {error.cause}", err=True)
    for row in rows:
        if row["failure"]:
            raise VerificationError(
                f"{engine.folder}: {row['failure']}; use backend onnxruntime, and please report this"
            )
    return rows
