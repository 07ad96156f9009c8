"""`samekit info` and `samekit clean`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from samekit.cli.group import UserPath, json_option, say, say_json

if TYPE_CHECKING:
    from pathlib import Path

    from samekit.engine.folder import Engine


@click.command()
@click.argument("engine", type=UserPath())
@json_option(
    "name, folder, sample_rate, channels, hop (samples per latent), latent_width, alignment, contexts, source, tools, "
    "graphs (bytes and snr_db of each precision) and tensorrt (name, bytes and stale of each build)"
)
def info(engine: Path, as_json: bool) -> None:
    """Show what an ENGINE folder (or a model's name) holds."""
    from samekit.engine.folder import find_engine

    found = find_engine(engine)
    facts = _facts(found)
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
        say(f"  {precision:10} {graph['bytes'] / 1e6:.0f} MB, {against}")
    for build in facts["tensorrt"]:
        state = f"STALE: {build['stale']}" if build["stale"] else "current"
        say(f"  tensorrt   {build['name']}: {build['bytes'] / 1e6:.0f} MB; {state}")


def _facts(found: Engine) -> dict[str, Any]:
    """Return the fields that `info --json` prints, after checking the sizes of all graphs."""
    from samekit.engine.builds import build_folders, inspect_builds
    from samekit.tensorrt.flavours import builder_versions

    spec, graphs = found.spec, {}
    for precision, pair in spec.graphs.items():
        found.check(precision)
        cases = [case["snr_db"] for case in spec.verification.get(precision, [])]
        size = sum(sum(graph.sizes.values()) for graph in pair.values())
        graphs[precision] = {"bytes": size, "snr_db": min(cases, default=None)}
    names = ("name", "sample_rate", "channels", "hop", "latent_width", "alignment", "contexts", "source", "tools")
    # TensorRT is slow to import, so its versions are looked up only if there are builds to compare with.
    builds = inspect_builds(found, builder_versions()) if build_folders(found) else ()
    return {
        **{name: getattr(spec, name) for name in names},
        "folder": str(found.folder),
        "graphs": graphs,
        "tensorrt": [
            {"name": folder.name, "bytes": sum(engine.size for engine in engines.values()), "stale": reason}
            for folder, engines, reason in builds
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
