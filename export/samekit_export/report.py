"""Measure every backend and precision of a model on one audio file, and write a report as one HTML page.

    audio ── eager PyTorch, the reference ─┐
        └─── every engine that runs here ──┴─ rows of figures ── report.html: players, pictures, table, machine

The page explains its figures. Pictures and page need the `report` extra.
"""

from __future__ import annotations

import base64
import io
import logging
import math
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from samekit import AutoencoderModel
from samekit.audio import AudioReader, AudioWriter, resampled_length
from samekit.backends.selection import AUTO, BACKENDS
from samekit.engine.builds import Build, build_folders
from samekit.errors import InputError, SamekitError, StaleEngineError
from samekit.files.atomic import atomic_path, output_errors
from samekit.files.paths import expanded
from samekit.packages import install_command
from samekit_export.checkpoint import BUNDLED
from samekit_export.measure import interleaved, machine
from samekit_export.verify import snr_db

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from samekit.arrays import Array
    from samekit.batches import Autoencoder
    from samekit.engine.folder import Engine

logger = logging.getLogger(__name__)

EAGER = "torch"
"""The backend that the others are compared with."""
RUNS = 3
"""Timed passes of each direction on each backend. The fastest counts, because other work only slows a pass."""

COLUMNS = (
    "backend",
    "precision",
    "size",
    "latents, SNR against eager fp32",
    "audio, SNR against eager fp32",
    "round trip, SNR against the original",
    "round trip, loss against eager fp32",
    "encode",
    "decode",
)
"""Headings of the table."""


@dataclass(frozen=True)
class Row:
    """The figures of one backend at one precision."""

    backend: str
    """Its name."""
    precision: str
    """The precision that it computed in."""
    size: int
    """Bytes of both directions on disk; 0 for PyTorch, which runs the checkpoint."""
    latents_db: float
    """SNR of the latents against those of eager float32."""
    audio_db: float
    """SNR of the audio decoded from its own latents, against that of eager float32."""
    round_trip_db: float
    """SNR of the decoded against the original audio."""
    loss_db: float
    """How much less that is than with eager float32; NaN for silence."""
    encode_speed: float
    """Seconds of audio encoded in a second."""
    decode_speed: float
    """Seconds of audio decoded in a second."""

    def cells(self) -> tuple[str, ...]:
        """Return the texts of the table, in the order of `COLUMNS`."""
        decibels = (self.latents_db, self.audio_db, self.round_trip_db)
        return (
            self.backend,
            self.precision,
            f"{self.size / 1e6:.1f} MB" if self.size else "-",
            *("equal" if np.isposinf(value) else f"{value:.1f} dB" for value in decibels),
            # Zero is added, because a rounded zero can have a sign.
            f"{round(self.loss_db, 2) + 0.0:.2f} dB" if math.isfinite(self.loss_db) else "-",
            *(f"{speed:.{int(speed < 10)}f} x real time" for speed in (self.encode_speed, self.decode_speed)),
        )


