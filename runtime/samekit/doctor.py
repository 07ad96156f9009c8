"""Report for `samekit doctor`: installed packages, GPUs and engines, and what each missing package would enable."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import soundfile

from samekit import __version__
from samekit.audio import INSTALL_AV
from samekit.backends.base import has_driver
from samekit.backends.cpu import available_cpus
from samekit.backends.onnxruntime import int8_saturates
from samekit.engine.builds import describe_builds
from samekit.engine.folder import PACKAGED_ENGINES, Engine, engine_roots
from samekit.engine.spec import SPEC_FILE
from samekit.errors import SamekitError
from samekit.packages import INSTALL_EXPORT, import_installed
from samekit.tensorrt.flavours import INSTALL, builder_versions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


@dataclass(frozen=True)
class Part:
    """An optional package."""

    module: str
    enables: str
    """What samekit uses it for."""
    install: str
    """The command that installs it."""
    needs_gpu: bool = False


PARTS = (
    Part("onnxruntime", "engines on any CPU, and on NVIDIA GPUs with onnxruntime-gpu", "pip install 'samekit[cpu]'"),
    Part("tensorrt", "engines compiled for the GPU at hand", INSTALL["tensorrt"], needs_gpu=True),
    Part("tensorrt_rtx", "engines compiled without a GPU, for many", INSTALL["tensorrt_rtx"]),
    Part("torch", "exporting, checkpoints without an engine, and GPU memory for TensorRT", INSTALL_EXPORT),
    Part("onnx", "exporting", INSTALL_EXPORT),
    Part("onnxscript", "exporting", INSTALL_EXPORT),
    Part("safetensors", "reading checkpoints", INSTALL_EXPORT),
    Part("huggingface_hub", "published weights by name", INSTALL_EXPORT),
    Part("matplotlib", "pictures in reports", "pip install 'samekit[report]'"),
    Part("jinja2", "reports", "pip install 'samekit[report]'"),
    Part("ray", "datasets on a cluster", "pip install 'samekit[ray]'"),
    Part("fsspec", "datasets written to s3://, gs:// and the like", "pip install 'samekit[ray]'"),
    Part("av", "M4A, WMA, Matroska or sound of videos", INSTALL_AV),
    Part("tritonclient", "example client of a Triton server", "pip install 'samekit[triton]'"),
)
"""The optional packages, most important first."""

_GPU_QUERY = ("--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader")


def examine() -> Iterator[str]:
    """Yield the lines of the report."""
    yield f"samekit {__version__}, Python {platform.python_version()}, {platform.platform()}, {available_cpus()} cores"
    yield "packages"
    yield (
        f"  numpy {version('numpy')}, soundfile {version('soundfile')} (libsndfile {soundfile.__libsndfile_version__})"
    )
    yield from (f"  {_describe(part)}" for part in PARTS)
    yield "GPUs"
    yield from (f"  {line}" for line in _gpus())
    yield "engines"
    versions = builder_versions()
    packaged = [PACKAGED_ENGINES] if PACKAGED_ENGINES.is_dir() else []
    for root in (*engine_roots(), *packaged):
        yield from (f"  {line}" for line in _engines(root, versions))


def _describe(part: Part) -> str:
    """Return the version and capabilities of a package, or what is missing without it."""
    try:
        module: Any = import_installed(part.module)
    except ModuleNotFoundError as error:
        if error.name != part.module:
            return f"{part.module} cannot be imported ({error}): no {part.enables}; run: {part.install}"
        cure = "it needs an NVIDIA GPU" if part.needs_gpu and not has_driver() else f"run: {part.install}"
        return f"{part.module} is not installed: no {part.enables}; {cure}"
    except Exception as error:  # noqa: BLE001 a package whose shared libraries are missing can raise any error
        return f"{part.module} cannot be imported ({error}): no {part.enables}; reinstall it: {part.install}"
    if part.module == "onnxruntime":
        shown = f"onnxruntime {module.__version__}: {', '.join(module.get_available_providers())}"
        kind = "encodes only, because this processor has no VNNI instructions" if int8_saturates(module) else "runs"
        return f"{shown}; int8 {kind}"
    if part.module == "torch":
        return f"torch {module.__version__}: {'CUDA' if module.cuda.is_available() else 'no CUDA device'}"
    return f"{part.module} {_version(module)}"


def _version(module: Any) -> str:
    """Return the version of a package, which may be unknown."""
    try:
        return str(module.__version__) if hasattr(module, "__version__") else version(module.__name__)
    except PackageNotFoundError:
        return "of unknown version"


def _gpus() -> Iterator[str]:
    """Yield a line for each GPU, or the reason why there is none."""
    if not has_driver():
        yield "none: no NVIDIA driver"
        return
    tool = shutil.which("nvidia-smi")
    if tool is None:
        yield "an NVIDIA driver, but no nvidia-smi that lists GPUs"
        return
    try:
        done = subprocess.run([tool, *_GPU_QUERY], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        yield f"an NVIDIA driver, but nvidia-smi failed ({error})"
        return
    yield from done.stdout.splitlines() or ["none found by the driver"]


def _engines(root: Path, versions: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each engine folder under `root`, and for each of its TensorRT builds."""
    folders = sorted(path.parent for path in root.glob(f"*/{SPEC_FILE}"))
    if not folders:
        yield f"none in {root}"
    for folder in folders:
        try:
            engine = Engine.load(folder)
            for precision in engine.spec.graphs:
                engine.check(precision)
        except SamekitError as error:
            yield f"DAMAGED: {error}"
            continue
        yield f"{folder}: {', '.join(engine.spec.graphs)}{', random weights' * engine.spec.is_random}"
        for line in describe_builds(engine, versions):
            yield f"  tensorrt {line}"
