"""Execution providers of ONNX Runtime: built-in ones, and plugins, which are packages `onnxruntime-ep-*`.

A plugin is a shared library that ONNX Runtime loads. Its Python package names the library and the providers in it, as
ONNX Runtime's guide on packages of plugins asks. A session gets a plugin's provider through a device that it offers.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from samekit.errors import BackendError, BackendUnavailableError, first_line
from samekit.packages import import_package, install_command

if TYPE_CHECKING:
    from collections.abc import Iterator

CPU_PROVIDER: Final = "CPUExecutionProvider"
"""ONNX Runtime's name for the CPU."""
CUDA_PROVIDER: Final = "CUDAExecutionProvider"
"""Its name for NVIDIA GPUs."""
TENSORRT_PROVIDER: Final = "TensorrtExecutionProvider"
"""Its name for TensorRT, which compiles engines when a graph is first run."""
WEBGPU_PROVIDER: Final = "WebGpuExecutionProvider"
"""Its name for any GPU with Vulkan, Metal or Direct3D 12."""

_PREFIX: Final = "onnxruntime-ep-"

# ONNX Runtime loads a library once per process, and fails if it is registered again.
_registering = threading.Lock()
# The names of the providers in each loaded library, by its path.
_loaded: dict[str, list[str]] = {}


@dataclass(frozen=True)
class Plugin:
    """An installed package with a plugin."""

    package: str
    """Its name, such as `onnxruntime-ep-webgpu`."""
    version: str
    module: str
    """What Python imports. It is not always like the package's name: NVIDIA's packages end in the version of CUDA."""

    def names(self) -> list[str]:
        """Return the names of its providers; this imports the package, and raises BackendError if that fails."""
        return [str(name) for name in self._call("get_ep_names")]

    def devices(self, runtime: Any) -> list[Any]:
        """Load the library, and return the devices that it offers, as ONNX Runtime describes them.

        Args:
            runtime: the module `onnxruntime`.

        Raises:
            BackendError: the package or its library cannot be loaded.
        """
        path = str(self._call("get_library_path"))
        with _registering:
            if path not in _loaded:
                try:
                    runtime.register_execution_provider_library(self.module, path)
                except Exception as error:  # noqa: BLE001 the runtime's exceptions share no base class
                    raise BackendError(
                        f"{self.package} {self.version} does not work with ONNX Runtime {runtime.__version__} "
                        f"({first_line(error)}); update both, or uninstall {self.package}"
                    ) from None
                _loaded[path] = self.names()
        names = {_key(name) for name in self.names()}
        return [device for device in runtime.get_ep_devices() if _key(device.ep_name) in names]

    def _call(self, function: str) -> Any:
        module = import_package(self.module, f"pip install {self.package}")
        try:
            return getattr(module, function)()
        except Exception as error:  # noqa: BLE001 code of another project
            raise BackendError(
                f"{self.package} {self.version} is no working plugin of ONNX Runtime ({first_line(error)}); "
                f"update or uninstall it"
            ) from None


def installed_plugins() -> Iterator[Plugin]:
    """Yield the installed packages with plugins, but not those that only require others and hold no module."""
    from importlib.metadata import distributions

    seen = set()
    for found in distributions():
        package = re.sub(r"[-_.]+", "-", found.metadata["Name"] or "").lower()
        if not package.startswith(_PREFIX):
            continue
        module = next(
            (path.parts[0] for path in found.files or () if len(path.parts) == 2 and path.name == "__init__.py"), None
        )
        # The first on the search path is the one that Python imports.
        if module and module not in seen:
            seen.add(module)
            yield Plugin(package, found.version, module)


def is_built_in(runtime: Any, provider: str) -> bool:
    """Return whether the build of ONNX Runtime has a provider, which also lists those of loaded plugins."""
    return provider in runtime.get_available_providers() and not any(provider in names for names in _loaded.values())


def plugin_device(runtime: Any, provider: str, number: int) -> Any:
    """Return the device of a plugin's provider.

    Args:
        runtime: the module `onnxruntime`.
        provider: name of the provider; NVIDIA's plugin is found by both spellings, see `_key`.
        number: which of its devices, from 0.

    Raises:
        BackendUnavailableError: no installed plugin has this provider, or it offers no such device here.
        BackendError: the plugin cannot be loaded.
    """
    offered = []
    for plugin in installed_plugins():
        names = plugin.names()
        offered += names
        if _key(provider) not in map(_key, names):
            continue
        devices = plugin.devices(runtime)
        if not devices:
            raise BackendUnavailableError(
                f"{plugin.package} {plugin.version} finds no device for {provider} on this machine; install the "
                "driver of the GPU, or choose another provider"
            )
        if number >= len(devices):
            raise BackendUnavailableError(
                f"{provider} has no device {number} here; pass device_id from 0 to {len(devices) - 1} "
                "(samekit doctor lists the devices)"
            )
        return devices[number]
    known = dict.fromkeys([*runtime.get_available_providers(), *offered])
    cure = "install the package onnxruntime-ep-... that has it"
    if provider == WEBGPU_PROVIDER:
        cure = f"run: {install_command('webgpu')}"
    elif provider in (CUDA_PROVIDER, TENSORRT_PROVIDER):
        cure = "run: pip uninstall onnxruntime, then pip install onnxruntime-gpu"
    raise BackendUnavailableError(
        f"this onnxruntime has no {provider} (it has {', '.join(known)}); {cure}, or choose another provider"
    )


def describe_device(device: Any) -> str:
    """Return the type and the vendor of a device, such as `GPU of NVIDIA`."""
    hardware = device.device
    return f"{hardware.type.name} of {hardware.vendor or device.ep_vendor}"


def _key(name: str) -> str:
    """Return what two spellings of a provider share.

    NVIDIA's provider is called NvTensorRTRTXExecutionProvider in ONNX Runtime and nv_tensorrt_rtx in its plugin.
    """
    return name.lower().replace("_", "").removesuffix("executionprovider")
