"""Which form of the attention does TensorRT compile best?

Exported graphs subtract both softmaxes, and multiply the difference with v. TensorRT fuses an attention only if it
finds a product, a softmax and a product, all in half precision. The other form has that: two plain attentions over
twice the heads, whose results are subtracted in float32.

Without a GPU, TensorRT-RTX compiles both, and the table has the layers after parsing and the accuracy in ONNX Runtime.
On a GPU, the engines are run too.

    python benchmarks/attention_forms.py same-s --weights random
"""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from common import finish, question

from samekit.backends.base import BackendOptions
from samekit.engine.accuracy import example_input
from samekit.engine.spec import DIRECTIONS, GPU_PRECISIONS
from samekit.errors import BackendUnavailableError, StaleEngineError
from samekit.tensorrt.flavours import import_flavour
from samekit.tensorrt.layers import layers_of
from samekit.tensorrt.opening import open_tensorrt
from samekit_export import export as exporter
from samekit_export.checkpoint import load
from samekit_export.graph import GraphBlock
from samekit_export.to_tensorrt import add_engines

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from samekit.engine.folder import Engine


def two_attentions(block: GraphBlock, q: Tensor, k: Tensor, v: Tensor, masked: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what `GraphBlock.attend` returns, as the difference of two attentions in the precision of v."""
    heads = block.softmax(masked(q @ k)) @ torch.cat([v, v], dim=1)
    both = heads.float().unflatten(1, (2, block.heads))
    difference: Tensor = both.select(1, 0) - both.select(1, 1)
    return difference.to(v.dtype)


FORMS: dict[str, Any] = {"one product": GraphBlock.attend, "two attentions": two_attentions}
"""Name of a form -> what takes the place of `GraphBlock.attend`."""


def milliseconds(engine: Engine, precision: str, latents: int) -> dict[str, float]:
    """Return the median time of a call by direction; nothing where no GPU runs the engines."""
    times: dict[str, float] = {}
    with suppress(BackendUnavailableError), open_tensorrt(engine, BackendOptions(precision=precision)) as backend:
        for direction in DIRECTIONS:
            array, measured = example_input(backend.spec, direction, 1, latents, seed=0), []
            for _ in range(12):
                start = time.perf_counter()
                backend.run(direction, array)
                measured.append(time.perf_counter() - start)
            times[direction] = 1e3 * statistics.median(measured[2:])
    return times


@question
@click.argument("model")
@click.option("--weights", default="random", show_default=True)
@click.option("--precision", default="fp16", show_default=True, type=click.Choice(GPU_PRECISIONS))
@click.option("--tensorrt", default="auto", show_default=True, type=click.Choice(["auto", "rtx"]))
@click.option("--latents", default=256, show_default=True, type=click.IntRange(1), help="Length of the timed calls.")
def main(model: str, weights: str, precision: str, tensorrt: str, latents: int) -> None:
    """Export and build one MODEL in both forms, and print a table; the last line is JSON."""
    checkpoint, rows, original = load(model, weights, None), [], GraphBlock.attend
    for form, attend in FORMS.items():
        with tempfile.TemporaryDirectory() as folder:
            GraphBlock.attend = attend  # type: ignore[method-assign]
            try:
                engine = exporter.export(checkpoint, Path(folder), [precision])
            finally:
                GraphBlock.attend = original  # type: ignore[method-assign]
            builds = add_engines(engine, [precision], tensorrt)
            least = min(case["snr_db"] for case in engine.spec.verification[precision])
            row: dict[str, Any] = {"form": form, "snr_db": least, "ms": milliseconds(engine, precision, latents)}
            for build in builds:
                row |= {
                    "builder": f"{build.fingerprint.flavour} {build.fingerprint.version}",
                    "layers": {direction: built.layers for direction, built in build.engines.items()},
                    "seconds": {direction: built.seconds for direction, built in build.engines.items()},
                }
                # Only a machine with the GPU can load an engine.
                with suppress(StaleEngineError):
                    module = import_flavour(build.fingerprint.flavour)
                    row["compiled"] = {d: str(layers_of(build, d, module)) for d in DIRECTIONS}
            rows.append(row)
            print(form, {key: value for key, value in row.items() if key != "form"}, flush=True)
    finish("attention_forms", rows)


if __name__ == "__main__":
    main()
