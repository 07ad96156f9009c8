"""`samekit info` and `samekit clean`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from samekit.cli.group import UserPath, say

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("engine", type=UserPath())
def info(engine: Path) -> None:
    """Show what an ENGINE folder (or a model's name) holds."""
    from samekit.engine.builds import build_folders, describe_builds
    from samekit.engine.folder import find_engine
    from samekit.tensorrt.flavours import builder_versions

    found = find_engine(engine)
    spec = found.spec
    say(f"{spec.name} in {found.folder}")
    say(f"  audio      {spec.sample_rate} Hz, {spec.channels} channels, {spec.hop} samples per latent")
    say(f"  latents    {spec.latent_width} wide")
    contexts = ", ".join(f"{direction} context {context}" for direction, context in spec.contexts.items())
    say(f"  windows    start at multiples of {spec.alignment}; {contexts}")
    say(f"  source     {spec.origin}")
    say(f"  tools      {', '.join(f'{name} {version}' for name, version in spec.tools.items())}")
    for precision, pair in spec.graphs.items():
        size = sum(sum(graph.sizes.values()) for graph in pair.values())
        worst = min((case["snr_db"] for case in spec.verification.get(precision, [])), default=None)
        against = "not verified" if worst is None else f"at least {worst} dB against eager PyTorch"
        found.check(precision)
        say(f"  {precision:10} {size / 1e6:.0f} MB, {against}")
    # TensorRT is slow to import, so its versions are looked up only if there are builds to compare with.
    if build_folders(found):
        for line in describe_builds(found, builder_versions()):
            say(f"  tensorrt   {line}")


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