@dataclass(frozen=True)
class Report:
    """The contents of a page."""

    source: str
    """The audio file's name."""
    engine: Engine
    """The model."""
    rows: Sequence[Row]
    """One row for each backend and precision that ran; eager PyTorch first."""
    left_out: Sequence[str]
    """A line for each backend and precision that cannot run here, with the reason."""
    original: Array = field(repr=False)
    """`[channels, samples]` at the model's rate."""
    decoded: Array = field(repr=False)
    """`[channels, samples]`, encoded and decoded."""
    latents: Array = field(repr=False)
    """`[latent_width, latents]`."""
    shown: str
    """The backend and precision that `decoded` and `latents` come from."""

    def table(self) -> str:
        """Return the figures as text for a terminal."""
        short = tuple(name.replace(", SNR against ", " vs ") for name in COLUMNS)
        lines = [short, *(row.cells() for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([*(line.rstrip() for line in text), *(f"not run: {reason}" for reason in self.left_out)])


def measure(
    audio: str | os.PathLike[str], engine: Engine, *, seconds: float | None = None, threads: int | None = None
) -> Report:
    """Encode and decode audio with every backend and precision of an engine folder that runs here; log each of them.

    Args:
        audio: a file of any rate and length. It and all results must fit into memory.
        engine: a finished engine folder.
        seconds: length to use, from the start of the file; the whole file unless given.
        threads: CPU threads; one for each core unless given.

    Raises:
        InputError: `seconds` is not a positive length.
        AudioFileError: the file cannot be read.
        BackendUnavailableError, CheckpointError: eager PyTorch, the reference, cannot run.
    """
    clip, rate = _read(Path(audio), seconds)
    candidates = [(EAGER, "fp32")] + [(b, p) for p in engine.spec.graphs for b in BACKENDS if b not in (AUTO, EAGER)]
    with ExitStack() as stack:
        codecs: dict[tuple[str, str], Autoencoder] = {}
        results: dict[tuple[str, str], tuple[Array, Array]] = {}
        left_out = []
        prepared = clip
        for backend, precision in candidates:
            try:
                opened = stack.enter_context(
                    AutoencoderModel.from_pretrained(engine.name, backend=backend, precision=precision, threads=threads)
                )
                logger.info("running %s %s", backend, precision)
                codec = opened.autoencoder
                if backend == EAGER:
                    prepared = codec.preprocess_audio_for_encoder(clip, rate)
                latents = codec.encode_audio(prepared)
                results[backend, precision] = latents, codec.decode_audio(latents)
            except SamekitError as error:
                if backend == EAGER:
                    raise
                left_out.append(f"{backend} {precision}{_built_size(engine, backend, precision)}: {error}")
                continue
            codecs[backend, precision] = codec
        calls = {}
        for name, codec in codecs.items():
            calls["encode", *name] = partial(codec.encode_audio, prepared)
            calls["decode", *name] = partial(codec.decode_audio, results[name][0])
        logger.info("measuring the speed: %d calls, %d times each", len(calls), RUNS + 1)
        times = interleaved(calls, RUNS)
    true_latents, true_audio = results[EAGER, "fp32"]
    samples = resampled_length(clip.shape[-1], rate, engine.spec.sample_rate)
    length = samples / engine.spec.sample_rate
    round_trips = {
        name: snr_db(prepared[..., :samples], decoded[..., :samples]) for name, (_, decoded) in results.items()
    }
    rows = [
        Row(
            backend=backend,
            precision=precision,
            size=_size(engine, backend, precision),
            latents_db=snr_db(true_latents, latents),
            audio_db=snr_db(true_audio[..., :samples], decoded[..., :samples]),
            round_trip_db=round_trips[backend, precision],
            loss_db=round_trips[EAGER, "fp32"] - round_trips[backend, precision],
            encode_speed=length / min(times["encode", backend, precision]),
            decode_speed=length / min(times["decode", backend, precision]),
        )
        for (backend, precision), (latents, decoded) in results.items()
    ]
    shown = next((name for name in results if name[0] != EAGER), (EAGER, "fp32"))
    latents, decoded = results[shown]
    return Report(
        source=Path(audio).name,
        engine=engine,
        rows=rows,
        left_out=left_out,
        original=prepared[0, :, :samples],
        decoded=decoded[0, :, :samples],
        latents=latents[0],
        shown=" ".join(shown),
    )


def _read(path: Path, seconds: float | None) -> tuple[Array, int]:
    """Return the start of an audio file, `[channels, samples]`, and its rate."""
    if seconds is not None and not 0 < seconds < math.inf:
        raise InputError(f"a report on {seconds} seconds is not possible; pass a number above 0")
    blocks, frames = [], 0
    with AudioReader(path) as reader:
        rate = reader.info.sample_rate
        # No array holds more samples than sys.maxsize, and infinity cannot be rounded.
        most = sys.maxsize if seconds is None else max(1, round(min(seconds * rate, sys.maxsize)))
        for block in reader:
            blocks.append(block)
            frames += block.shape[1]
            if frames >= most:
                break
    return np.concatenate(blocks, axis=1)[:, :most], rate


def _size(engine: Engine, backend: str, precision: str) -> int:
    if backend == EAGER:
        return 0
    if backend == "tensorrt":
        return _largest_build(engine, precision)
    return sum(sum(graph.sizes.values()) for graph in engine.spec.graphs[precision].values())


def _largest_build(engine: Engine, precision: str) -> int:
    """Return the bytes of the largest TensorRT build of a precision; 0 if there is none."""
    largest = 0
    for folder in build_folders(engine):
        # A damaged build does not run.
        with suppress(StaleEngineError):
            build = Build.load(folder)
            if build.fingerprint.precision == precision:
                largest = max(largest, sum(built.size for built in build.engines.values()))
    return largest


def _built_size(engine: Engine, backend: str, precision: str) -> str:
    """Describe the size of TensorRT engines that were built and do not run here."""
    size = _largest_build(engine, precision) if backend == "tensorrt" else 0
    return f" (built, {size / 1e6:.1f} MB)" if size else ""


def write_report(
    audio: str | os.PathLike[str],
    engine: Engine,
    path: str | os.PathLike[str],
    *,
    seconds: float | None = None,
    threads: int | None = None,
) -> Report:
    """Measure, and write the page to `path`; the other arguments are those of `measure`.

    Raises:
        InputError: a package is missing, or `path` does not end in `.html` or `.htm`.
        OutputError: the page cannot be written.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib as mpl  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"a report needs packages that are missing ({error}); run: {install_command('cpu', 'export', 'report')}"
        ) from None
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{path}: a page is HTML; choose a name that ends in .html")
    audio, path = expanded(audio), expanded(path)
    # Opened before measuring, so that a path that cannot be written fails at once.
    with atomic_path(path, follow_links=True) as temporary:
        measured = measure(audio, engine, seconds=seconds, threads=threads)
        page = page_of(measured)
        with output_errors(path):
            temporary.write_text(page, encoding="utf-8")
    return measured


def page_of(report: Report) -> str:
    """Return the page: HTML that loads nothing else."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("samekit_export", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    spec = report.engine.spec
    return environment.get_template("report.html.j2").render(
        report=report,
        spec=spec,
        is_bundled=spec.source.get("kind") == BUNDLED,
        columns=COLUMNS,
        players=[
            ("Original", _player(report.original, spec.sample_rate)),
            (f"Decoded ({report.shown})", _player(report.decoded, spec.sample_rate)),
        ],
        pictures=_pictures(report),
        ratio=spec.hop * spec.channels / spec.latent_width,
        length=report.original.shape[1] / spec.sample_rate,
        machine=machine(),
    )


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _player(audio: Array, rate: int) -> str:
    """Return audio `[channels, samples]` as a data URI of a FLAC file, which browsers play without further loss."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "audio.flac"
        with AudioWriter(file, rate, audio.shape[0], "PCM_16") as writer:
            writer.write(audio)
        return _data_uri("audio/flac", file.read_bytes())


def _pictures(report: Report) -> list[tuple[str, str]]:
    """Return captions and data URIs: both spectrograms on one scale, and the latents."""
    from matplotlib.figure import Figure

    rate = report.engine.spec.sample_rate
    length = report.original.shape[1] / rate
    spectra = {"Original": _spectrogram(report.original), "Decoded": _spectrogram(report.decoded)}
    top = max(float(spectrum.max()) for spectrum in spectra.values())
    pictures = []

    def draw(title: str, values: Array, y: str, highest: float, scale: dict[str, Any], unit: str) -> None:
        figure = Figure(figsize=(10, 3), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(values, aspect="auto", origin="lower", extent=(0, length, 0, highest), **scale)
        axes.set(xlabel="s", ylabel=y)
        figure.colorbar(image, label=unit, pad=0.01)
        with io.BytesIO() as file:
            figure.savefig(file, format="png", dpi=96)
            pictures.append((title, _data_uri("image/png", file.getvalue())))

    decibels = {"cmap": "magma", "vmin": top - 80, "vmax": top}
    for title, spectrum in spectra.items():
        draw(f"{title}: spectrogram of the mean of the channels", spectrum, "kHz", rate / 2000, decibels, "dB")
    limit = max(float(np.quantile(np.abs(report.latents), 0.99)), 1e-6)
    around_zero = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "interpolation": "nearest"}
    width = report.latents.shape[0]
    draw("Latents: a row a channel, a column a latent", report.latents, "channel", width, around_zero, "value")
    return pictures


def _spectrogram(audio: Array, size: int = 2048, columns: int = 1000) -> Array:
    """Return the power in dB of the mean of the channels: `[size / 2 + 1, at most about columns]`."""
    mono = np.pad(audio.mean(axis=0), size // 2)
    frames = np.lib.stride_tricks.sliding_window_view(mono, size)[:: max(size // 4, len(mono) // columns)]
    power = np.abs(np.fft.rfft(frames * np.hanning(size))) ** 2
    decibels: Array = 10 * np.log10(power.T + 1e-10)
    return decibels
