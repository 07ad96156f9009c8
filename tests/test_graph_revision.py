"""Graphs of the same weights do not change unless `GRAPH_REVISION` is raised.

`golden/graphs.json` describes the graphs of one revision, as the package versions in `constraints.txt` write them.
Other versions may write the same function with other operators, so the tests compare with these versions only. After a
change of the exported graphs, raise the revision and run

    PYTHONPATH=runtime:export python tests/test_graph_revision.py
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import DIRECTIONS, KINDS, seeded, variant
from onnx import numpy_helper
from small import SMALL

from samekit_export.export import GRAPHS
from samekit_export.graph import GRAPH_REVISION
from samekit_export.int8 import quantize_
from samekit_export.model import Same
from samekit_export.to_onnx import write_onnx

GOLDEN = Path(__file__).parent / "golden" / "graphs.json"
TOOLS = ("torch", "onnx", "onnxscript")


def tools():
    # Without the build, such as +cpu.
    return {tool: version(tool).partition("+")[0] for tool in TOOLS}


def described(path):
    """Count each operator and each kind of constant, and sum all floats."""
    graph = onnx.load(path).graph
    arrays = [numpy_helper.to_array(tensor) for tensor in graph.initializer]
    floats = [array.astype(np.float64) for array in arrays if array.dtype.kind == "f"]
    return {
        "operators": dict(sorted(Counter(node.op_type for node in graph.node).items())),
        "constants": dict(sorted(Counter(f"{array.dtype} {list(array.shape)}" for array in arrays).items())),
        "sum": sum(float(np.abs(array).sum()) for array in floats),
        "squares": sum(float(np.square(array).sum()) for array in floats),
    }


def small_graph(direction, precision, path):
    """Export a graph of the smallest checkpoint."""
    model = Same.from_checkpoint(variant("tiny-s", SMALL))
    graph = GRAPHS[direction](model)
    if precision == "fp16":
        graph.to_float16_()
    elif precision == "int8":
        quantize_(graph, model)
    write_onnx(graph, path)
    return path


@pytest.fixture(scope="module")
def golden():
    document = json.loads(GOLDEN.read_text(encoding="utf-8"))
    if document["tools"] != tools():
        pytest.skip(f"graphs.json was written by {document['tools']}, here are {tools()}")
    return document


def assert_unchanged(golden, key, path, *, exact=True):
    now, then = described(path), golden["graphs"][key]
    assert golden["revision"] == GRAPH_REVISION, "GRAPH_REVISION was raised: write graphs.json again"
    cure = f"{key}: the exported graph has changed; raise GRAPH_REVISION and write graphs.json again"
    assert now["operators"] == then["operators"], cure
    assert now["constants"] == then["constants"], cure
    if exact:
        # Weights are folded in float64, so processors differ by a rounding to float32 at most.
        for field in ("sum", "squares"):
            assert now[field] == pytest.approx(then[field], rel=1e-6), cure


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_are_those_of_this_revision(golden, engine_of, kind, direction):
    assert_unchanged(golden, f"{kind} {direction} fp32", engine_of(kind).folder / f"{direction}.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_graphs_of_other_precisions_are_those_of_this_revision(golden, tmp_path, precision, direction):
    # Weights that are rounded to int8 depend on sums, which processors add in different orders.
    path = small_graph(direction, precision, tmp_path / "graph.onnx")
    assert_unchanged(golden, f"small {direction} {precision}", path, exact=precision != "int8")


def write_golden(folder):
    """Describe the graphs of this revision."""
    graphs = {}
    for kind in KINDS:
        model = Same.from_checkpoint(seeded(kind))
        for direction in DIRECTIONS:
            write_onnx(GRAPHS[direction](model), folder / "graph.onnx")
            graphs[f"{kind} {direction} fp32"] = described(folder / "graph.onnx")
    for precision in ("fp16", "int8"):
        for direction in DIRECTIONS:
            graphs[f"small {direction} {precision}"] = described(
                small_graph(direction, precision, folder / "graph.onnx")
            )
    document = {"revision": GRAPH_REVISION, "tools": tools(), "graphs": graphs}
    GOLDEN.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        write_golden(Path(temporary))
    sys.exit()
