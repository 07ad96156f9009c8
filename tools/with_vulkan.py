"""Run a command with a Vulkan driver that WebGPU can use: the machine's own one, or SwiftShader from Debian's chromium.

    python tools/with_vulkan.py FOLDER COMMAND...

SwiftShader computes on the CPU. If it is not installed, the package is downloaded by `apt-get download` and unpacked
into FOLDER, which needs no root. The exit status is that of the command, or 1 if there is no driver.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

INSTALLED = Path("/usr/lib/chromium")
DRIVER = "vk_swiftshader_icd.json"
# ONNX Runtime's plugin offers itself without a GPU only if this is set.
SOFTWARE = {"ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER": "1"}
# This program tries the driver in another process, because a broken driver can end it.
PROBE = "--probe"


def probe() -> None:
    """Compute something on the GPU; raises an error if that is impossible."""
    import onnxruntime

    from samekit.backends.providers import WEBGPU_PROVIDER, is_built_in, plugin_device
    from samekit.backends.webgpu import check_adapter

    device = None if is_built_in(onnxruntime, WEBGPU_PROVIDER) else plugin_device(onnxruntime, WEBGPU_PROVIDER, 0)

    def open_session(graph: bytes) -> object:
        options = onnxruntime.SessionOptions()
        if device is None:
            return onnxruntime.InferenceSession(graph, options, providers=[WEBGPU_PROVIDER], enable_fallback=0)
        options.add_provider_for_devices([device], {})
        return onnxruntime.InferenceSession(graph, options)

    check_adapter(open_session, "fp32")


def works(environment: dict[str, str]) -> bool:
    """Return whether WebGPU works with these variables."""
    done = subprocess.run([sys.executable, __file__, PROBE], env=environment, capture_output=True, check=False)
    return done.returncode == 0


def swiftshader(folder: Path) -> Path:
    """Return a folder with SwiftShader, which is `folder` if it has to be downloaded."""
    if (INSTALLED / DRIVER).is_file():
        return INSTALLED
    unpacked = folder / "usr/lib/chromium"
    if not (unpacked / DRIVER).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        print("downloading SwiftShader in Debian's package chromium: 80 MB", flush=True)
        subprocess.run(["apt-get", "download", "--quiet", "chromium"], cwd=folder, check=True)
        for package in folder.glob("chromium_*.deb"):
            subprocess.run(["dpkg", "-x", package.name, "."], cwd=folder, check=True)
            package.unlink()
    return unpacked


def has_loader() -> bool:
    """Return whether the system has Vulkan's loader."""
    try:
        ctypes.CDLL("libvulkan.so.1")
    except OSError:
        return False
    return True


def environment(folder: Path) -> dict[str, str]:
    """Return the variables with which WebGPU works.

    Raises:
        RuntimeError: it does not.
        OSError, subprocess.SubprocessError: SwiftShader cannot be downloaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Dawn, which implements WebGPU, asks for this variable.
    variables = {"XDG_RUNTIME_DIR": str(folder)} | dict(os.environ)
    if works(variables):
        print("WebGPU uses the Vulkan driver of this machine", flush=True)
        return variables
    found = swiftshader(folder)
    # Old loaders read the second name.
    variables |= SOFTWARE | dict.fromkeys(("VK_DRIVER_FILES", "VK_ICD_FILENAMES"), str(found / DRIVER))
    if not has_loader():
        # The package has a loader too.
        variables["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(found), os.environ.get("LD_LIBRARY_PATH")]))
    if not works(variables):
        raise RuntimeError(f"WebGPU does not work with {found / DRIVER}")
    print(f"WebGPU computes on the CPU, by {found / DRIVER}", flush=True)
    return variables


if __name__ == "__main__":
    if sys.argv[1:] == [PROBE]:
        probe()
        sys.exit()
    try:
        variables = environment(Path(sys.argv[1]).resolve())
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        sys.exit(f"no Vulkan driver: {error}")
    os.execvpe(sys.argv[2], sys.argv[2:], variables)  # noqa: S606 as S603, which the project allows
