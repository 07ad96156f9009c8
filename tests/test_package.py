"""The wheel and the sdist: contents, metadata, an installation without PyTorch; and what imports load."""

from __future__ import annotations

import ast
import email
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.metadata import distribution, distributions
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from helpers import assert_close, noise
from package_metadata import long_description
from packaging.requirements import Requirement

import samekit
from samekit import AutoencoderModel

ROOT = Path(__file__).parents[1]
PACKAGES = {"samekit": ROOT / "runtime" / "samekit", "samekit_export": ROOT / "export" / "samekit_export"}
# Packages that `import samekit` must not import.
HEAVY = ("torch", "onnx", "onnxscript", "onnxruntime", "tensorrt", "soundfile", "safetensors", "huggingface_hub")


def in_new_process(code, *arguments):
    """Run a script in a new process and return the JSON that it prints."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return json.loads(done.stdout)


ADDRESS = "https://github.com/owner/samekit"
# PyPI takes 100 MB.
WHEEL_BYTES = 25_000_000
INFORMATION = f"samekit-{samekit.__version__}.dist-info"


def build(tree, out, *options):
    """Build distributions of a tree with the installed hatchling, and return `out`."""
    command = [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", str(out), str(tree)]
    environment = os.environ | {"SAMEKIT_REPOSITORY": ADDRESS}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def tree(tmp_path_factory, bundled_engine):
    """Copy the tree, with the engine where `make wheel` puts it."""
    tree = tmp_path_factory.mktemp("tree") / "samekit"
    made = {"build", "dist", "demo", "engines", "models"}

    def ignored(folder, names):
        hidden = {name for name in names if name.startswith(".") and name != ".gitignore"}
        return {"__pycache__", *hidden, *(made if Path(folder) == ROOT else ())}

    shutil.copytree(ROOT, tree, ignore=ignored)
    shutil.copytree(bundled_engine.folder, tree / "build" / "engines" / "same-tiny")
    return tree


@pytest.fixture(scope="module")
def dist(tree, tmp_path_factory):
    """Return a folder with the sdist, and the wheel that was built from it."""
    return build(tree, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def wheel_path(dist):
    return dist / f"samekit-{samekit.__version__}-py3-none-any.whl"


@pytest.fixture(scope="module")
def wheel(wheel_path):
    """Open the wheel as a zip file."""
    with zipfile.ZipFile(wheel_path) as file:
        yield file


def names_of(wheel):
    return {name for name in wheel.namelist() if not name.endswith("/")}


def test_wheel_holds_both_packages_the_engine_and_nothing_else(wheel, wheel_path, bundled_engine):
    assert wheel.testzip() is None
    assert wheel_path.stat().st_size <= WHEEL_BYTES
    expected = {f"samekit/engines/same-tiny/{path.name}" for path in bundled_engine.folder.iterdir()}
    for package, folder in PACKAGES.items():
        files = {path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
        expected |= {f"{package}/{path.relative_to(folder).as_posix()}" for path in files}
    assert {name for name in names_of(wheel) if not name.startswith(f"{INFORMATION}/")} == expected
    assert {"samekit/py.typed", "samekit_export/py.typed", "samekit_export/same-tiny/model.safetensors"} <= expected


def test_engine_names_no_file_of_the_machine_that_exported_it(wheel):
    graph = wheel.read("samekit/engines/same-tiny/encoder.onnx")
    assert b"RotaryEmbedding" in graph
    assert b"graph.py" not in graph


def test_wheel_of_the_tree_equals_that_of_the_sdist(tree, wheel_path, tmp_path):
    assert (build(tree, tmp_path, "--wheel") / wheel_path.name).read_bytes() == wheel_path.read_bytes()


def test_wheel_without_the_engine(wheel, tree, tmp_path):
    """Without `make wheel`, for example in `pip install .`, there is no engine."""
    shutil.copytree(tree, tmp_path / "tree", ignore=shutil.ignore_patterns("build"))
    (path,) = build(tmp_path / "tree", tmp_path / "dist", "--wheel").iterdir()
    with zipfile.ZipFile(path) as smaller:
        engine = {name for name in names_of(wheel) if name.startswith("samekit/engines/")}
        assert names_of(smaller) == names_of(wheel) - engine


def test_sdist_contains_what_make_needs(dist, tree):
    with tarfile.open(dist / f"samekit-{samekit.__version__}.tar.gz") as file:
        names = {name.split("/", 1)[1] for name in file.getnames()}
    assert {"Makefile", "constraints.txt", "tools/package_metadata.py", "build/engines/same-tiny/spec.json"} <= names
    assert {path.relative_to(tree).as_posix() for path in (tree / "tests").rglob("*.py")} <= names


def test_pypi_can_show_the_description(dist):
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, sorted(dist.iterdir()))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_wheel_metadata(wheel):
    metadata = email.message_from_bytes(wheel.read(f"{INFORMATION}/METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("samekit", samekit.__version__)
    assert metadata["License-Expression"] == "MIT"
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(line.split(">")[0] for line in required) == ["click", "numpy", "soundfile", "tqdm"]
    entries = wheel.read(f"{INFORMATION}/entry_points.txt").decode()
    assert "samekit = samekit.cli.main:main" in entries
    assert "[samekit.backends]\ntorch = " in entries
    assert "[samekit.commands]\nexport = " in entries
    assert f"{INFORMATION}/licenses/LICENSE" in wheel.namelist()


def test_links_lead_to_files_of_the_repository(wheel):
    """PyPI shows the README, but has no other files of the repository."""
    metadata = email.message_from_bytes(wheel.read(f"{INFORMATION}/METADATA"))
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    assert {"Homepage", "Documentation", "Changelog", "Issues"} == set(urls)
    text = metadata.get_payload(decode=True).decode()
    links = re.findall(r"(!?)\[[^]]*\]\(([^)]*)\)", text)
    assert len(links) > 5
    files = f"{ADDRESS}/(blob|raw)/v{re.escape(samekit.__version__)}/([^#]+)(#.*)?"
    targets = [("", url) for url in urls.values() if url not in (ADDRESS, f"{ADDRESS}/issues")]
    for mark, link in links + targets:
        kind, file, _ = re.fullmatch(files, link).groups()
        assert kind == ("raw" if mark else "blob")
        assert (ROOT / file).is_file()


def test_description_without_a_repository():
    text = "See [it](docs/a.md#b), ![a picture](c.png), [above](#d) and [there](https://example.org/e)."
    assert long_description(text, "", "v1") == "See it, a picture, above and [there](https://example.org/e)."


def test_changelog_has_the_usual_form():
    """The form is that of keepachangelog.com 1.1.0: one section a version, newest first, one part a kind of change."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest, *older = re.findall(r"^## (.*)", text, re.MULTILINE)
    released = r"\[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d"
    assert newest == "[Unreleased]" or re.fullmatch(released, newest)[1] == samekit.__version__
    assert all(re.fullmatch(released, heading) for heading in older)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for section in re.split(r"^## .*", text, flags=re.MULTILINE)[1:]:
        before, *parts = re.split(r"^### (.*)", section, flags=re.MULTILINE)
        assert before.strip() == ""
        assert parts
        assert set(parts[::2]) <= kinds


