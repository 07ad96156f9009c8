"""Export-shaped modules to ONNX files: standard operators, dynamic batch and latents, weights beside a large graph."""

from __future__ import annotations

import contextlib
import logging
import warnings
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from samekit.engine.spec import INPUT_NAMES, opposite
from samekit_export.graph import GraphDecoder, GraphEncoder
from samekit_export.int8_layers import ONNX_OPERATORS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OPSET = 23
"""Of the graphs: the first with RotaryEmbedding, which ONNX Runtime and TensorRT both run as one fused step."""

EXTERNAL_DATA_ABOVE = 64 * 1024 * 1024
"""Bytes of weights above which they lie beside the graph, where a runtime can map them: protobuf ends at 2 GiB."""


def tool_versions() -> dict[str, str]:
    """Return the versions of the packages that write graphs, by name, and the operator set."""
    packages = ("samekit", "torch", "onnx", "onnxscript")
    return {**{package: version(package) for package in packages}, "opset": str(OPSET)}


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without the exporter's notes on packages that we do not use and on its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def write_onnx(graph: GraphEncoder | GraphDecoder, path: Path) -> None:
    """Write one graph; large weights go to `path` + `.data`.

    Args:
        graph: the encoder or the decoder.
        path: the `.onnx` file.
    """
    config = graph.config
    batch, latents = torch.export.Dim("batch"), torch.export.Dim("latents")
    # Sizes of 0 and 1 would be taken as constants, those of groups too; any others do.
    several = max(6, 3 * graph.trunk.tables.latents)
    if isinstance(graph, GraphEncoder):
        example = torch.zeros(2, config.channels, several * config.hop)
        length = config.hop * latents
    else:
        example = torch.zeros(2, config.latent_width, several)
        length = latents
    with _quiet_exporter():
        program = torch.onnx.export(
            graph.eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: batch, 2: length},),
            input_names=[INPUT_NAMES[graph.direction]],
            output_names=[INPUT_NAMES[opposite(graph.direction)]],
            verbose=False,
            custom_translation_table=ONNX_OPERATORS,
        )
        if program is None:
            raise RuntimeError("torch.onnx.export returned nothing")
        # The exporter derives these as long formulas over its own symbols.
        inside, outside = ("latents", f"{config.hop}*latents")
        shape = program.model.graph.outputs[0].shape
        if shape is None:
            raise RuntimeError("torch.onnx.export lost the output's shape")
        shape[2] = inside if isinstance(graph, GraphEncoder) else outside
        size = sum(p.numel() * p.element_size() for p in graph.state_dict().values())
        program.save(path, external_data=size > EXTERNAL_DATA_ABOVE)
