"""Which versions of the packages for GPUs go together."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

UNKNOWN_FROM: Final = {"tensorrt": 12, "tensorrt_rtx": 2, "onnxruntime": 2}
"""Package -> first major version that samekit has not been tried with; `pyproject.toml` excludes it."""

# The first ONNX Runtime whose TensorRT provider works with TensorRT 11.
_ONNXRUNTIME_FOR_11: Final = (1, 27)
_CUDA_MAJORS: Final = (12, 13)


def conflicts(modules: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield packages and what does not fit; `modules` are those that can be imported, by name."""
    numbers = {name: _numbers(getattr(module, "__version__", "")) for name, module in modules.items()}
    for name, first in UNKNOWN_FROM.items():
        if numbers.get(name, ())[:1] >= (first,):
            yield name, f"is newer than the versions before {first}, with which samekit was made"
    if numbers.get("tensorrt", ())[:1] >= (11,) and () < numbers.get("onnxruntime", ()) < _ONNXRUNTIME_FOR_11:
        yield "onnxruntime", "is older than 1.27, which its TensorRT provider needs with TensorRT 11"
    cuda = {name: major for name in modules if (major := _cuda_major(name, modules[name])) is not None}
    # PyTorch allocates the memory, so the others should use its CUDA.
    for name, major in cuda.items():
        if "torch" in cuda and major != cuda["torch"]:
            yield name, f"is built for CUDA {major}, PyTorch for CUDA {cuda['torch']}; install builds for the same one"


def _cuda_major(name: str, module: Any) -> int | None:
    """Return the major version of CUDA that a package was built for; None if it uses none or does not tell."""
    if name == "torch":
        found = module.version.cuda
    elif name == "onnxruntime":
        found = getattr(module, "cuda_version", None)
    elif name in UNKNOWN_FROM:
        distribution = name.replace("_", "-")
        found = next((str(major) for major in _CUDA_MAJORS if _is_installed(f"{distribution}-cu{major}")), None)
    else:
        return None
    return (_numbers(found) or (None,))[0]


def _is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def _numbers(text: Any) -> tuple[int, ...]:
    """Return the first two numbers of a version; none if it has another form."""
    match = re.match(r"(\d+)(?:\.(\d+))?", str(text or ""), re.ASCII)
    return tuple(int(part) for part in match.groups() if part is not None) if match else ()
