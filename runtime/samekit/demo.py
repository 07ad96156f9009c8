"""Encode and decode the built-in piece of music with `same-tiny`, and write a page with players and figures."""

from __future__ import annotations

import base64
import html
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Final

import numpy as np

from samekit import __version__
from samekit.audio import AudioWriter, read_audio
from samekit.backends.cpu import available_cpus
from samekit.errors import InputError
from samekit.files.atomic import atomic_path, output_errors
from samekit.files.paths import expanded
from samekit.model import AutoencoderModel

if TYPE_CHECKING:
    import os

MODEL: Final = "same-tiny"
"""The model that comes with samekit."""

PAGE: Final = "demo.html"
"""The file name of the page."""

PIECE: Final = Path(__file__).with_name("demo.ogg")
"""The built-in piece, 24 s of synthesized music. `tools/synthesis.py` writes it."""

_TEMPLATE: Final = Path(__file__).with_name(PAGE)


@dataclass(frozen=True)
class Demo:
    """The files of a demo and its figures."""

    page: Path
    """The page; the other files lie beside it."""
    figures: dict[str, str]
    """Name -> value with its unit, as the page shows them."""


def write_piece(path: Path) -> None:
    """Write the built-in piece: 24 s of synthesized music, as FLAC, which every browser plays.

    Raises:
        OutputError: the file cannot be written.
    """
    audio, rate = read_audio(PIECE)
    with AudioWriter(path, rate, audio.shape[0]) as writer:
        writer.write(audio)


def run_demo(folder: str | os.PathLike[str]) -> Demo:
    """Encode and decode the built-in piece; write the audio files, the latents and a page that loads nothing else.

    Args:
        folder: new, empty, or the folder of an earlier demo, whose files are replaced.

    Raises:
        InputError: the folder holds other files.
        OutputError: a file cannot be written.
        SamekitError: the model cannot be opened; errors of `AutoencoderModel.from_pretrained`.
    """
    folder = expanded(folder)
    with output_errors(folder):
        if folder.exists() and any(folder.iterdir()) and not (folder / PAGE).is_file():
            raise InputError(f"{folder}: is not empty and holds no {PAGE}; choose another folder")
    piece, latents, decoded = folder / "piece.flac", folder / "piece.npy", folder / "decoded.flac"
    with AutoencoderModel.from_pretrained(MODEL) as model:
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_piece(piece)
        start = time.perf_counter()
        done = model.encode_file(piece, latents)
        encoded = time.perf_counter()
        model.decode_file(latents, decoded)
        end = time.perf_counter()
        backend = model.autoencoder.backend
        seconds = done["samples"] / done["sample_rate"]
        figures = {
            "Length": f"{seconds:.2f} s, {model.spec.channels} channels, {model.sample_rate} Hz",
            "Latents": f"{model.latent_dim} x {done['latents']}, one for every {model.downsampling_ratio} samples",
            "Size of the latents": f"{latents.stat().st_size:,} bytes in float32",
            "Encode": _speed(encoded - start, seconds),
            "Decode": _speed(end - encoded, seconds),
            "Signal-to-noise ratio of the decoded audio": f"{_snr_db(piece, decoded):.1f} dB",
            "Model": f"{model.spec.name}, {backend.precision}, {backend.name} on {model.device}",
            "Machine": f"{available_cpus()} cores, {platform.platform()}",
            "Versions": f"samekit {__version__}, Python {platform.python_version()}, NumPy {np.__version__}",
        }
    page = folder / PAGE
    text = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        rows="\n".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in figures.items()),
        original=_base64(piece),
        decoded=_base64(decoded),
    )
    with atomic_path(page) as temporary, output_errors(page):
        temporary.write_text(text, encoding="utf-8")
    return Demo(page, figures)


def _speed(taken: float, seconds: float) -> str:
    return f"{taken:.2f} s, {seconds / taken:.1f} x real time"


def _snr_db(original: Path, decoded: Path) -> float:
    """Return the signal-to-noise ratio of two files in dB: 20 log10(|original| / |decoded - original|)."""
    reference, output = (read_audio(path)[0] for path in (original, decoded))
    return float(20 * np.log10(np.linalg.norm(reference) / np.linalg.norm(output - reference)))


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
