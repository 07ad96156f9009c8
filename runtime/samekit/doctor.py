"""Report for `samekit doctor`: the machine, installed packages, GPUs, engines, and what can be done with them."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import soundfile

from samekit import __version__
from samekit.audio import INSTALL_AV
from samekit.backends.base import has_driver
from samekit.backends.cpu import available_cpus, fast_precisions, processor
from samekit.backends.onnxruntime import int8_saturates
from samekit.backends.providers import CUDA_PROVIDER, describe_device, installed_plugins
from samekit.engine.builds import describe_builds
from samekit.engine.folder import PACKAGED_ENGINES, Engine, engine_roots
from samekit.engine.hub import INSTALL_HUB
from samekit.engine.spec import SPEC_FILE
from samekit.errors import SamekitError
from samekit.packages import INSTALL_EXPORT, import_installed, import_onnxruntime, install_command
from samekit.tensorrt.flavours import FLAVOURS, INSTALL, builder_versions
from samekit.tensorrt.versions import conflicts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True)
class Part:
    """An optional package."""

    module: str
    enables: str
    """What samekit uses it for."""
    install: str
    """The command that installs it."""
    needs_gpu: bool = False
    """Whether a machine without an NVIDIA GPU can do without it."""


PARTS = (
    Part("onnxruntime", "engines on any CPU, and on NVIDIA GPUs with onnxruntime-gpu", install_command("cpu")),
    Part("openvino", "bf16 on CPUs, or models on Intel GPUs", install_command("openvino")),
    Part("tensorrt", "engines compiled for the GPU at hand", INSTALL["tensorrt"], needs_gpu=True),
    Part("tensorrt_rtx", "engines compiled for many GPUs", INSTALL["tensorrt_rtx"], needs_gpu=True),
    Part("torch", "exporting, checkpoints without an engine, and GPU memory for TensorRT", INSTALL_EXPORT),
    Part("onnx", "exporting", INSTALL_EXPORT),
    Part("onnxscript", "exporting", INSTALL_EXPORT),
    Part("safetensors", "reading checkpoints", INSTALL_EXPORT),
    Part("huggingface_hub", "engines and published weights by name", INSTALL_HUB),
    Part("matplotlib", "pictures in reports", install_command("report")),
    Part("jinja2", "reports", install_command("report")),
    Part("ray", "datasets on a cluster", install_command("ray")),
    Part("fsspec", "datasets written to s3://, gs:// and the like", install_command("ray")),
    Part("av", "M4A, WMA, Matroska or sound of videos", INSTALL_AV),
    Part("tritonclient", "example client of a Triton server", install_command("triton")),
)
"""The optional packages, most important first."""

_EXPORTING: Final = ("torch", "onnx", "onnxscript", "safetensors")
_GPU_QUERY = ("--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader")
# Limits of the memory of a container, of both versions of control groups.
_MEMORY_LIMITS: Final = ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")


def examine() -> Iterator[tuple[str, Any]]:
    """Yield the sections of the report as names and values that JSON can hold.

    `versions`: samekit, python, platform. `processor`: name, cores, instructions, fast_precisions. `memory`: bytes, or
    None if unknown. `disk`: folder and free bytes. `packages`: for each, its version, or None with the problem and the
    command that installs it; also `notes`. `gpus`: lines. `engines`: folder, precisions, random, damaged, tensorrt.
    `verdict`: one sentence.
    """
    name, instructions = processor()
    yield "versions", {"samekit": __version__, "python": platform.python_version(), "platform": platform.platform()}
    facts = {"cores": available_cpus(), "instructions": instructions, "fast_precisions": fast_precisions(instructions)}
    yield "processor", {"name": name, **facts}
    yield "memory", memory()
    yield "disk", _disk()
    packages = {name: _package(version(name), "") for name in ("numpy", "soundfile")}
    packages["soundfile"]["notes"] = f"libsndfile {soundfile.__libsndfile_version__}"
    packages |= {part.module: _examine(part) for part in PARTS}
    installed = {name: sys.modules[name] for name, package in packages.items() if package["version"] is not None}
    for name, problem in conflicts(installed):
        packages[name]["notes"] = "; ".join(filter(None, [packages[name]["notes"], f"NOTE: {problem}"]))
    packages |= dict(_plugins())
    yield "packages", packages
    yield "gpus", list(_gpus())
    versions = builder_versions()
    packaged = [PACKAGED_ENGINES] if PACKAGED_ENGINES.is_dir() else []
    engines = [engine for root in (*engine_roots(), *packaged) for engine in _engines(root, versions)]
    yield "engines", engines
    yield "verdict", _verdict(packages, engines)


def describe(section: str, value: Any) -> Iterator[str]:
    """Yield the lines of a section for people."""
    if section == "versions":
        yield f"samekit {value['samekit']}, Python {value['python']}, {value['platform']}"
    elif section == "processor":
        cores = f"{value['cores']} core{'s' * (value['cores'] > 1)}"
        fast = f"; fast in {', '.join(value['fast_precisions'])}" if value["instructions"] else ""
        sets = " ".join(value["instructions"]) or "unknown instruction sets"
        yield f"processor: {value['name']}, {cores}, {sets}{fast}"
    elif section == "memory":
        yield "memory: unknown" if value is None else f"memory: {value / 1e9:.1f} GB"
    elif section == "disk":
        yield f"disk: {value['free_bytes'] / 1e9:.1f} GB free in {value['folder']}"
    elif section == "packages":
        yield section
        for name, package in value.items():
            if package["version"] is not None:
                yield f"  {name} {package['version']}{': ' * bool(package['notes'])}{package['notes']}"
            elif package["problem"]:
                yield f"  {name} {package['problem']}; {package['notes']}"
    elif section in ("gpus", "engines"):
        yield section.replace("gpus", "GPUs")
        yield from (f"  {line}" for line in (value if section == "gpus" else _describe_engines(value)))
    else:
        yield f"{section}: {value}"


def memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory that this machine or container has; None if the system does not tell."""
    if sys.platform == "win32":
        return None
    try:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
    for name in _MEMORY_LIMITS:
        # A file that is missing or holds "max" limits nothing.
        with suppress(OSError, ValueError):
            found = min(found, int((root / name).read_text(encoding="ascii")))
    return found


