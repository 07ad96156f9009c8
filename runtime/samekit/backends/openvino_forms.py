"""Write parts of our graphs in the forms that OpenVINO computes fast or exactly. They compute the same functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable


def transpose_keys_in_products(openvino: Any, model: Any) -> None:
    """Let the products of queries and keys transpose the keys, while they copy them into blocks.

    OpenVINO's own transposition writes single values far apart. It takes 3 to 20 % of the whole time, which depends on
    how much of the processor's cache other programs use.

    Args:
        openvino: the module.
        model: the graph as `core.read_model` returns it. It is changed.
    """
    for product in model.get_ordered_ops():
        if product.get_type_name() != "MatMul" or any(product.get_attributes().values()):
            continue
        transposition = product.input_value(1).get_node()
        if transposition.get_type_name() != "Transpose":
            continue
        *outer, rows, columns = transposition.input_value(1).get_node().data.tolist()
        # Only the innermost axis of the keys, their features, is contiguous in memory. It must become the last one.
        if rows == len(outer) + 1:
            keys = openvino.opset1.transpose(transposition.input_value(0), np.array([*outer, columns, rows]))
            faster = openvino.opset1.matmul(product.input_value(0), keys, False, True)
            keys.friendly_name, faster.friendly_name = transposition.friendly_name, product.friendly_name
            product.output(0).replace(faster.output(0))


def use_fused_rotary(core: Any) -> None:
    """Let an `openvino.Core` read rotary embeddings in the form that it computes in one step.

    OpenVINO splits ONNX's operator `RotaryEmbedding` into a dozen passes over queries and keys. The form that is
    written here saves 3 to 4 % of the time in fp32. In bfloat16, it rounds the queries, the keys and the angles.
    """
    _add(core, _fused_rotary)


def use_float32_rotary(core: Any) -> None:
    """Let an `openvino.Core` read rotary embeddings in a form that can stay in float32.

    It takes two passes more over queries and keys than the fused form.
    """
    _add(core, _float32_rotary)


def _add(core: Any, rotary: Callable[[Any], list[Any]]) -> None:
    from openvino.frontend.onnx import ConversionExtension

    core.add_extension(ConversionExtension("RotaryEmbedding", rotary))


# Both functions return the output of an operator of our graphs: with 4 dimensions `[batch, heads, tokens, features]`,
# positions, and halves that are not interleaved. Both tables are `[positions, rotated / 2]`.


def _float32_rotary(node: Any) -> list[Any]:
    from openvino import opset13 as ops

    x, cos, sin, positions = (node.get_input(i) for i in range(4))
    half = node.get_attribute("rotary_embedding_dim") // 2
    features = x.get_partial_shape()[3].get_length()

    def factors(before: Any, after: Any, rest: float) -> Any:
        """Return a factor for each feature, `[batch, 1, tokens, features]`."""
        others = np.full((len(before), features - 2 * half), rest, np.float32)
        return ops.unsqueeze(ops.gather(np.concatenate([before, after, others], 1), positions, 0), 1)

    cosines, sines = (table.get_node().data for table in (cos, sin))
    # The rotated features are all of them or half of them. The first two blocks are the halves.
    blocks = features // half
    parts = ops.reshape(x, [0, 0, 0, blocks, half], True)
    swapped = ops.reshape(ops.gather(parts, [1, 0, *range(2, blocks)], 3), [0, 0, 0, features], True)
    kept = ops.multiply(x, factors(cosines, cosines, 1))
    return [ops.add(kept, ops.multiply(swapped, factors(-sines, sines, 0))).output(0)]


def _fused_rotary(node: Any) -> list[Any]:
    from openvino import opset13 as ops

    x, cos, sin, positions = (node.get_input(i) for i in range(4))
    rotated = node.get_attribute("rotary_embedding_dim")
    others = x.get_partial_shape()[3].get_length() - rotated

    def factors(table: Any) -> Any:
        """Return a factor for each rotated feature, `[batch, 1, tokens, rotated]`."""
        return ops.unsqueeze(ops.gather(ops.concat([table, table], 1), positions, 0), 1)

    # OpenVINO recognises the axis 3, but not -1.
    parts = ops.variadic_split(x, 3, [rotated, others]).outputs() if others else [x]
    halves = ops.variadic_split(parts[0], 3, [rotated // 2, rotated // 2])
    minus_one = ops.constant(-1.0, x.get_element_type())
    turned = ops.concat([ops.multiply(halves.output(1), minus_one), halves.output(0)], -1)
    embedded = ops.add(ops.multiply(parts[0], factors(cos)), ops.multiply(turned, factors(sin)))
    return [ops.concat([embedded, *parts[1:]], -1).output(0)]
