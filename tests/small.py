"""Small models that open quickly: graphs of a few nodes with the shapes of FakeBackend, and a small checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import onnx
from helpers import DIRECTIONS, FakeBackend, noise
from onnx import TensorProto, helper, numpy_helper

from samekit.engine.builds import Build, BuiltEngine, write_document
from samekit.engine.fingerprint import fingerprint_of
from samekit.engine.folder import describe_graph
from samekit.engine.spec import ENCODER

# Changes to the configuration of tiny-s that give the smallest checkpoint, 100 kB.
SMALL = {
    "pretransform.config.patch_size": 8,
    "*.config.channels": 32,
    "*.config.c_mults": [1],
    "*.config.strides": [2],
    "*.config.latent_dim": 4,
    "*.config.transformer_depths": [2],
    "*.config.dim_heads": 32,
    "*.config.ff_mult": 1,
    "*.config.chunk_size": 4,
    "encoder.config.in_channels": 16,
    "decoder.config.out_channels": 16,
    "bottleneck.config.dim": 4,
    "latent_dim": 4,
    "downsampling_ratio": 16,
}


def small_graph(direction, folder, name=None, *, external=False):
    """Write a graph with the shapes of FakeBackend's spec; `external` stores its weights in a second file."""
    encoder = direction == ENCODER
    width_in, width_out = (16, 4) if encoder else (4, 16)
    shape_in, shape_out = (["b", 2, "n"], ["b", 4, "t"]) if encoder else (["b", 4, "t"], ["b", 2, "n"])
    constants = {
        "weights": noise((width_in, width_out)),
        "whole": np.array([0, 2, -1, 8] if encoder else [0, 4, -1]),
        "tokens": np.array([0, -1, width_in]),
        "pieces": np.array([0, -1, 4] if encoder else [0, -1, 2, 8]),
        "end": np.array([0, 2, -1]),
    }
    nodes = [
        helper.make_node("Reshape", ["x", "whole"], ["a"]),
        helper.make_node("Transpose", ["a"], ["b"], perm=[0, 2, 1, 3] if encoder else [0, 2, 1]),
        helper.make_node("Reshape", ["b", "tokens"], ["c"]),
        helper.make_node("MatMul", ["c", "weights"], ["d"]),
        helper.make_node("Softmax", ["d"], ["e"], axis=-1),
        helper.make_node("Mul", ["e", "d"], ["f"]),
        helper.make_node("Reshape", ["f", "pieces"], ["g"]),
        helper.make_node("Transpose", ["g"], ["y" if encoder else "h"], perm=[0, 2, 1] if encoder else [0, 2, 1, 3]),
        *([] if encoder else [helper.make_node("Reshape", ["h", "end"], ["y"])]),
    ]
    graph = helper.make_graph(
        nodes,
        direction,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape_in)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape_out)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = folder / (name or f"{direction}.onnx")
    if external:
        location = f"{direction}.onnx.data"
        onnx.save_model(model, path, save_as_external_data=True, location=location, size_threshold=100)
    else:
        onnx.save_model(model, path)


def write_engine(folder):
    """Write an engine folder with small graphs and a TensorRT build."""
    folder.mkdir()
    for direction in DIRECTIONS:
        small_graph(direction, folder, external=direction == ENCODER)
    graphs = {direction: describe_graph(folder, f"{direction}.onnx") for direction in DIRECTIONS}
    spec = dataclasses.replace(
        FakeBackend().spec,
        graphs={"fp32": graphs},
        verification={"fp32": [{"direction": "encoder", "batch": 1, "latents": 2, "snr_db": 120.5, "max_error": 1e-6}]},
        tools={"samekit": "0.1.0"},
        source={"kind": "random", "name": "tiny-s", "seed": 0},
    )
    (folder / "spec.json").write_text(spec.to_json())
    fingerprint = fingerprint_of(spec, "fp32", "tensorrt_rtx", "1.7.1.116", "portable")
    build = folder / "tensorrt" / fingerprint.name
    build.mkdir(parents=True)
    (build / "build.log").touch()
    engines = {}
    for direction in DIRECTIONS:
        data = direction.encode() * 100
        (build / f"{direction}.engine").write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        engines[direction] = BuiltEngine(
            f"{direction}.engine", len(data), digest, layers=9, seconds=1.5, peak_memory=None
        )
    write_document(Build(build, fingerprint, engines))
