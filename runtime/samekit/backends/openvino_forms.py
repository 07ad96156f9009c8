"""Write parts of our graphs in the forms that OpenVINO computes fast. They compute the same functions."""

from __future__ import annotations

from typing import Any

import numpy as np


def transpose_keys_in_products(openvino: Any, model: Any) -> None:
    """Let the products of queries and keys transpose the keys, while they copy them into blocks.

    OpenVINO's own transposition writes single values far apart. It takes 3 to 20 % of the whole time, which depends on
    how much of the processor's cache other programs use.

    Args:
        openvino: the module.
        model: the graph as `core.read_model` returns it. It is changed.
    """
    for product in model.get_ordered_ops():
        transposition = product.input_value(1).get_node() if product.get_type_name() == "MatMul" else None
        if transposition is None or transposition.get_type_name() != "Transpose":
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
    written here saves 3 to 4 % of the time in fp32.
    """
    from openvino.frontend.onnx import ConversionExtension

    core.add_extension(ConversionExtension("RotaryEmbedding", _rotary))


def _rotary(node: Any) -> list[Any]:
    """Return the output of an operator of our graphs: 4 dimensions, positions, and halves that are not interleaved."""
    from openvino import opset13 as ops

    # Values are `[batch, heads, tokens, features]`, both tables `[positions, rotated / 2]`.
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
