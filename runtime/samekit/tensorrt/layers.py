"""Summarise the layers of a compiled engine, as TensorRT's engine inspector reports them."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from samekit.errors import BackendError, StaleEngineError
from samekit.tensorrt.flavours import make_logger

if TYPE_CHECKING:
    from samekit.engine.builds import Build
    from samekit.engine.spec import Direction

# What the descriptions of formats call each type, for example "Row major linear FP16 format" or "Half".
_TYPES: Final = {"fp32": r"FP32|Float(?!\d)", "fp16": r"FP16|Half", "bf16": r"BF16|BFloat16"}
# Names of kernels for fused multi-head attention, such as `_gemm_mha_v2` and `fmha_v2`.
_ATTENTION: Final = re.compile(r"mha|flash|fused_?attention", re.IGNORECASE)


@dataclass(frozen=True)
class Layers:
    """The layers of one engine."""

    count: int
    kinds: dict[str, int]
    """Kind of layer, as TensorRT names it -> how many."""
    precisions: dict[str, int]
    """`fp32`, `fp16`, `bf16` or `other` -> layers whose first output is of this type."""
    attention: int
    """Layers that compute an attention in one kernel."""

    def __str__(self) -> str:
        def listed(counts: dict[str, int]) -> str:
            return ", ".join(f"{n} {name}" for name, n in counts.items())

        fused = f"fused in {self.attention} layers" if self.attention else "not fused"
        return f"{self.count} layers ({listed(self.kinds)}); outputs {listed(self.precisions)}; attention {fused}"


def layers_of(build: Build, direction: Direction, module: Any) -> Layers:
    """Return a summary of an engine, which must run on this machine's GPU.

    Raises:
        StaleEngineError: this version of TensorRT cannot load the engine, or its file has changed.
        BackendError: the engine does not describe its layers.
    """
    messages: list[str] = []
    logger = make_logger(module, lambda _, message: messages.append(message))
    runtime = module.Runtime(logger)
    runtime.engine_host_code_allowed = build.fingerprint.options.later_versions
    engine = runtime.deserialize_cuda_engine(build.read(direction))
    path = build.folder / build.engines[direction].file
    if engine is None:
        reason = messages[-1].strip() if messages else "no reason given"
        raise StaleEngineError(f"{path}: {module.__name__} cannot load it ({reason}); use a machine with its GPU")
    text = engine.create_engine_inspector().get_engine_information(module.LayerInformationFormat.JSON)
    try:
        return summary(json.loads(text)["Layers"])
    except (ValueError, LookupError, TypeError, AttributeError):
        raise BackendError(f"{path}: does not describe its layers; build it again") from None


def summary(layers: list[dict[str, Any]]) -> Layers:
    """Summarise the list `Layers` of the inspector's JSON; raise an error of Python if it has another form."""
    kinds, precisions, attention = Counter[str](), Counter[str](), 0
    for layer in layers:
        kinds[layer["LayerType"]] += 1
        outputs = layer.get("Outputs") or [{}]
        described = str(outputs[0].get("Format/Datatype", ""))
        precisions[next((name for name, words in _TYPES.items() if re.search(words, described)), "other")] += 1
        attention += any(_ATTENTION.search(str(layer.get(key, ""))) is not None for key in ("Name", "TacticName"))
    return Layers(len(layers), dict(kinds.most_common()), dict(precisions.most_common()), attention)
