"""Other packages add backends and commands by entry points; samekit's own cannot be replaced."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from samekit import AutoencoderModel
from samekit.backends.base import BackendOptions
from samekit.backends.selection import BACKENDS, open_backend
from samekit.cli.main import main
from samekit.errors import BackendUnavailableError, InputError

MODULE = """
import click
from helpers import FakeBackend

class Zeros(FakeBackend):
    name = "zeros"

def open_zeros(engine, options):
    opened = Zeros(precision=options.precision)
    opened.spec = engine.spec
    return opened

@click.command()
@click.argument("name")
def greet(name):
    \"\"\"Print a greeting.\"\"\"
    click.echo(f"hello {name}")
"""

ENTRY_POINTS = """
[samekit.backends]
zeros = zeros_backend:open_zeros
torch = zeros_backend:open_zeros
absent = package_that_is_absent:open

[samekit.commands]
greet = zeros_backend:greet
export = zeros_backend:greet
broken = package_that_is_absent:command
moved = zeros_backend:moved
"""


@pytest.fixture
def _other_package(tmp_path, monkeypatch):
    """An installed package that registers a backend and commands."""
    information = tmp_path / "zeros_backend-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: zeros-backend\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "zeros_backend.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield
    sys.modules.pop("zeros_backend", None)


@pytest.mark.usefixtures("_other_package")
class TestOtherPackage:
    def test_backend_opens_by_name(self, engine_of):
        with AutoencoderModel.from_pretrained(engine_of("tiny-s").folder, backend="zeros") as model:
            assert model.autoencoder.backend.name == "zeros"

    def test_unknown_backend_names_the_registered_ones(self, engine_of):
        with pytest.raises(
            InputError, match="choose one of auto, tensorrt, onnxruntime, openvino, torch, zeros, absent"
        ):
            open_backend(engine_of("tiny-s").folder, "nonsense", BackendOptions())

    def test_own_backend_is_not_replaced(self, engine_of):
        backend = open_backend(engine_of("tiny-s").folder, "torch", BackendOptions(device="cpu"))
        assert backend.name == "torch"

    def test_package_that_is_absent(self, engine_of):
        told = "package_that_is_absent is not installed; run: pip install zeros-backend"
        with pytest.raises(BackendUnavailableError, match=told):
            open_backend(engine_of("tiny-s").folder, "absent", BackendOptions())

    def test_command(self):
        result = CliRunner().invoke(main, ["greet", "Ada"])
        assert (result.exit_code, result.output) == (0, "hello Ada\n")

    def test_commands_are_listed(self):
        listed = CliRunner().invoke(main, ["--help"])
        assert listed.exit_code == 0
        assert re.search(r"^  greet +Print a greeting\.$", listed.output, re.MULTILINE)
        assert re.search(
            r"^  broken +Unavailable: package_that_is_absent is not installed", listed.output, re.MULTILINE
        )
        assert re.search(r"^  export +Export MODEL", listed.output, re.MULTILINE)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("broken", "package_that_is_absent is not installed; run: pip install zeros-backend"),
            ("moved", "zeros-backend registers zeros_backend:moved, which does not exist; update zeros-backend"),
        ],
    )
    def test_command_that_cannot_be_imported(self, name, message):
        result = CliRunner().invoke(main, [name, "--option", "argument"])
        assert (result.exit_code, result.stderr) == (2, f"Error: {message}\n")


def test_every_backend_of_the_list_opens(engine_of):
    """Or says why not; none is unknown."""
    for name in BACKENDS:
        try:
            open_backend(engine_of("tiny-s").folder, name, BackendOptions()).close()
        except BackendUnavailableError as error:
            assert name == "tensorrt", error  # noqa: PT017 no other may be unavailable


# As if these packages were not installed: an import of one fails at once.
EAGER = """
import json, sys
for name in "onnx onnxscript onnx_ir onnxruntime openvino huggingface_hub".split():
    sys.modules[name] = None
import numpy as np
from samekit import AutoencoderModel
import samekit_export.checkpoint, samekit_export.model, samekit_export.model_spec, samekit_export.backend
with AutoencoderModel.from_pretrained(sys.argv[1], "cpu", backend=sys.argv[2]) as model:
    latents = model.encode(np.zeros((2, 5000), np.float32), 48_000)
print(json.dumps([latents.shape, model.autoencoder.backend.name]))
"""


@pytest.mark.parametrize("kind", ["engine", "checkpoint"])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_eager_pytorch_needs_torch_and_safetensors_only(engine_of, checkpoint_of, kind, backend):
    model = engine_of("tiny-s").folder if kind == "engine" else checkpoint_of("tiny-s")
    command = [sys.executable, "-c", EAGER, str(model), backend]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[1, 32, 2], "torch"]
