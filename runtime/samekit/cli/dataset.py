"""`samekit pre-encode` and `samekit check-latents`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from samekit.cli.group import STOPPED, json_option, say
from samekit.cli.model_options import BACKEND_OPTIONS, MODEL_HELP, backend_options, model_option, open_model
from samekit.engine.spec import GPU_PRECISIONS
from samekit.errors import InputError

if TYPE_CHECKING:
    from samekit.dataset.devices import DevicesExecutor
    from samekit.dataset.options import PreEncodeOptions
    from samekit.dataset.ray import RayExecutor
    from samekit.dataset.report import Plan, PreEncodeReport
    from samekit.model import AutoencoderModel

_MOST_BAD_SHOWN: Final = 10


@click.command("pre-encode")
@model_option(MODEL_HELP, required=False)
@click.option("--data_dir", "--data-dir", multiple=True, help="Folder with audio files and captions; repeatable.")
@click.option("--output_path", "--output-path", help="Folder (or URL) for the latents.")
@click.option("--batch_size", "--batch-size", default=1, show_default=True, help="Windows encoded at once.")
@click.option("--sample_size", "--sample-size", default=12582912, show_default=True, help="Samples a clip is cut to.")
@click.option("--model_half", "--model-half", "float16", is_flag=True, help="Encode in fp16 and write float16.")
@click.option("--pad", is_flag=True, help="Pad every clip to --sample_size.")
@click.option("--full", is_flag=True, help="Keep clips longer than --sample_size whole.")
@click.option("--crop", default="start", show_default=True, type=click.Choice(["start", "random"]))
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of --crop and --flip random."
)
@click.option("--flip", default="none", show_default=True, type=click.Choice(["none", "random"]), help="Invert phases.")
@click.option(
    "--target-latent-rms",
    type=float,
    metavar="RMS",
    help="Scale each clip until its latents have this RMS, such as 0.9.",
)
@click.option(
    "--captions",
    default="json,txt",
    show_default=True,
    metavar="LIST",
    help="Where captions are looked for, in this order: json, txt, tags.",
)
@click.option(
    "--layout",
    default="numbered",
    show_default=True,
    type=click.Choice(["numbered", "mirror"]),
    help="Names of the files: numbers, or those of the audio files.",
)
@click.option("--shard", metavar="I/N", default="1/1", show_default=True, help="Encode one of N parts, I from 1.")
@click.option("--checksum", is_flag=True, help="Detect changed files by their contents, not by size and time.")
@click.option("--strict", is_flag=True, help="Exit with code 2 if a clip is bad, after encoding the others.")
@click.option(
    "--reencode",
    is_flag=True,
    help="If the folder holds latents of other settings, encode all clips again; delete those of clips that are gone.",
)
@click.option("--prune", is_flag=True, help="Delete the latents of clips that left the dataset.")
@click.option("--dry-run", is_flag=True, help="Say how many clips and hours would be encoded, and in what time.")
@click.option(
    "--workers", "readers", default=0, help="Number of readers. [default: one a core, at most 4, or 16 with a GPU]"
)
@click.option(
    "--worker-processes/--worker-threads",
    "reader_processes",
    default=None,
    help="Read in processes or in threads. [default: processes with a GPU or more than 4 cores]",
)
@click.option(
    "--devices", metavar="all|0,1,...", help="Encode on these GPUs of this machine at once, in one process each."
)
@click.option(
    "--ray",
    "address",
    metavar="[ADDRESS]",
    is_flag=False,
    flag_value="",
    help="Encode on a Ray cluster: HOST:PORT or local. Without ADDRESS, use RAY_ADDRESS or a cluster on this machine.",
)
@click.option("--actors", type=click.IntRange(min=1), help="Number of actors on the cluster. [default: as many as fit]")
@click.option("--cpus-per-actor", type=click.IntRange(min=1), help="Cores and threads of each actor. [default: 1]")
@click.option(
    "--gpus-per-actor", type=click.FloatRange(min=0), help="GPUs of each actor, or a share of one. [default: the CPU]"
)
@click.option("--verify", "checked", metavar="FOLDER", help="The same as: samekit check-latents FOLDER")
@json_option("the counts of the run that .samekit/report.json lists, or the plan with --dry-run")
@backend_options
def pre_encode(
    model: str | None,
    data_dir: tuple[str, ...],
    output_path: str | None,
    checked: str | None,
    address: str | None,
    devices: str | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Encode a dataset for training: a pair of .npy and .json for each audio file with a caption.

    Run it again to continue a run that was stopped, or to encode new and changed files.
    """
    if checked is not None:
        click.get_current_context().invoke(check_latents, folder=checked)
        return
    # Empty paths, as an unset variable of a shell gives, would be the working folder.
    if not data_dir or not all(data_dir) or not output_path:
        raise InputError("pre-encode needs a dataset and a folder; pass --data_dir and --output_path")
    if not model:
        # Latents of another model look alike, and training on them fails late.
        raise InputError("pre-encode needs the model that you train with; pass --model (the reference takes same-l)")
    from samekit.dataset.options import PreEncodeOptions, Shard
    from samekit.dataset.progress import Display
    from samekit.dataset.run import plan
    from samekit.dataset.run import pre_encode as run
    from samekit.dataset.sources import require_folders

    backend = {name: options.pop(name) for name in BACKEND_OPTIONS}
    if options["float16"]:
        if backend["precision"] not in GPU_PRECISIONS:
            raise InputError(f"--model_half means --precision fp16, not {backend['precision']}; pass one of them")
        backend["precision"] = "fp16"
    actors = {name: options.pop(name) for name in ("actors", "cpus_per_actor", "gpus_per_actor")}
    options["captions"] = tuple(options["captions"].replace(" ", "").split(","))
    settings = PreEncodeOptions(shard=Shard.parse(options.pop("shard")), **options)
    # The folders are checked before the model is opened, which may have to be downloaded.
    require_folders(data_dir)
    if dry_run:
        with open_model(model, **backend) as opened:
            planned = plan(opened, data_dir, output_path, settings)
        _show_result(planned, as_json=as_json)
        return
    click.get_current_context().meta[STOPPED] = "stopped; run the same command again to go on"
    with _open_executor(model, backend, settings, devices, address, actors) as executor, Display() as display:
        report = run(executor, data_dir, output_path, settings, display)
    _show_notices(report, settings)
    _show_result(report, as_json=as_json)


