"""`samekit info`, `samekit clean` and `samekit tune`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from samekit.cli.group import UserPath, json_option, say, say_json
from samekit.engine.spec import GPU_PRECISIONS

if TYPE_CHECKING:
    from pathlib import Path

    from samekit.engine.folder import Engine


@click.command()
@click.argument("engine", type=UserPath())
@json_option(
    "name, folder, sample_rate, channels, hop (samples per latent), latent_width, alignment, contexts, source, tools, "
    "graphs (bytes and snr_db of each precision, target_db of int8) and tensorrt (name, bytes, options, checks and "
    "stale of each build)"
)
@click.option("--layers", is_flag=True, help="Say what TensorRT made of the graphs; needs the GPU of the engines.")
def info(engine: Path, layers: bool, as_json: bool) -> None:
    """Show what an ENGINE folder (or a model's name) holds."""
    from samekit.engine.folder import find_engine

    found = find_engine(engine)
    facts = _facts(found)
    if layers:
        _add_layers(found, facts)
    if as_json:
        say_json(facts)
        return
    spec = found.spec
    say(f"{spec.name} in {found.folder}")
    say(f"  audio      {spec.sample_rate} Hz, {spec.channels} channels, {spec.hop} samples per latent")
    say(f"  latents    {spec.latent_width} wide")
    contexts = ", ".join(f"{direction} context {context}" for direction, context in spec.contexts.items())
    say(f"  windows    start at multiples of {spec.alignment}; {contexts}")
    say(f"  source     {spec.origin}")
    say(f"  tools      {', '.join(f'{name} {version}' for name, version in spec.tools.items())}")
    for precision, graph in facts["graphs"].items():
        worst = graph["snr_db"]
        against = "not verified" if worst is None else f"at least {worst} dB against eager PyTorch"
        target = f", the target was {graph['target_db']:g} dB" if "target_db" in graph else ""
        say(f"  {precision:10} {graph['bytes'] / 1e6:.0f} MB, {against}{target}")
    for build in facts["tensorrt"]:
        state = f"STALE: {build['stale']}" if build["stale"] else "current"
        options = ", ".join(f"{name} {value}" for name, value in build["options"].items())
        parts = (f"{build['bytes'] / 1e6:.0f} MB", options, build["checks"], state)
        say(f"  tensorrt   {build['name']}: {'; '.join(part for part in parts if part)}")
        for direction, described in build.get("layers", {}).items():
            say(f"    {direction}: {described['text']}")


def _add_layers(found: Engine, facts: dict[str, Any]) -> None:
    """Add the layers of each current TensorRT build."""
    from samekit.engine.builds import BUILDS_FOLDER, Build
    from samekit.errors import InputError
    from samekit.tensorrt.flavours import FLAVOURS, import_flavour
    from samekit.tensorrt.layers import layers_of

    for described in facts["tensorrt"]:
        build = None if described["stale"] else Build.load(found.folder / BUILDS_FOLDER / described["name"])
        if build and build.fingerprint.flavour in FLAVOURS:
            module = import_flavour(build.fingerprint.flavour)
            layers = {direction: layers_of(build, direction, module) for direction in build.engines}
            described["layers"] = {d: {**dataclasses.asdict(each), "text": str(each)} for d, each in layers.items()}
    if not any("layers" in described for described in facts["tensorrt"]):
        raise InputError(
            f"{found.folder}: no current TensorRT engine; run: {found.export_command('--tensorrt', 'auto')}"
        )


def _facts(found: Engine) -> dict[str, Any]:
    """Return the fields that `info --json` prints, after checking the sizes of all graphs."""
    from samekit.engine.builds import build_folders, describe_checks, inspect_builds
    from samekit.tensorrt.flavours import builder_versions

    spec, graphs = found.spec, {}
    for precision, pair in spec.graphs.items():
        found.check(precision)
        cases = [case["snr_db"] for case in spec.verification.get(precision, [])]
        size = sum(sum(graph.sizes.values()) for graph in pair.values())
        graphs[precision] = {"bytes": size, "snr_db": min(cases, default=None)}
        if precision == "int8":
            graphs[precision]["target_db"] = spec.int8_target_db
    names = ("name", "sample_rate", "channels", "hop", "latent_width", "alignment", "contexts", "source", "tools")
    # TensorRT is slow to import, so its versions are looked up only if there are builds to compare with.
    builds = inspect_builds(found, builder_versions()) if build_folders(found) else ()
    return {
        **{name: getattr(spec, name) for name in names},
        "folder": str(found.folder),
        "graphs": graphs,
        "tensorrt": [
            {
                "name": folder.name,
                "bytes": sum(built.size for built in build.engines.values()) if build else 0,
                "options": build.fingerprint.options.changed if build else {},
                "checks": describe_checks(build) if build and build.engines else None,
                "stale": reason,
            }
            for folder, build, reason in builds
        ],
    }


@click.command()
@click.argument("engine", type=UserPath())
def clean(engine: Path) -> None:
    """Remove the TensorRT engines of an ENGINE folder (or a model's name) that are stale or damaged."""
    from samekit.engine.builds import remove_stale
    from samekit.engine.folder import find_engine
    from samekit.tensorrt.flavours import builder_versions

    removed = remove_stale(find_engine(engine), builder_versions())
    for folder, size in removed:
        say(f"removed {folder}, {size / 1e6:.0f} MB")
    if not removed:
        say("nothing to remove")


@click.command()
@click.argument("engine", type=UserPath())
@click.option("--precision", default="fp16", show_default=True, type=click.Choice(GPU_PRECISIONS))
@click.option("--device-id", default=0, show_default=True, type=click.IntRange(min=0), help="Number of the GPU.")
@json_option("gpu, windows (of each direction), window_batch and cases")
def tune(engine: Path, precision: str, device_id: int, as_json: bool) -> None:
    """Measure which windows and batches are the fastest with the TensorRT engines of an ENGINE folder, and keep them.

    It takes a minute. The choice is for GPUs of this kind; --window and window_batch still take precedence.
    """
    from samekit.backends.base import BackendOptions
    from samekit.engine.folder import find_engine
    from samekit.tensorrt.opening import open_tensorrt
    from samekit.tensorrt.tuning import tune as measure

    with open_tensorrt(find_engine(engine), BackendOptions(precision=precision, device_id=device_id)) as backend:
        tuning = measure(backend)
    if as_json:
        say_json(dataclasses.asdict(tuning))
        return
    for case in tuning.cases:
        shape = f"{case['direction']:8}{case['batch']:>4} x {case['window']:>4} latents"
        say(f"{shape} {case['microseconds_per_latent']:>9.2f} us for each latent that is kept")
    windows = ", ".join(f"{direction} {window}" for direction, window in tuning.windows.items())
    say(f"{tuning.gpu}: windows of {windows} latents, {tuning.window_batch} at once")
