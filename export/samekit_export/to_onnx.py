"""Write graphs as ONNX files: standard operators, dynamic batch and latents, large weights in a separate file."""

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
"""Opset of the graphs: the first with RotaryEmbedding, which ONNX Runtime and TensorRT run as one fused step."""

EXTERNAL_DATA_ABOVE = 64 * 1024 * 1024
"""Larger weights, in bytes, get their own file, which a runtime can map. Protobuf files end at 2 GiB."""


def tool_versions() -> dict[str, str]:
    """Return the versions of the packages that write graphs, by name, and the operator set."""
    packages = ("samekit", "torch", "onnx", "onnxscript")
    return {**{package: version(package) for package in packages}, "opset": str(OPSET)}


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Suppress the exporter's messages about packages that samekit does not use and about its own deprecations."""
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
    """Write one graph to the `.onnx` file `path`; large weights go to `path` + `.data`."""
    config = graph.config
    batch, latents = torch.export.Dim("batch"), torch.export.Dim("latents")
    # The exporter treats sizes of 0 and 1, and a single group, as constants. Any other size gives the same graph.
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
        # The exporter gives this size as a long formula of symbols that it generates.
        shape = program.model.graph.outputs[0].shape
        if shape is None:
            raise RuntimeError("torch.onnx.export lost the output's shape")
        shape[2] = "latents" if isinstance(graph, GraphEncoder) else f"{config.hop}*latents"
        for node in program.model.graph.all_nodes():
            # It names files of this machine, and differs between machines.
            node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
        size = sum(p.numel() * p.element_size() for p in graph.state_dict().values())
        program.save(path, external_data=size > EXTERNAL_DATA_ABOVE)