def _show_result(result: PreEncodeReport | Plan, *, as_json: bool) -> None:
    say(result.to_json() if as_json else result.summary())


def _show_notices(report: PreEncodeReport, settings: PreEncodeOptions) -> None:
    """Print bad clips and other notices on standard error."""
    for row in report.bad[:_MOST_BAD_SHOWN]:
        say(f"{row['status']}: {row['reason'] or row['relpath']}", err=True)
    if len(report.bad) > _MOST_BAD_SHOWN:
        say(f"{len(report.bad) - _MOST_BAD_SHOWN} more bad clips; all are in .samekit/report.json", err=True)
    if notice := report.cut_notice(settings.sample_size):
        say(notice, err=True)
    if settings.reencode and report.unchanged:
        say("--reencode: the folder has latents of these settings; only new and changed clips were encoded", err=True)


def _open_executor(
    model: str,
    backend: dict[str, Any],
    settings: PreEncodeOptions,
    devices: str | None,
    address: str | None,
    actors: dict[str, Any],
) -> AutoencoderModel | DevicesExecutor | RayExecutor:
    """Open a model in this process, on several GPUs if `devices` is given, or on a cluster if `address` is given."""
    given = {name: value for name, value in actors.items() if value is not None}
    if address is None:
        if given:
            names = " ".join(f"--{name.replace('_', '-')}" for name in given)
            raise InputError(f"{names} only works with a Ray cluster; pass --ray too")
        if devices is None:
            return open_model(model, **backend)
        from samekit.dataset.devices import DevicesExecutor

        return DevicesExecutor(model, devices, **backend)
    if devices is not None:
        raise InputError("--devices and --ray both split the work; pass one of them")
    if settings.shard.count > 1:
        raise InputError("--shard and --ray both split the work; pass one of them")
    from samekit.dataset.ray import RayExecutor, RayOptions

    say("joining or starting a Ray cluster and opening the model there, which can take 15 s", err=True)
    return RayExecutor(model, RayOptions(address, **given), **backend)


@click.command("check-latents")
@click.argument("folder")
def check_latents(folder: str) -> None:
    """Check a FOLDER that pre-encode wrote: every value, and the metadata against the manifest."""
    from samekit.dataset.check import verify

    problems = verify(folder)
    for problem in problems:
        say(problem)
    if problems:
        raise InputError(f"{folder}: {len(problems)} problem{'s' * (len(problems) > 1)}; see above")
    say(f"{folder}: sound")
