"""Choose what OpenVINO keeps in float32 while it computes a graph in bfloat16.

OpenVINO's hint alone puts almost every operation in bfloat16. Four things stay in float32 here: the residual stream,
queries and keys with their rotary embedding, the scores of attention up to the difference of both softmaxes, and the
last product with weights. On 5 clips each of noise, music and speech, the least SNR of same-tiny's latents is 41 dB,
and 35 dB with queries and keys in bfloat16. Of a trained decoder with the attention of SAME-L it is 37 and 30 dB.
On AMD Zen 4, SAME-S takes 6 to 8 % longer with queries and keys in float32.

OpenVINO's CPU plugin reads this choice from an attribute of each operation. Its Python API cannot set it, but a model
file can hold it. So the graph without its large weights is written to such a file, changed there and read again.
"""

from __future__ import annotations

import html
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from samekit.arrays import Array

# The value means: do not convert from any type to float16, which the plugin applies to bfloat16 too.
_KEPT: Final = '<rt_info><attribute name="DisablePrecisionConversion" version="0" value="dynamic:f16"/></rt_info>'

# The beginning of an operation in a model file, after which the attribute is inserted.
_LAYER: Final = re.compile(r'<layer id="\d+" name="(?P<name>[^"]*)" type="[^"]*" version="[^"]*">\s*(<data [^>]*/>)?')

# Smaller constants are written to the model file. Shapes are among them, which other operations must know.
_LARGE: Final = 1024


def keep_float32(openvino: Any, core: Any, model: Any) -> tuple[Any, dict[str, Array]]:
    """Return a copy of a graph that says which operations stay in float32.

    Args:
        openvino: the module.
        core: an `openvino.Core`.
        model: the graph as `core.read_model` returns it. It cannot be used afterwards.

    Returns:
        The copy, which shares the weights, and values of further inputs that it has: name of the input -> array. The
        CPU plugin would combine a product with constant weights to an operation that loses the attribute.
    """
    _replace_softmaxes(openvino, model)
    _replace_subtractions(openvino, model)
    *_, last = (op for op in model.get_ordered_ops() if op.get_type_name() == "MatMul" and _weights_of(op))
    kept = {op.friendly_name for op in _kept(model, last)}
    inputs = {f"input weights {op.friendly_name}": op for op in _weights_of(last)}
    others = [op for op in model.get_ops() if _is_large(op) and op not in inputs.values()]
    constants = {f"weights {number}": op for number, op in enumerate(others)} | inputs
    for name, constant in constants.items():
        parameter = openvino.opset1.parameter(constant.get_output_partial_shape(0), constant.get_element_type())
        parameter.friendly_name = name
        constant.output(0).replace(parameter.output(0))
        model.add_parameters([parameter])
    marked = _marked(openvino, core, model, kept)
    for parameter in marked.get_parameters():
        if parameter.friendly_name in constants.keys() - inputs.keys():
            parameter.output(0).replace(constants[parameter.friendly_name].output(0))
            marked.remove_parameter(parameter)
    marked.validate_nodes_and_infer_types()
    _forget_file(marked)
    return marked, {name: constant.data for name, constant in inputs.items()}


def _forget_file(marked: Any) -> None:
    """Let small constants be stored with a compiled graph.

    OpenVINO notes where in a file it has read a constant. For these it is the file that `_marked` has deleted.
    """
    for op in marked.get_ops():
        if op.get_type_name() == "Constant" and not _is_large(op):
            info = op.get_rt_info()
            for name in [name for name, _ in info.items() if name.startswith("WeightlessCacheAttribute")]:
                del info[name]


def _replace_softmaxes(openvino: Any, model: Any) -> None:
    """Use the older operator, because OpenVINO would replace the newer one by it later, without the attribute."""
    for op in model.get_ordered_ops():
        if op.get_type_name() == "Softmax":
            data = op.input_value(0)
            older = openvino.opset1.softmax(data, op.get_axis() % len(data.get_partial_shape()))
            older.friendly_name = op.friendly_name
            op.output(0).replace(older.output(0))


def _replace_subtractions(openvino: Any, model: Any) -> None:
    """Subtract the second softmax by an addition: OpenVINO would do the same later, without the attribute.

    It does so too if the factor is a single number, so there is one for each head.
    """
    for difference in model.get_ordered_ops():
        # The others subtract positions.
        if difference.get_type_name() == "Subtract" and difference.get_element_type().is_real():
            first, second = (difference.input_value(i) for i in range(2))
            heads = second.get_partial_shape()[1].get_length()
            negative = openvino.opset1.multiply(second, -np.ones((1, heads, 1, 1), np.float32))
            total = openvino.opset1.add(first, negative)
            negative.friendly_name = f"{difference.friendly_name} negative"
            total.friendly_name = difference.friendly_name
            difference.output(0).replace(total.output(0))


def _sources(op: Any) -> Iterator[Any]:
    """Yield the operations whose outputs an operation reads."""
    return (each.get_source_output().get_node() for each in op.inputs())


def _readers(op: Any) -> Iterator[Any]:
    """Yield the operations that read the outputs of an operation."""
    return (each.get_node() for output in op.outputs() for each in output.get_target_inputs())


def _is_large(op: Any) -> bool:
    return bool(op.get_type_name() == "Constant" and op.get_byte_size() >= _LARGE)


def _weights_of(product: Any) -> list[Any]:
    """Return the constants that a product reads."""
    return [op for op in _sources(product) if op.get_type_name() == "Constant"]


def _kept(model: Any, last: Any) -> Iterator[Any]:
    """Yield the operations that stay in float32; `last` is the last product with weights."""
    softmaxes = [op for op in model.get_ops() if op.get_type_name() == "Softmax"]
    yield last
    # Branches of the residual stream end in products, and those before it begin with a product.
    yield from (op for op in _reached([last], _sources) if op.get_type_name() != "MatMul")
    # The products of queries and keys are in front of each softmax, those with values behind it.
    scores = _reached(softmaxes, _sources)
    yield from scores
    products = [op for op in scores if op.get_type_name() == "MatMul"]
    yield from (op for op in _reached(products, _sources) if op.get_type_name() != "MatMul")
    yield from (op for op in _reached(softmaxes, _readers) if op.get_type_name() != "MatMul")


def _reached(starts: list[Any], neighbours: Callable[[Any], Iterator[Any]]) -> list[Any]:
    """Return operations that are reached from others, up to the next products and including these."""
    pending, found = list(starts), {op.friendly_name: op for op in starts}
    while pending:
        for op in neighbours(pending.pop()):
            if op.friendly_name not in found:
                found[op.friendly_name] = op
                if op.get_type_name() != "MatMul":
                    pending.append(op)
    return list(found.values())


def _marked(openvino: Any, core: Any, model: Any, kept: set[str]) -> Any:
    """Return a copy of a model, in which the operations in `kept` have the attribute."""
    with tempfile.TemporaryDirectory(prefix="samekit-") as folder:
        path = Path(folder, "model.xml")
        openvino.serialize(model, path, path.with_suffix(".bin"))
        text = path.read_text(encoding="utf-8")
        values = np.fromfile(path.with_suffix(".bin"), np.uint8)

    def mark(layer: re.Match[str]) -> str:
        return f"{layer[0]}{_KEPT}" if html.unescape(layer["name"]) in kept else layer[0]

    return core.read_model(_LAYER.sub(mark, text).encode(), openvino.Tensor(values))
