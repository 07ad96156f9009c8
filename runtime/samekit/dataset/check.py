"""Check that a folder of pre-encoded latents is complete and agrees with its manifest."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Final

import numpy as np

from samekit.dataset.clip import names_of, timing
from samekit.dataset.file_names import SILENCE_FILE, STATE_FOLDER, Layout
from samekit.dataset.loudness import latent_rms
from samekit.dataset.manifest import find_manifests, read_manifest
from samekit.dataset.options import Settings, Shard
from samekit.dataset.output import FolderOutput
from samekit.errors import InputError, LatentsFileError
from samekit.files.atomic import temporary_target
from samekit.files.latents import MODEL_DIGEST, map_array, read_latents
from samekit.files.paths import expanded

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Any

    from samekit.arrays import Array
    from samekit.dataset.manifest import Row

# Field of the metadata -> its type. A boolean is no integer here.
_FIELDS: Final[dict[str, type]] = {
    "path": str,
    "relpath": str,
    "timestamps": list,
    "seconds_start": int,
    "seconds_total": int,
    "padding_mask": list,
    "sample_rate": int,
    "prompt": str,
    MODEL_DIGEST: str,
}
# The fields in the mirror layout. A clip that has only tags has no prompt there.
_MIRROR_FIELDS: Final[dict[str, type]] = {
    **{name: kind for name, kind in _FIELDS.items() if name != "prompt"},
    "src_relpath": str,
    "seconds_total": float,
    "audio_samples": int,
    "latent_shape": list,
}
_ENCODE_AGAIN: Final = "remove it and run pre-encode again"
# Latents that are looked at together.
_CHECKED: Final = 2**12
# Number of clips without latents that are reported one by one.
_MOST_LISTED: Final = 10


def verify(folder: str | os.PathLike[str]) -> list[str]:
    """Check every file of a folder of latents. No run may write into the folder at the same time.

    All values of all latents must be finite. The metadata fields that the training code reads are compared with the
    manifest, except the words of the prompt.

    Args:
        folder: the `output_path` of `pre_encode`, with all of its shards.

    Returns:
        One line with a cure for each problem; none if the folder is sound and complete. Of the clips that are not
        encoded yet, the first ten have a line each and the others share one.

    Raises:
        InputError: the folder has no manifest, or a damaged one.
        OutputError: the folder cannot be listed.
    """
    if "://" in os.fspath(folder):
        raise InputError(f"{folder}: only folders can be verified; copy it to one, or mount it")
    folder = expanded(folder)
    output = FolderOutput(folder)
    parts = find_manifests(output) if os.path.isdir(folder) and STATE_FOLDER in output.names() else {}
    if not parts:
        raise InputError(f"{folder}: has no manifest in {STATE_FOLDER}; pass the --output_path of a pre-encode run")
    manifests = [read_manifest(output, names) for names in parts.values()]
    layout = manifests[0][0].layout
    rows = {row.name(layout): row for _, rows in manifests for row in rows if row.status != "gone"}
    names = sorted({*(output.names() if layout == "numbered" else output.tree()), *_state_files(output)})
    is_empty = not any(row.status in (None, "encoded") for row in rows.values())
    return [
        *([f"{folder}: holds no latents; see {STATE_FOLDER}/{Shard().report}, and run pre-encode again"] * is_empty),
        *_check_shards(folder, list(parts)),
        *_check_files(folder, names, rows, layout),
        *_check_manifests(folder, manifests),
    ]


def _check_shards(folder: Path, shards: list[Shard]) -> Iterator[str]:
    """Report shards that were never started."""
    counts = sorted({shard.count for shard in shards})
    if len(counts) > 1:
        yield f"{folder}: was encoded in {' and in '.join(map(str, counts))} parts; encode it again into another folder"
        return
    started = {shard.index for shard in shards}
    missing = [index for index in range(1, counts[0] + 1) if index not in started]
    if missing:
        first = Shard(missing[0], counts[0])
        yield f"{folder}: {len(missing)} of {counts[0]} shards are missing; run pre-encode with --shard {first}"


def _state_files(output: FolderOutput) -> Iterator[str]:
    return (f"{STATE_FOLDER}/{name}" for name in output.names(STATE_FOLDER))


def _check_files(folder: Path, names: list[str], rows: dict[str, Row], layout: Layout) -> Iterator[str]:
    """Report unfinished files, and files of clips that no manifest lists as encoded."""
    for name in names:
        stem, _, suffix = name.rpartition(".")
        row = rows.get(stem)
        if temporary_target(name.rpartition("/")[2]):
            yield f"{folder / name}: is an unfinished file; run pre-encode again"
            continue
        # All latents in a mirrored folder are training data. Other files there may be notes of the user.
        is_clip = stem.isdecimal() if layout == "numbered" else row is not None or suffix == "npy"
        if suffix in ("npy", "json") and is_clip and (row is None or row.status != "encoded") and name != SILENCE_FILE:
            yield f"{folder / name}: belongs to no clip; run pre-encode again, and remove it if it stays"


def _check_manifests(folder: Path, manifests: list[tuple[Settings, list[Row]]]) -> Iterator[str]:
    """Check every encoded clip, and report the clips that are not encoded yet."""
    first, _ = manifests[0]
    waiting = [row for _, rows in manifests for row in rows if row.status is None]
    for row in waiting[:_MOST_LISTED]:
        yield f"{folder}: {row.relpath!r} is not encoded yet; run pre-encode again"
    if more := len(waiting[_MOST_LISTED:]):
        yield f"{folder}: and {more} more clips are not encoded yet; run pre-encode again"
    for settings, rows in manifests:
        if differences := settings.differences(first):
            yield (
                f"{folder}: its shards have other settings ({', '.join(differences)}); run pre-encode for every shard "
                "with the same options and --reencode"
            )
        for row in rows:
            if row.status == "encoded":
                yield from _check_pair(folder / f"{row.name(settings.layout)}.npy", row, settings)
    yield from _check_silence(folder / SILENCE_FILE, first)


def _check_pair(path: Path, row: Row, settings: Settings) -> Iterator[str]:
    """Check the latents and the metadata of one clip."""
    missing = [file for file in (path, path.with_suffix(".json")) if not os.path.lexists(file)]
    if missing:
        yield from map(_missing, missing)
        return
    try:
        latents, metadata = read_latents(path, settings.width)
    except LatentsFileError as error:
        yield _unreadable(error)
        return
    if latents.dtype != settings.dtype:
        yield f"{path}: holds {latents.dtype} instead of {settings.dtype}; {_ENCODE_AGAIN}"
    yield from _check_metadata(path.with_suffix(".json"), metadata, row, settings, latents.shape[-1])
    if settings.cut.target_latent_rms is not None and not _is_loudness(metadata, latents, row):
        yield f"{path.with_suffix('.json')}: its loudness fields are not those of the latents; {_ENCODE_AGAIN}"


def _check_metadata(path: Path, metadata: dict[str, Any], row: Row, settings: Settings, latents: int) -> Iterator[str]:
    """Compare the fields that the training code reads, and the model, with the manifest."""
    kinds = _FIELDS if settings.layout == "numbered" else _MIRROR_FIELDS
    values = {name: metadata.get(name) for name in kinds}
    wrong = [name for name, value in values.items() if not isinstance(value, kinds[name]) or isinstance(value, bool)]
    if not wrong and not str(metadata.get("prompt", "tags")).strip():
        wrong = ["prompt"]
    if wrong:
        yield f"{path}: has no usable {', '.join(wrong)}; {_ENCODE_AGAIN}"
        return
    if metadata[MODEL_DIGEST] != settings.model_sha256:
        found, expected = metadata[MODEL_DIGEST][:8], settings.model_sha256[:8]
        yield f"{path}: is of model {found!r}, the manifest says {expected!r}; {_ENCODE_AGAIN}"
    for name, expected in names_of(row.relpath, settings.layout).items():
        if metadata[name] != expected:
            yield f"{path}: is of {metadata[name]!r}, the manifest says {expected!r}; {_ENCODE_AGAIN}"
    if settings.layout == "mirror" and metadata["latent_shape"] != [settings.width, latents]:
        yield f"{path}: its latent_shape is not that of the latents; {_ENCODE_AGAIN}"
    # A damaged manifest may claim any number of latents, so no list longer than the array is made.
    kept = min(max(row.latents, 0), latents)
    if row.latents != kept or metadata["padding_mask"] != [1] * kept + [0] * (latents - kept):
        yield f"{path}: its padding_mask does not fit {row.latents} of {latents} latents; {_ENCODE_AGAIN}"
    if not _is_timing(metadata, row, settings):
        yield f"{path}: its timestamps, seconds and sample_rate do not fit each other and the manifest; {_ENCODE_AGAIN}"


def _is_loudness(metadata: dict[str, Any], latents: Array, row: Row) -> bool:
    """Return whether the loudness was recorded, and is that of the latents."""
    gain, achieved = (metadata.get(name) for name in ("audio_gain_applied", "latent_rms_achieved"))
    blocks = (latents[:, begin : begin + _CHECKED] for begin in range(0, latents.shape[1], _CHECKED))
    measured = latent_rms(blocks, min(max(row.latents, 0), latents.shape[1]))
    return isinstance(gain, float) and isinstance(achieved, float) and math.isclose(achieved, measured, rel_tol=1e-3)


def _is_timing(metadata: dict[str, Any], row: Row, settings: Settings) -> bool:
    """Return whether times and sample rate fit the manifest.

    This computes the lengths in samples from the fields, and from these lengths the fields again.
    """
    rate, cut = settings.sample_rate, settings.cut
    # Values from a damaged file may have any type and size.
    try:
        begin, end = metadata["timestamps"]
        kept = round(row.seconds * rate)
        part = kept if cut.full and kept > cut.sample_size else cut.sample_size
        whole = round(part / (end - begin))
        offset = round(begin * whole)
        samples = whole if kept == part else offset + kept
        expected = timing(samples, offset, kept, rate, cut, settings.layout)
        fits = 0 < kept <= part and kept / rate == row.seconds
    except (TypeError, ValueError, ArithmeticError):
        return False
    return fits and all(metadata[name] == value for name, value in {**expected, "sample_rate": rate}.items())


def _check_silence(path: Path, settings: Settings) -> Iterator[str]:
    if not os.path.lexists(path):
        yield _missing(path)
        return
    try:
        silence = map_array(path)
    except LatentsFileError as error:
        yield _unreadable(error)
        return
    right = silence.ndim == 3 and silence.shape[:2] == (1, settings.width) and silence.dtype == settings.dtype
    if not right or not np.isfinite(silence).all():
        yield f"{path}: holds no silence latents of this model; {_ENCODE_AGAIN}"


def _missing(path: Path) -> str:
    return f"{path}: is missing; run pre-encode again"


def _unreadable(error: LatentsFileError) -> str:
    """Return the cause of an error with the cure for a file of a dataset."""
    # The file may be sound, so the message does not ask to remove it.
    if isinstance(error.__cause__, PermissionError):
        return f"{error.cause}; check its permissions"
    return f"{error.cause}; {_ENCODE_AGAIN}"
