"""What happens to samples beyond full scale when an audio file is written."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from typing import TYPE_CHECKING, Final

import numpy as np

from samekit.audio.limiter import Limiter
from samekit.errors import InputError
from samekit.files.atomic import output_errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import IO

    from samekit.audio.channels import Audio
    from samekit.audio.writer import AudioWriter

logger = logging.getLogger(__name__)

ATTENUATE: Final = "attenuate"
"""Scale the whole file, if its peak exceeds full scale, so that the peak becomes full scale."""
LIMIT: Final = "limit"
"""Limit peaks by `samekit.audio.Limiter`."""
CLIP: Final = "clip"
"""Clip samples to -1 ... 1."""
RAW: Final = "raw"
"""Write the samples as they are, which needs floating point."""
PEAK_POLICIES: Final = (ATTENUATE, LIMIT, CLIP, RAW)

# Bytes that are read at a time from the temporary file: whole frames of up to 1,024 channels.
_READ_BYTES: Final = 2**20


def checked_policy(peak: str | None, subtype: str) -> str:
    """Return a peak policy; None stands for `raw` with the subtype `FLOAT`, for `attenuate` with the others.

    Raises:
        InputError: the policy is unknown, or it is `raw` and the subtype holds integers.
    """
    if peak is None:
        return RAW if subtype == "FLOAT" else ATTENUATE
    if peak not in PEAK_POLICIES:
        raise InputError(f"unknown peak policy {peak!r}; use one of {', '.join(PEAK_POLICIES)}")
    if peak == RAW and subtype != "FLOAT":
        cure = f"write floats, which .wav holds (--bits float), or use another policy: {', '.join(PEAK_POLICIES[:-1])}"
        raise InputError(f"peak policy {RAW!r} needs floating point, and {subtype} holds integers; {cure}")
    return peak


def write_blocks(writer: AudioWriter, blocks: Iterable[Audio], peak: str) -> None:
    """Write blocks `[channels, samples]` by a peak policy, in memory that does not grow with their number.

    `attenuate` stores all samples as floats in a temporary file without a name, in the folder of the output. It logs a
    warning that says by how much the file was attenuated.

    Raises:
        InputError, OutputError: as `AudioWriter.write`.
    """
    if peak == ATTENUATE:
        blocks = _attenuated(blocks, writer)
    elif peak == LIMIT:
        blocks = _limited(blocks, writer)
    elif peak == CLIP:
        blocks = (np.clip(block, -1, 1) for block in blocks)
    for block in blocks:
        writer.write(block)


def _attenuated(blocks: Iterable[Audio], writer: AudioWriter) -> Iterator[Audio]:
    """Store all blocks while their peak is measured; then yield them, scaled if the peak exceeds full scale."""
    peak = 0.0
    with _temporary_file(writer) as file:
        for block in blocks:
            writer.check(block)
            peak = max(peak, float(np.abs(block).max(initial=0)))
            rest = memoryview(block.T.tobytes())
            with output_errors(writer.path):
                while rest:
                    rest = rest[file.write(rest) :]
        if peak > 1:
            decibels = 20 * math.log10(peak)
            logger.warning(
                "%s: the peak was %.2f dB above full scale; all samples are attenuated", writer.path, decibels
            )
        file.seek(0)
        while True:
            with output_errors(writer.path, cause="cannot be completed"):
                data = file.read(_READ_BYTES // writer.channels * writer.channels)
            if not data:
                return
            samples = np.frombuffer(data, np.float32).reshape(-1, writer.channels).T
            # float64, because the largest floats have no reciprocal in float32.
            yield samples if peak <= 1 else (samples.astype(np.float64) * (writer.highest / peak)).astype(np.float32)


def _temporary_file(writer: AudioWriter) -> IO[bytes]:
    """Open a file without a name in the folder of the output."""
    folder = os.path.dirname(os.path.realpath(writer.path))
    with output_errors(writer.path):
        # Without a buffer, because closing would write it, and would raise the error of a full disk again.
        return tempfile.TemporaryFile(dir=folder, buffering=0)


def _limited(blocks: Iterable[Audio], writer: AudioWriter) -> Iterator[Audio]:
    limiter = Limiter(writer.sample_rate, writer.channels)
    for block in blocks:
        yield limiter.push(block)
    yield limiter.finish()
