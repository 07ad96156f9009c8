"""`samekit doctor`: it lists packages, features whose packages are missing, engines and GPUs."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import psutil
import pytest
import torch
from click.testing import CliRunner

import samekit
from samekit import doctor
from samekit.backends.cpu import available_cpus
from samekit.cli.main import main
from samekit.errors import BackendUnavailableError
from samekit.packages import INSTALL_EXPORT, import_package, install_command
from samekit.tensorrt.versions import UNKNOWN_FROM, conflicts


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty working folder and cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAMEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def lines(*options):
    """Return the lines that `samekit doctor` prints."""
    result = CliRunner().invoke(main, ["doctor", *options])
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


def test_machine_and_verdict(home, engine_of):
    """Linux and Python describe the machine in other ways than samekit, which must agree."""
    assert lines()[-1].endswith("and export models; there is no engine yet, run: samekit export same-s")
    shutil.copytree(engine_of("tiny-s").folder, home / "engines" / "tiny-s")
    shown = lines()
    assert shown[-1].startswith("verdict: you can encode and decode on ")
    assert shown[-1].endswith("; ready to use: tiny-s (random weights)")
    assert any(line.startswith("processor: ") and f"{available_cpus()} core" in line for line in shown)
    (size,) = (float(line.split()[1]) for line in shown if line.startswith("memory: "))
    assert 0 < size <= psutil.virtual_memory().total / 1e9 + 0.1
    (free,) = (float(line.split()[1]) for line in shown if line.startswith("disk: "))
    assert free == pytest.approx(shutil.disk_usage(home).free / 1e9, abs=2)


def test_json(home, engine_of):
    shutil.copytree(engine_of("tiny-s").folder, home / "engines" / "tiny-s")
    (line,) = lines("--json")
    found = json.loads(line)
    names = ["versions", "processor", "memory", "disk", "packages", "gpus", "engines", "verdict"]
    assert list(found) == names
    assert found["packages"]["onnxruntime"]["version"] == onnxruntime.__version__
    (engine,) = found["engines"]
    assert engine == {
        "folder": "engines/tiny-s",
        "precisions": ["fp32"],
        "random": True,
        "damaged": None,
        "tensorrt": [],
    }


@pytest.mark.usefixtures("home")
def test_verdict_without_a_runtime(monkeypatch):
    real = importlib.import_module

    def without(name, *arguments):
        if name in ("onnxruntime", "torch"):
            raise ModuleNotFoundError(name, name=name)
        return real(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", without)
    monkeypatch.setattr(doctor, "has_driver", lambda: False)
    assert lines()[-1] == f"verdict: nothing can be run yet; run: {install_command('cpu')}"


def test_memory_of_a_container(tmp_path):
    """`memory.max` holds a number of bytes or "max", see cgroup-v2.rst of Linux."""
    whole = doctor.memory(tmp_path)
    assert whole == pytest.approx(psutil.virtual_memory().total, rel=0.01)
    folder = tmp_path / "sys" / "fs" / "cgroup"
    folder.mkdir(parents=True)
    for text, expected in (("max\n", whole), ("1073741824\n", 2**30)):
        (folder / "memory.max").write_text(text)
        assert doctor.memory(tmp_path) == expected


def test_versions_and_providers(home):
    shown = lines()
    assert shown[0].startswith(f"samekit {samekit.__version__}, Python ")
    providers = ", ".join(onnxruntime.get_available_providers())
    assert any(line.startswith(f"  onnxruntime {onnxruntime.__version__}: {providers}; int8 ") for line in shown)
    assert any(line.startswith(f"  torch {torch.__version__}: ") for line in shown)
    assert f"  none in {home / 'cache'}" in shown


@pytest.mark.parametrize("saturates", [False, True])
@pytest.mark.usefixtures("home")
def test_int8_support_of_the_processor(monkeypatch, saturates):
    monkeypatch.setattr("samekit.doctor.int8_saturates", lambda _: saturates)
    shown = "int8 encodes only, because this processor has no VNNI instructions" if saturates else "int8 runs"
    assert any(line.endswith(shown) for line in lines())


@pytest.mark.usefixtures("home")
def test_missing_parts_say_what_they_would_enable(monkeypatch):
    real = importlib.import_module

    def without(name, *arguments):
        if name == "onnx":
            raise ModuleNotFoundError("No module named 'onnx'", name="onnx")
        if name == "onnxscript":
            raise ModuleNotFoundError("No module named 'onnx_ir'", name="onnx_ir")
        if name == "tensorrt":
            raise OSError("libnvinfer.so.11: cannot open shared object file")
        return real(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", without)
    shown = "\n".join(lines())
    assert "no the " not in shown
    assert f"onnx is not installed: no exporting; run: {INSTALL_EXPORT}" in shown
    assert "onnxscript cannot be imported (No module named 'onnx_ir')" in shown
    assert "tensorrt cannot be imported (libnvinfer.so.11" in shown
    assert f"; reinstall it: {install_command('gpu')}" in shown


def test_folder_that_has_the_name_of_a_package(home, monkeypatch):
    """A folder named like a package does not count as an installed package.

    Python imports any folder on its path as a namespace package, and an engine folder contains one named `tensorrt`.
    """
    (home / "nosuchpackage").mkdir()
    monkeypatch.syspath_prepend(home)
    monkeypatch.setattr(doctor, "PARTS", (doctor.Part("nosuchpackage", "audio", "pip install it"),))
    assert "  nosuchpackage is not installed: no audio; run: pip install it" in lines()
    with pytest.raises(BackendUnavailableError, match="nosuchpackage is not installed; run: pip install it"):
        import_package("nosuchpackage", "pip install it")


def test_as_a_module_inside_an_engine_folder(own_engine):
    """Commands work in an engine folder, although `python -m` adds the working folder to the module path."""
    (own_engine.folder / "tensorrt").mkdir()
    for command in (["doctor"], ["clean", "."], ["export", "tiny-s", "--weights", "random", "--tensorrt", "auto"]):
        program = [sys.executable, "-m", "samekit", *command]
        if command[0] == "export":
            program += ["--out", str(own_engine.folder.parent)]
        done = subprocess.run(program, cwd=own_engine.folder, capture_output=True, text=True, check=False, timeout=120)
        assert "Traceback" not in done.stderr
        assert done.returncode == 0 or done.stderr.startswith("Error: ")


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("driver", [False, True])
def test_tensorrt_is_proposed_where_there_is_a_gpu(monkeypatch, driver):
    real = importlib.import_module

    def without(name, *arguments):
        if name in ("tensorrt", "tensorrt_rtx", "matplotlib"):
            raise ModuleNotFoundError(name, name=name)
        return real(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", without)
    monkeypatch.setattr(doctor, "has_driver", lambda: driver)
    # `pip` is still found where the environment is active.
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "nvidia-smi" else which(name))
    shown = lines()
    proposal = f"  tensorrt is not installed: no engines compiled for the GPU at hand; run: {install_command('gpu')}"
    assert (proposal in shown) == driver
    assert any(line.startswith("  tensorrt") for line in shown) == driver
    assert f"  matplotlib is not installed: no pictures in reports; run: {install_command('report')}" in shown


def test_engines_whole_and_damaged(home, engine_of):
    good = shutil.copytree(engine_of("tiny-s").folder, home / "engines" / "tiny-s")
    bad = shutil.copytree(good, home / "engines" / "cut")
    (bad / "encoder.onnx").write_bytes(b"")
    shown = lines()
    assert "  engines/tiny-s: fp32, random weights" in shown
    assert any(line.startswith("  DAMAGED: engines/cut/encoder.onnx: has 0 bytes") for line in shown)


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("driver", "tool", "expected"),
    [
        (False, None, "none: no NVIDIA driver"),
        (True, None, "an NVIDIA driver, but no nvidia-smi that lists GPUs"),
        (True, "works", "NVIDIA L4, 8.9, 23034 MiB, 550.54"),
        (True, "fails", "an NVIDIA driver, but nvidia-smi failed"),
    ],
)
def test_gpus(monkeypatch, driver, tool, expected):
    def run(command, **_):
        if tool == "fails":
            raise subprocess.CalledProcessError(9, command)
        return types.SimpleNamespace(stdout="NVIDIA L4, 8.9, 23034 MiB, 550.54\n")

    monkeypatch.setattr(doctor, "has_driver", lambda: driver)
    monkeypatch.setattr(shutil, "which", lambda _: tool)
    monkeypatch.setattr(subprocess, "run", run)
    shown = lines()
    assert shown[shown.index("GPUs") + 1].strip().startswith(expected)


def test_every_install_line_names_an_extra_that_exists():
    extras = set(importlib.metadata.metadata("samekit").get_all("Provides-Extra"))
    named = {part.install.split("[")[1].split("]")[0] for part in doctor.PARTS}
    assert named <= extras


def module_of(number, **attributes):
    return SimpleNamespace(__version__=number, **attributes)


@pytest.mark.parametrize(
    ("modules", "found"),
    [
        ({"tensorrt": module_of("11.4.0"), "onnxruntime": module_of("1.32.0")}, []),
        ({"tensorrt": module_of("11.4.0"), "onnxruntime": module_of("1.26.1")}, ["onnxruntime is older than 1.27"]),
        ({"tensorrt": module_of("10.15.1"), "onnxruntime": module_of("1.26.1")}, []),
        ({"tensorrt": module_of("12.0.0")}, ["tensorrt is newer than the versions before 12"]),
        ({"tensorrt_rtx": module_of("2.0")}, ["tensorrt_rtx is newer than the versions before 2"]),
        ({"tensorrt": module_of("unknown"), "onnxruntime": SimpleNamespace()}, []),
        (
            {
                "onnxruntime": module_of("1.32.0", cuda_version="12.8"),
                "torch": module_of("2.13", version=SimpleNamespace(cuda="13.0")),
            },
            ["onnxruntime is built for CUDA 12, PyTorch for CUDA 13"],
        ),
        (
            {
                "onnxruntime": module_of("1.32.0", cuda_version=""),
                "torch": module_of("2.13", version=SimpleNamespace(cuda=None)),
            },
            [],
        ),
    ],
)
def test_versions_that_do_not_fit(modules, found):
    lines = [f"{name} {problem}" for name, problem in conflicts(modules)]
    assert len(lines) == len(found)
    for line, start in zip(lines, found, strict=True):
        assert line.startswith(start)


def test_versions_that_do_not_fit_are_shown(monkeypatch):
    monkeypatch.setattr("onnxruntime.cuda_version", "12.8")
    monkeypatch.setattr("torch.version.cuda", "13.0")
    packages = dict(doctor.examine())["packages"]
    assert "NOTE: is built for CUDA 12, PyTorch for CUDA 13; install" in packages["onnxruntime"]["notes"]


def test_bounds_are_those_of_pyproject():
    document = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    extras = document["project"]["optional-dependencies"]
    bounds = {"tensorrt": extras["gpu"], "onnxruntime": extras["gpu"], "tensorrt_rtx": extras["rtx"]}
    for name, packages in bounds.items():
        (package,) = [package for package in packages if package.startswith(name.replace("_", "-"))]
        assert package.endswith(f",<{UNKNOWN_FROM[name]}")
