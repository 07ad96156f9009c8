"""What is installed, and what an import of it costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import samekit

ROOT = Path(__file__).parents[1]
PACKAGES = {"samekit": ROOT / "runtime" / "samekit", "samekit_export": ROOT / "export" / "samekit_export"}
# None of these may be imported before it is used.
HEAVY = ("torch", "onnx", "onnxscript", "onnxruntime", "tensorrt", "soundfile", "safetensors", "huggingface_hub")


def in_new_process(code, *arguments):
    """What a script prints as JSON."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel, open."""
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.iterdir()
    with zipfile.ZipFile(path) as file:
        yield file


def test_wheel_holds_both_packages_and_nothing_else(wheel):
    assert wheel.testzip() is None
    names = {name for name in wheel.namelist() if not name.endswith("/")}
    information = f"samekit-{samekit.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {*PACKAGES, information}
    for package, folder in PACKAGES.items():
        files = {path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
        expected = {f"{package}/{path.relative_to(folder).as_posix()}" for path in files}
        assert {name for name in names if name.startswith(f"{package}/")} == expected


def test_wheel_says_what_it_is(wheel):
    information = f"samekit-{samekit.__version__}.dist-info"
    metadata = wheel.read(f"{information}/METADATA").decode()
    assert "\nName: samekit\n" in metadata
    assert "\nLicense-Expression: MIT\n" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    assert sorted(line.split()[1].split(">")[0] for line in required) == ["click", "numpy", "soundfile", "tqdm"]
    entries = wheel.read(f"{information}/entry_points.txt").decode()
    assert "samekit = samekit.cli.main:main" in entries
    assert "[samekit.backends]\ntorch = " in entries
    assert "[samekit.commands]\nexport = " in entries
    assert f"{information}/licenses/LICENSE" in wheel.namelist()


@pytest.mark.parametrize(
    "module", ["samekit", "samekit.cli.main", "samekit.errors", "samekit.engine.spec", "samekit.engine.folder"]
)
def test_import_is_light(module):
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    assert {name.split(".")[0] for name in in_new_process(code)} & {*HEAVY, "samekit_export"} == set()


def test_onnx_runtime_needs_no_pytorch(engine_of):
    code = """
import json, sys
import numpy as np
from samekit import AutoencoderModel
with AutoencoderModel.from_pretrained(sys.argv[1], "cpu", backend="onnxruntime") as model:
    latents = model.encode(np.zeros((2, 5000), np.float32), 48_000)
    audio = model.decode(latents)
print(json.dumps([latents.shape, audio.shape, sorted(sys.modules)]))
"""
    latents, audio, modules = in_new_process(code, engine_of("tiny-s").folder)
    assert (latents, audio) == ([1, 32, 2], [1, 2, 8192])
    assert {name.split(".")[0] for name in modules} & {"torch", "onnx", "samekit_export", "safetensors"} == set()


def test_all_is_what_there_is():
    (checked,) = [
        node
        for node in ast.parse((PACKAGES["samekit"] / "__init__.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    imported = {alias.asname or alias.name for node in checked.body for alias in node.names}
    assert samekit.__all__ == sorted(imported | {"__version__"})
    for name in samekit.__all__:
        value = getattr(samekit, name)
        assert name in ("__version__", getattr(value, "__name__", None))
    with pytest.raises(AttributeError, match="no attribute 'Autoencoder'"):
        _ = samekit.Autoencoder


def test_star_import():
    code = """
import json
from samekit import *
print(json.dumps(sorted(name for name in dir() if name[:2] != "__" or name == "__version__")))
"""
    assert set(in_new_process(code)) - {"json"} == set(samekit.__all__)