# --- The wheel, installed without PyTorch -------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(wheel_path, tmp_path_factory):
    """Install the wheel in a new environment, with what its extra `cpu` needs; return a function that runs a program.

    The packages that it needs are links to those of this environment, so nothing is downloaded.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    site, scripts = (
        Path(sysconfig.get_path(name, "venv", {"base": str(folder), "platbase": str(folder)}))
        for name in ("purelib", "scripts")
    )
    pip = [sys.executable, "-m", "pip", "--python", str(scripts / "python")]
    install = [*pip, "install", "--no-index", "--no-deps", "--quiet", str(wheel_path)]
    subprocess.run(install, check=True, timeout=300)
    (found,) = distributions(path=[str(site)])
    waiting = [(found, "cpu")]
    while waiting:
        package, extra = waiting.pop()
        for requirement in map(Requirement, package.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                needed = distribution(requirement.name)
                waiting += [(needed, "")]
                for name in {file.parts[0] for file in needed.files} - {"..", "__pycache__"}:
                    if not (site / name).exists():
                        (site / name).symlink_to(needed.locate_file(name))
    subprocess.run([*pip, "check"], check=True, timeout=300)

    def run(program, *arguments):
        command = [str(scripts / program), *map(str, arguments)]
        # The tests' own tree must not be found.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)

    return run


def test_installed_wheel_runs_the_demo(installed):
    assert installed("python", "-c", "import torch").returncode == 1
    done = installed("samekit", "demo")
    assert done.returncode == 0, done.stderr
    assert "same-tiny, fp32, onnxruntime on cpu" in done.stdout
    assert Path("samekit-demo", "demo.html").stat().st_size > 1_000_000


def test_installed_wheel_encodes_with_its_engine(installed, bundled_engine):
    sf.write("song.wav", noise((44_100, 2), level=0.1), 44_100)
    done = installed("samekit", "encode", "song.wav", "song.npy", "--model", "same-tiny")
    assert done.returncode == 0, done.stderr
    with AutoencoderModel.from_pretrained(bundled_engine.folder, "cpu") as model:
        model.encode_file("song.wav", "expected.npy")
    assert_close(np.load("expected.npy"), np.load("song.npy"), 100)
    # Its other precisions are exported to ./engines, where names are looked up first.
    done = installed("samekit", "encode", "song.wav", "int8.npy", "--model", "same-tiny", "--precision", "int8")
    assert done.returncode == 2
    assert "run: samekit export same-tiny --precision int8" in done.stderr
    assert "--out" not in done.stderr
    shutil.copytree(bundled_engine.folder, "engines/same-tiny")
    assert f"same-tiny in {Path('engines', 'same-tiny')}\n" in installed("samekit", "info", "same-tiny").stdout


# --- What imports load ----------------------------------------------------------------------------------------


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


def test_all_lists_every_public_name():
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
