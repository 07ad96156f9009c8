"""What fraction of this machine's speed does a graph reach, and which operators take the time?

The limit is the speed of one large matrix product with the same number of threads and in the same program: OpenVINO for
bf16, else ONNX Runtime. The operations of a graph are counted from the shapes of its products. The times by operator
are those of ONNX Runtime's profiler, which costs a few percent. The fraction is measured without it.

    python benchmarks/limit.py engines/same-s --latents 64
    python benchmarks/limit.py engines/same-s --latents 64 --precision bf16
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import onnx
from common import engine_argument, finish, open_session, plot_bars, plot_option, question
from onnx import TensorProto, helper, numpy_helper

from samekit.arguments import MOST_THREADS
from samekit.backends.base import BackendOptions
from samekit.backends.cpu import available_cpus
from samekit.backends.selection import open_backend
from samekit.engine.spec import DECODER, ENCODER, INPUT_NAMES, Direction, graph_precision
from samekit.packages import import_openvino
from samekit_export.measure import interleaved, summary
from samekit_export.verify import example_input

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from onnxruntime import InferenceSession

    from samekit.arrays import Array
    from samekit.engine.folder import Engine

# Rows, inner size and columns: as large as the models' feed-forward products, and larger.
LARGE = ((2176, 768, 4608), (2176, 1536, 9216), (4096, 4096, 4096))
QUANTIZED, BFLOAT16 = "int8", "bf16"
RUNS = 12


def product_graph(inner: int, columns: int, precision: str) -> bytes:
    """Return an ONNX graph of one matrix product with constant weights, dynamically quantized for int8."""
    weight = np.random.default_rng(0).standard_normal((inner, columns), np.float32)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", None]) for name in "xy")
    if precision == QUANTIZED:
        quantized = numpy_helper.from_array((weight * 30).clip(-127, 127).astype(np.int8), "w")
        constants = [quantized, numpy_helper.from_array(np.array(1 / 30, np.float32), "scale")]
        nodes = [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["quantized", "x_scale", "zero"]),
            helper.make_node("MatMulInteger", ["quantized", "w", "zero"], ["sums"]),
            helper.make_node("Cast", ["sums"], ["total"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["x_scale", "scale"], ["both"]),
            helper.make_node("Mul", ["total", "both"], ["y"]),
        ]
    else:
        constants = [numpy_helper.from_array(weight, "w")]
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    graph = helper.make_graph(nodes, "product", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def product(inner: int, columns: int, precision: str, threads: int) -> Callable[[Array], object]:
    """Return a function that computes the product of rows with constant weights."""
    graph = product_graph(inner, columns, precision)
    if precision == BFLOAT16:
        core = import_openvino().Core()
        settings = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
        request = core.compile_model(core.read_model(graph, b""), "CPU", settings).create_infer_request()
        return lambda rows: request.infer([rows])
    return runner(open_session(graph, threads, precision))


def runner(session: InferenceSession) -> Callable[[Array], object]:
    """Return a function that runs a graph with one input."""
    (only,) = session.get_inputs()
    return lambda array: session.run(None, {only.name: array})


def fastest(run: Callable[[Array], object], inputs: Array) -> float:
    """Return the seconds of the fastest of several runs."""
    return summary(interleaved({"": partial(run, inputs)}, RUNS)[""])["min"]


def measured_limit(precision: str, threads: int) -> float:
    """Return the most operations a second of the large products."""
    speeds = []
    for rows, inner, columns in LARGE:
        inputs = np.random.default_rng(1).standard_normal((rows, inner), np.float32)
        speeds.append(2 * rows * inner * columns / fastest(product(inner, columns, precision, threads), inputs))
    return max(speeds)


def _size(shapes: list[dict[str, list[int]]], index: int) -> list[int]:
    (shape,) = shapes[index].values()
    return shape


def operations(event: dict[str, Any]) -> int:
    """Return the multiplications and additions of a node: 2 * inner * outputs for a matrix product, 0 for others."""
    name = event["args"]["op_name"]
    if not any(part in name for part in ("MatMul", "Gemm")):
        return 0
    outputs = _size(event["args"]["output_type_shape"], 0)
    rows = math.prod(outputs) // outputs[-1]
    inner = math.prod(_size(event["args"]["input_type_shape"], 0)) // rows
    return 2 * inner * math.prod(outputs)


def profile(path: Path, inputs: Array, threads: int, precision: str) -> list[dict[str, Any]]:
    """Return the events of the nodes in one run after a warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(path, threads, precision, Path(folder) / "profile")
        feeds = {session.get_inputs()[0].name: inputs}
        for _ in range(RUNS):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    return nodes[-len(nodes) // RUNS :]


def breakdown(events: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return the fraction of the time that each operator takes, largest first."""
    times: dict[str, float] = defaultdict(float)
    for event in events:
        times[event["args"]["op_name"]] += event["dur"]
    total = sum(times.values())
    return {name: time / total for name, time in sorted(times.items(), key=lambda item: -item[1])}


@question
@engine_argument
@click.option("--latents", default=64, show_default=True, type=click.IntRange(1))
@click.option("--precision", default="fp32", show_default=True)
@click.option("--threads", type=click.IntRange(1, MOST_THREADS), help="[default: all cores]")
@click.option(
    "--direction",
    "directions",
    multiple=True,
    default=(ENCODER, DECODER),
    type=click.Choice((ENCODER, DECODER)),
    help="Measure only this one, in memory that nothing else has used. [default: both]",
)
@plot_option
def main(
    engine: Engine,
    latents: int,
    precision: str,
    threads: int | None,
    directions: tuple[Direction, ...],
    plot_path: Path | None,
) -> None:
    """Print the fraction and the breakdown for the directions of one ENGINE folder; the last line is JSON."""
    threads = threads or available_cpus()
    graphs = graph_precision(precision)
    engine.check(graphs)
    rows: dict[str, dict[str, Any]] = {}
    for direction in directions:
        path, inputs = engine.graph(direction, graphs), example_input(engine.spec, direction, 1, latents, seed=0)
        if precision == BFLOAT16:
            with open_backend(engine.folder, "openvino", BackendOptions(precision, threads=threads)) as backend:
                seconds = fastest(backend.encode if direction == ENCODER else backend.decode, inputs)
        else:
            session = open_session(path, threads, precision)
            if [node.name for node in session.get_inputs()] != [INPUT_NAMES[direction]]:
                raise click.ClickException(f"{path}: not the graph of an {direction}")
            seconds = fastest(runner(session), inputs)
            del session
        events = profile(path, inputs, threads, graphs)
        rows[direction] = {"seconds": seconds, "operations": sum(map(operations, events)), "shares": breakdown(events)}
    # Measured last, because graphs are up to 8 % slower in memory that large products have used and freed.
    limit = measured_limit(precision, threads)
    print(f"large {precision} products: {limit / 1e9:.0f} GOP/s with {threads} threads")
    for name, row in rows.items():
        speed = row["operations"] / row["seconds"]
        row["of_limit"] = speed / limit
        print(
            f"{name}: {row['operations'] / 1e9:.1f} giga-operations in {row['seconds']:.3f} s, "
            f"{speed / 1e9:.0f} GOP/s, {row['of_limit']:.1%} of the limit"
        )
        # The profile is of ONNX Runtime, which has no bf16.
        for step, share in list(row["shares"].items())[: 0 if precision == BFLOAT16 else 12]:
            print(f"    {share:6.1%}  {step}")
    if plot_path:
        plot_bars(
            plot_path,
            {f"{name}, {row['of_limit']:.0%} of the limit": row["shares"] for name, row in rows.items()},
            x="share of the time",
        )
    results: dict[str, Any] = {"limit_gops": limit / 1e9, "latents": latents, "precision": precision, **rows}
    finish("limit", results)


if __name__ == "__main__":
    main()
