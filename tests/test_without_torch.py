"""Everything except export, verify and the PyTorch backend works without PyTorch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import soundfile as sf

# With None in `sys.modules`, an import of a package fails as if the package were not installed.
COMMAND = """
import sys
missing = "torch onnx onnxscript safetensors huggingface_hub samekit_export tensorrt tensorrt_rtx"
for name in missing.split():
    sys.modules[name] = None
from samekit.cli.main import main
main(sys.argv[1:])
"""


def run(*arguments):
    """Run a command of samekit in a new process."""
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.wav"
    sf.write(path, 0.1 * np.random.default_rng(0).standard_normal((30_001, 2)), 48_000)
    return path


def test_encode_and_decode(engine_of, clip, tmp_path):
    engine, latents, back = engine_of("tiny-s").folder, tmp_path / "clip.npy", tmp_path / "back.wav"
    encoded = run("encode", clip, latents, "--model", engine)
    assert encoded.returncode == 0, encoded.stderr
    decoded = run("decode", latents, back, "--model", engine)
    assert decoded.returncode == 0, decoded.stderr
    assert np.load(latents, allow_pickle=False).shape == (32, 7)
    assert sf.info(back).frames == -(-30_001 * 44_100 // 48_000)


def test_info(engine_of):
    shown = run("info", engine_of("tiny-l").folder)
    assert shown.returncode == 0, shown.stderr
    assert "tiny-l in " in shown.stdout


@pytest.mark.parametrize("arguments", [("export", "same-s"), ("verify", "same-s")], ids=str)
def test_commands_that_need_torch_name_the_package_to_install(arguments):
    refused = run(*arguments)
    assert refused.returncode == 2
    assert "pip install" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
