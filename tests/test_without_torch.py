"""Everything but export and the eager fallback works where PyTorch is not installed."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import soundfile as sf

# As if none of the packages of the other extras were there: an import of one fails at once.
COMMAND = """
import sys
absent = "torch onnx onnxscript safetensors huggingface_hub samekit_export tensorrt tensorrt_rtx"
for name in absent.split():
    sys.modules[name] = None
from samekit.cli.main import main
main(sys.argv[1:])
"""


def run(*arguments):
    """The command line in a process of its own."""
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
def test_what_needs_torch_says_what_to_install(arguments):
    refused = run(*arguments)
    assert refused.returncode == 2
    assert "pip install" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