def _disk() -> dict[str, Any]:
    folder = os.getcwd()
    return {"folder": folder, "free_bytes": shutil.disk_usage(folder).free}


def _package(found: str | None, notes: str, problem: str | None = None, install: str | None = None) -> dict[str, Any]:
    return {"version": found, "problem": problem, "install": install, "notes": notes}


def _examine(part: Part) -> dict[str, Any]:
    """Return the version and capabilities of a package, or what is missing without it."""
    try:
        module: Any = import_installed(part.module)
    except ModuleNotFoundError as error:
        if error.name == part.module:
            if part.needs_gpu and not has_driver():
                return _package(None, "")
            problem, cure = "is not installed", f"run: {part.install}"
        else:
            problem, cure = f"cannot be imported ({error})", f"run: {part.install}"
    except Exception as error:  # noqa: BLE001 a package whose shared libraries are missing can raise any error
        problem, cure = f"cannot be imported ({error})", f"reinstall it: {part.install}"
    else:
        return _package(_version(module), _capabilities(part.module, module))
    return _package(None, cure, f"{problem}: no {part.enables}", part.install)


def _plugins() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the packages with plugins of ONNX Runtime: their providers, and the devices that these offer here."""
    try:
        runtime = import_onnxruntime()
    except SamekitError:
        return
    for plugin in installed_plugins():
        try:
            names, devices = plugin.names(), plugin.devices(runtime)
        except SamekitError as error:
            problem, _, cure = str(error).partition("; ")
            problem = problem.removeprefix(f"{plugin.package} ")
            yield plugin.package, _package(None, cure, problem, f"pip install --upgrade {plugin.package}")
            continue
        listed = ", ".join(f"{number}: {describe_device(device)}" for number, device in enumerate(devices))
        yield (
            plugin.package,
            _package(plugin.version, f"{', '.join(names)}; devices {listed or 'none on this machine'}"),
        )


def _capabilities(name: str, module: Any) -> str:
    """Return what an installed package can do on this machine."""
    if name == "onnxruntime":
        kind = "encodes only, because this processor has no VNNI instructions" if int8_saturates(module) else "runs"
        return f"{', '.join(module.get_available_providers())}; int8 {kind}"
    if name == "torch":
        return "CUDA" if module.cuda.is_available() else "no CUDA device"
    return ""


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


def _engines(root: Path, versions: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the facts of each engine folder under `root`."""
    for folder in sorted(path.parent for path in root.glob(f"*/{SPEC_FILE}")):
        try:
            engine = Engine.load(folder)
            for precision in engine.spec.graphs:
                engine.check(precision)
        except SamekitError as error:
            yield {"folder": str(folder), "precisions": [], "random": False, "damaged": str(error), "tensorrt": []}
            continue
        yield {
            "folder": str(folder),
            "precisions": list(engine.spec.graphs),
            "random": engine.spec.is_random,
            "damaged": None,
            "tensorrt": list(describe_builds(engine, versions)),
        }


def _describe_engines(engines: list[dict[str, Any]]) -> Iterator[str]:
    for root in engine_roots():
        if not any(Path(engine["folder"]).parent == root for engine in engines):
            yield f"none in {root}"
    for engine in engines:
        if engine["damaged"]:
            yield f"DAMAGED: {engine['damaged']}"
            continue
        yield f"{engine['folder']}: {', '.join(engine['precisions'])}{', random weights' * engine['random']}"
        for line in engine["tensorrt"]:
            yield f"  tensorrt {line}"


def _verdict(packages: Mapping[str, Mapping[str, Any]], engines: list[dict[str, Any]]) -> str:
    """Return one sentence about what can be done on this machine, and what to do next."""
    # Package -> what it can do here.
    has = {name: package["notes"] for name, package in packages.items() if package["version"] is not None}
    if not has.keys() & {"onnxruntime", "torch"}:
        return f"nothing can be run yet; run: {install_command('gpu' if has_driver() else 'cpu')}"
    on_gpu = has_driver() and (has.get("torch") == "CUDA" or CUDA_PROVIDER in has.get("onnxruntime", ""))
    compiled = ", with TensorRT" * bool(on_gpu and has.keys() & set(FLAVOURS))
    device = f"the GPU{compiled}" if on_gpu else "the CPU"
    exports = has.keys() >= {*_EXPORTING, "onnxruntime"}
    whole = [engine for engine in engines if not engine["damaged"]]
    names = [f"{Path(engine['folder']).name}{' (random weights)' * engine['random']}" for engine in whole]
    what = f"you can encode and decode on {device}{' and export models' * exports}"
    if names:
        return f"{what}; ready to use: {', '.join(dict.fromkeys(names))}"
    return f"{what}; there is no engine yet, {'run: samekit export same-s' if exports else 'copy one to this machine'}"
