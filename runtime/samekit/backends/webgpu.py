"""What ONNX Runtime's WebGPU provider needs: an adapter, graphs whose nodes it can all run, and checked results."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from samekit.errors import BackendUnavailableError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from samekit.arrays import Array
    from samekit.engine.spec import Direction, EngineSpec

LEAST_DB: Final = {"fp32": 90.0, "fp16": 30.0}
"""How exactly a GPU must compute, as signal-to-noise ratio against the CPU. Two correct fp16 results differ by more."""

# A graph of one Add: `x`, [1, 4], plus itself. The number is the type: 1 is float32, 10 is float16. A test builds both.
_PROBE = (
    b'\x08\x08:A\n\x0e\n\x01x\n\x01x\x12\x01y"\x03Add\x12\x05probeZ\x13\n\x01x\x12\x0e\n\x0c\x08%c\x12\x08\n\x02\x08\x01\n'
    b"\x02\x08\x04b\x13\n\x01y\x12\x0e\n\x0c\x08%c\x12\x08\n\x02\x08\x01\n\x02\x08\x04B\x04\n\x00\x10\x10"
)
_PROBED: Final = {"fp32": (1, np.float32), "fp16": (10, np.float16)}


def check_adapter(open_session: Callable[[bytes], Any], precision: str) -> None:
    """Run one addition on the GPU.

    Args:
        open_session: opens a graph on the WebGPU provider.
        precision: `fp32` or `fp16`.

    Raises:
        BackendUnavailableError: there is no adapter, or it cannot compute in this precision.
    """
    kind, dtype = _PROBED[precision]
    try:
        session = open_session(_PROBE % (kind, kind))
    except Exception as error:  # noqa: BLE001 the runtime's exceptions share no base class
        raise BackendUnavailableError(
            f"WebGPU finds no GPU that it can use ({_cause(error)}); install or update the GPU's driver "
            "(on Linux: Vulkan, with libvulkan1), or choose device cpu"
        ) from None
    try:
        session.run(None, {"x": np.ones((1, 4), dtype)})
    except Exception as error:  # noqa: BLE001
        if precision == "fp16":
            raise BackendUnavailableError(
                "fp16 needs shader-f16, which this GPU or its driver lacks; choose precision fp32"
            ) from None
        raise BackendUnavailableError(
            f"the GPU fails at an addition ({_cause(error)}); update its driver, or choose device cpu"
        ) from None


def check_results(
    spec: EngineSpec, direction: Direction, precision: str, gpu: Callable[[Array], Array], cpu: Callable[[Array], Array]
) -> None:
    """Compare the GPU with the CPU on seeded noise, because drivers differ.

    Raises:
        BackendUnavailableError: the results differ by more than `LEAST_DB` allows.
    """
    shape = spec.input_shape(direction, 1, 4 * spec.alignment)
    array = np.random.default_rng(0).standard_normal(shape, np.float32)
    expected = cpu(array).astype(np.float64)
    error = float(np.square(gpu(array) - expected).sum())
    reached = 10 * np.log10(float(np.square(expected).sum()) / error) if error else np.inf
    # Not `<`, which would accept NaN.
    if not reached >= LEAST_DB[precision]:
        raise BackendUnavailableError(
            f"this GPU and its driver compute the {direction} with an error: {reached:.0f} dB against the CPU, and "
            f"{precision} needs {LEAST_DB[precision]:.0f} dB; update the driver, or choose device cpu"
        )


def _cause(error: Exception) -> str:
    """Return the reason at the end of an error of ONNX Runtime, which begins with names of its source files."""
    return first_line(error).rpartition(" was false. ")[2]


# The provider has a kernel for the Sin of opset 7 only, not for that of opset 22 and later. Its shaders could not be
# used anyway: WGSL allows an error of 2^-11, and Intel's GPUs have 2^-14, which is less than 90 dB. So a function of
# operators that are exact on every GPU takes its place. It subtracts whole turns; the rest r is in -0.5 ... 0.5, and
# sin(2 pi r) = r p(r^2) with an error of 1e-7. The coefficients are a minimax fit, the constant one first.
_SINE: Final = (6.283182621, -41.34142303, 81.59618378, -76.5801010, 41.2053947, -12.2712641)
_DOMAIN: Final = b"samekit"

# Numbers of fields in onnx.proto.
_MODEL_IMPORT, _MODEL_GRAPH, _MODEL_FUNCTIONS = 8, 7, 25
_GRAPH_NODE, _NODE_INPUT, _NODE_OUTPUT, _NODE_TYPE, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 1, 2, 4, 5, 7
_FUNCTION_NAME, _FUNCTION_INPUT, _FUNCTION_OUTPUT, _FUNCTION_NODE, _FUNCTION_IMPORT, _FUNCTION_DOMAIN = (
    1,
    4,
    5,
    7,
    9,
    10,
)


def with_portable_sine(model: bytes) -> bytes:
    """Return an ONNX model in which each node `Sin` calls a function of other operators; see `_SINE`.

    A model without such nodes, or one that is damaged, is returned as it is.
    """
    if _field(_NODE_TYPE, b"Sin") not in model:
        return model
    try:
        parts = list(_fields(memoryview(model)))
        rewritten = [
            _field(number, b"".join(_with_domain(*node) for node in _fields(payload)))
            if number == _MODEL_GRAPH and payload is not None
            else whole
            for number, payload, whole in parts
        ]
    except (IndexError, ValueError):
        return model
    imports = [bytes(payload) for number, payload, _ in parts if number == _MODEL_IMPORT and payload is not None]
    rewritten.append(_field(_MODEL_IMPORT, _field(1, _DOMAIN) + b"\x10\x01"))
    rewritten.append(_field(_MODEL_FUNCTIONS, _sine_function(imports)))
    return b"".join(rewritten)


def _with_domain(number: int, payload: memoryview | None, whole: memoryview) -> bytes | memoryview:
    """Return a field of the graph; a node Sin becomes a call of the function."""
    if number != _GRAPH_NODE or payload is None:
        return whole
    types = [value for field, value, _ in _fields(payload) if field == _NODE_TYPE and value is not None]
    if types != [b"Sin"]:
        return whole
    return _field(_GRAPH_NODE, bytes(payload) + _field(_NODE_DOMAIN, _DOMAIN))


def _sine_function(imports: list[bytes]) -> bytes:
    """Return the function as a message; `imports` are the operator sets of the model."""
    nodes = []

    def node(operator: str, output: str, *inputs: str, attribute: bytes = b"") -> str:
        fields = [_field(_NODE_INPUT, name.encode()) for name in inputs]
        fields += [_field(_NODE_OUTPUT, output.encode()), _field(_NODE_TYPE, operator.encode()), attribute]
        nodes.append(_field(_FUNCTION_NODE, b"".join(fields)))
        return output

    def constant(value: float) -> str:
        # Name, value as a float, type FLOAT.
        attribute = _field(1, b"value_float") + b"\x15" + struct.pack("<f", value) + b"\xa0\x01\x01"
        return node("Constant", f"c{len(nodes)}", attribute=_field(_NODE_ATTRIBUTE, attribute))

    # Half precision has too few digits for it. Name, value 1 (float32), type INT.
    to_float = _field(_NODE_ATTRIBUTE, _field(1, b"to") + b"\x18\x01\xa0\x01\x02")
    turns = node("Mul", "turns", node("Cast", "wide", "x", attribute=to_float), constant(1 / (2 * np.pi)))
    whole = node("Floor", "whole", node("Add", "shifted", turns, constant(0.5)))
    rest = node("Sub", "rest", turns, whole)
    square = node("Mul", "square", rest, rest)
    total = constant(_SINE[-1])
    for power in reversed(range(len(_SINE) - 1)):
        total = node("Add", f"sum{power}", node("Mul", f"product{power}", total, square), constant(_SINE[power]))
    node("CastLike", "y", node("Mul", "sine", rest, total), "x")
    return b"".join(
        [
            *(_field(_FUNCTION_NAME, b"Sin"), _field(_FUNCTION_INPUT, b"x"), _field(_FUNCTION_OUTPUT, b"y")),
            *nodes,
            *(_field(_FUNCTION_IMPORT, payload) for payload in imports),
            _field(_FUNCTION_DOMAIN, _DOMAIN),
        ]
    )


def _field(number: int, payload: bytes) -> bytes:
    """Return a field of a protobuf message that holds bytes."""
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _varint(value: int) -> bytes:
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | None, memoryview]]:
    """Yield the number, the payload (None unless it is bytes) and the whole of each field of a protobuf message.

    Raises:
        IndexError, ValueError: it is no such message.
    """
    position = 0
    while position < len(message):
        start = position
        tag, position = _read_varint(message, position)
        payload = None
        if tag & 7 == 0:
            _, position = _read_varint(message, position)
        elif tag & 7 == 2:
            size, position = _read_varint(message, position)
            payload = message[position : position + size]
            position += size
        else:
            position += {1: 8, 5: 4}.get(tag & 7, len(message) + 1)
        if position > len(message):
            raise ValueError("a field ends after the message")
        yield tag >> 3, payload, message[start:position]


def _read_varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position
