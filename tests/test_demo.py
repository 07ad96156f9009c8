"""`samekit demo`: its page, its files, and the folders that it refuses."""

from __future__ import annotations

import base64
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from click.testing import CliRunner
from helpers import assert_one_line

from samekit.cli.main import main
from samekit.demo import PAGE, run_demo
from samekit.errors import EngineNotFoundError, InputError, OutputError

SAMPLES = 24 * 44_100


@pytest.fixture
def _engine_is_found(bundled_engine, _isolated):
    """Give the working folder the engine that a wheel contains."""
    Path("engines").mkdir()
    Path("engines", bundled_engine.folder.name).symlink_to(bundled_engine.folder)


@pytest.mark.usefixtures("_engine_is_found")
def test_page_and_files():
    result = CliRunner().invoke(main, ["demo"])
    assert result.exit_code == 0, result.output
    folder = Path("samekit-demo")
    assert {path.name for path in folder.iterdir()} == {
        *("piece.flac", "piece.npy", "piece.json", "decoded.flac", PAGE)
    }
    page = (folder / PAGE).read_text(encoding="utf-8")
    assert f"Listen and look: {(folder / PAGE).resolve().as_uri()}" in result.stdout
    shown = dict(re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", page))
    for name, value in shown.items():
        assert f"{name}: {value}" in result.stdout
    latents = np.load(folder / "piece.npy")
    assert shown["Length"] == "24.00 s, 2 channels, 44100 Hz"
    assert shown["Latents"].startswith(f"{latents.shape[0]} x {latents.shape[1]}, ")
    assert shown["Size of the latents"] == f"{(folder / 'piece.npy').stat().st_size:,} bytes in float32"

    players = [base64.b64decode(data) for data in re.findall(r'src="data:audio/flac;base64,(.*?)"', page)]
    assert players == [(folder / name).read_bytes() for name in ("piece.flac", "decoded.flac")]
    original, decoded = (sf.read(io.BytesIO(player))[0] for player in players)
    assert original.shape == decoded.shape == (SAMPLES, 2)
    snr = 10 * np.log10((original**2).sum() / ((decoded - original) ** 2).sum())
    assert shown["Signal-to-noise ratio of the decoded audio"] == f"{snr:.1f} dB"
    assert snr > 9
    # The page loads nothing else.
    assert set(re.findall(r'(?:src|href)="(\w+:\w+/\w+)', page)) == {"data:audio/flac"}
    assert "default-src 'none'" in page


@pytest.mark.usefixtures("_engine_is_found")
def test_files_of_an_earlier_demo_are_replaced(tmp_path):
    first = run_demo(tmp_path / "new" / "folder")
    first.page.write_text("old")
    second = run_demo(first.page.parent)
    assert second.page == first.page
    assert "samekit demo" in second.page.read_text(encoding="utf-8")


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "piece.flac").write_bytes(b"mine")
    with pytest.raises(InputError, match="is not empty") as caught:
        run_demo(tmp_path)
    assert_one_line(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["piece.flac"]
    with pytest.raises(OutputError, match=r"piece\.flac: cannot be written") as caught:
        run_demo(tmp_path / "piece.flac")
    assert_one_line(caught.value)


def test_without_an_engine(monkeypatch, tmp_path):
    """A wheel that was built without `make wheel` has no engine, and PyTorch is missing."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "samekit_export.open_backend", raising=False)
    with pytest.raises(EngineNotFoundError, match="run: samekit export same-tiny") as caught:
        run_demo(tmp_path / "demo")
    assert_one_line(caught.value)
    assert not (tmp_path / "demo").exists()
