"""Latents on disk: a `.npy` file that plain NumPy reads, and metadata in a `.json` file beside it.

Latents are `[width, latents]`; the width is the length of one latent vector. Files are written in C order, because some
readers accept no other. The `.json` file holds the dict that the writer was given. It is written after its `.npy` file
and deleted before that is replaced. So a `.json` file always belongs to the `.npy` file beside it, and shows that the
pair is complete.
"""

from __future__ import annotations

import io
import json
import math
import os
import reprlib
import tempfile
import tokenize
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from samekit.errors import InputError, LatentsFileError, OutputError
from samekit.files.atomic import atomic_path, output_errors
from samekit.files.pairs import DTYPES, json_text, npy_header, stored_values
from samekit.files.paths import checked_path, open_regular, read_regular

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

    Floats = npt.NDArray[np.floating[Any]]

MODEL_DIGEST: Final = "model_sha256"
"""Field of the `.json` beside latents that names the weights, by their digest."""
PADDING_MASK: Final = "padding_mask"
"""Field of the `.json` that only clips of a dataset have."""

# NumPy refuses headers above 10,000 bytes, but only after reading as many bytes as the file claims.
_HEAD_BYTES: Final = 12_000
_HEADER_READERS: Final = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
# What NumPy raises for damaged headers, found by trying; KeyError means another version of the format.
_HEADER_ERRORS: Final = (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError, KeyError)
# Values that are checked or transposed at a time, to keep memory flat.
_CHECKED_VALUES: Final = 2**20
_TRANSPOSED_VALUES: Final = 2**18


class LatentsWriter:
    """Write latents block by block, in memory that does not grow with their number.

    Use it in a `with` statement: the `.npy` file and its `.json` file appear when the block ends without an error.
    Blocks are collected in a nameless temporary file, `[latents, width]`, in the same folder. At the end it is
    transposed, a part at a time, into the `.npy` file. So the disk needs room for the latents twice.

    `dtype`, of the values on disk, is `float32` or `float16`. For `follow_links` see `atomic_path`.

    Raises:
        InputError: the suffix is not `.npy`, or the dtype is another.
        OutputError: the folder is missing, not writable or full. Older files of these names stay.
    """

    def __init__(
        self, path: str | os.PathLike[str], width: int, dtype: str = "float32", *, follow_links: bool = False
    ) -> None:
        self.path = Path(path)
        """The `.npy` file."""
        self.metadata: dict[str, Any] = {}
        """The contents of the `.json` file; fill it before the `with` block ends."""
        self.latents = 0
        """The number of latents written so far."""
        self._width = width
        self._follow_links = follow_links
        _require_npy(self.path)
        if dtype not in DTYPES:
            raise InputError(f"latents are not stored as {dtype!r}; use one of {', '.join(DTYPES)}")
        self._dtype = DTYPES[dtype]

    def __enter__(self) -> Self:
        with ExitStack() as stack, output_errors(self.path):
            # Closed in the opposite order: the .npy file takes its place first, then the .json file.
            self._json = stack.enter_context(atomic_path(_json_path(self.path), follow_links=self._follow_links))
            self._npy = stack.enter_context(atomic_path(self.path, follow_links=self._follow_links))
            self._blocks = stack.enter_context(tempfile.TemporaryFile(dir=self._npy.parent))
            self._outputs = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._outputs.callback(self._finish)
        with output_errors(self.path):
            self._outputs.__exit__(kind, error, trace)

    def write(self, block: Floats) -> None:
        """Append latents `[width, latents]`.

        Raises:
            InputError: the block has another shape, or a value is NaN, infinite or too large for the dtype.
            OutputError: the disk is full.
        """
        if block.ndim != 2 or block.shape[0] != self._width:
            raise InputError(f"block of shape {block.shape} does not fit; give [{self._width}, latents]")
        values = stored_values(self.path, block, self._dtype, "F")
        with output_errors(self.path):
            self._blocks.write(values.T.data)
        self.latents += block.shape[1]

    def _transpose(self) -> None:
        """Write the `.npy` file from the collected blocks."""
        header = npy_header(self._dtype, (self._width, self.latents))
        step, size = max(1, _TRANSPOSED_VALUES // self._width), self._dtype.itemsize
        self._blocks.seek(0)
        with self._npy.open("wb") as file:
            file.write(header)
            for begin in range(0, self.latents, step):
                data = self._blocks.read(min(step, self.latents - begin) * self._width * size)
                rows = np.ascontiguousarray(np.frombuffer(data, self._dtype).reshape(-1, self._width).T)
                for index, row in enumerate(rows):
                    file.seek(len(header) + (index * self.latents + begin) * size)
                    file.write(row.data)

    def _finish(self) -> None:
        """Complete both temporary files, and delete the `.json` file of the latents that are replaced."""
        text = json_text(self.path, self.metadata)
        self._transpose()
        self._json.write_text(text, encoding="utf-8")
        old = _json_path(self.path)
        # With `follow_links` the file that a link leads to is replaced, and the link stays.
        (Path(os.path.realpath(old)) if self._follow_links else old).unlink(missing_ok=True)


def read_latents(path: str | os.PathLike[str], width: int | None = None) -> tuple[Floats, dict[str, Any]]:
    """Map latents from a `.npy` file, after checking every value, and read the `.json` file beside it.

    Args:
        path: the `.npy` file, `[width, latents]` or `[1, width, latents]`, of float16, float32 or float64.
        width: the expected width, or None for any.

    Returns:
        The latents, `[width, latents]`, read-only and of the file's dtype; and the metadata, empty without a `.json`.

    Raises:
        LatentsFileError: the file is missing, cut off, empty, not an array of finite numbers, or of another width;
            or the `.json` file is damaged.
    """
    path = checked_path(path)
    latents = map_array(path)
    latents = latents.reshape(_clip_shape(path, latents.shape, width))
    flat = latents.ravel(order="K")
    for start in range(0, flat.size, _CHECKED_VALUES):
        _check_finite(path, flat[start : start + _CHECKED_VALUES])
    return latents, _read_metadata(_metadata_path(path))


class LatentsReader:
    """Read latents block by block, in memory that does not grow with their number.

    Arguments and errors are those of `read_latents`, but values are checked while they are read. The file is not
    mapped: if a mapped file shrinks, reading it ends the process.
    """

    def __init__(self, path: str | os.PathLike[str], width: int | None = None) -> None:
        self._path = checked_path(path)
        with _readable(self._path) as file:
            self._header = _read_header(self._path, file)
        self.width, self.latents = _clip_shape(self._path, self._header.shape, width)
        self.metadata = _read_metadata(_metadata_path(self._path))
        """The contents of the `.json` file; empty if there is none."""

    def blocks(self, latents: int) -> Iterator[Floats]:
        """Yield blocks `[width, latents]` of the file's dtype; the last one may be shorter.

        Raise LatentsFileError if a value is NaN or infinite, or the file has become shorter.
        """
        with _readable(self._path) as file:
            for begin in range(0, self.latents, latents):
                block = self._read(file, begin, min(latents, self.latents - begin))
                _check_finite(self._path, block)
                yield block

    def _read(self, file: BinaryIO, begin: int, count: int) -> Floats:
        if self._header.fortran_order:
            return self._read_values(file, begin * self.width, count * self.width).reshape(count, self.width).T
        starts = range(begin, self.width * self.latents, self.latents)
        return np.stack([self._read_values(file, start, count) for start in starts])

    def _read_values(self, file: BinaryIO, start: int, count: int) -> Floats:
        """Read values that are adjacent in the file."""
        size = self._header.dtype.itemsize
        file.seek(self._header.offset + start * size)
        data = file.read(count * size)
        if len(data) != count * size:
            raise _cut_off(self._path)
        return np.frombuffer(data, self._header.dtype)


def map_array(path: Path) -> Floats:
    """Map the array of a `.npy` file.

    Raise LatentsFileError if the file is missing, cut off, or not an array of at least one floating-point number.
    """
    with _readable(path) as file:
        header = _read_header(path, file)
        order: Literal["F", "C"] = "F" if header.fortran_order else "C"
        # A plain array that keeps the map alive: np.memmap would make every result computed from it a memmap too.
        return np.asarray(np.memmap(file, header.dtype, "r", header.offset, header.shape, order))


class _Header(NamedTuple):
    """The header of a `.npy` file."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]
    offset: int
    """Bytes before the first value."""


def _read_header(path: Path, file: BinaryIO) -> _Header:
    """Read the header of an open `.npy` file, and check it against the size of the file."""
    head = io.BytesIO(file.read(_HEAD_BYTES))
    file_bytes = file.seek(0, os.SEEK_END)
    try:
        shape, fortran_order, dtype = _HEADER_READERS[np.lib.format.read_magic(head)](head)
    except _HEADER_ERRORS as error:
        raise LatentsFileError(f"{path}: is no .npy file, or a damaged one; encode the audio again") from error
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise LatentsFileError(f"{path}: holds {dtype.name} values; convert them to float32, or encode again")
    if len(shape) > 3:
        raise LatentsFileError(f"{path}: has shape {reprlib.repr(shape)}; give one clip, [width, latents]")
    # NumPy accepts true in place of one.
    shape = tuple(map(int, shape))
    if min(shape, default=0) < 1:
        raise LatentsFileError(f"{path}: holds no latents, its shape is {shape}; encode the audio again")
    if head.tell() + math.prod(shape) * dtype.itemsize > file_bytes:
        raise _cut_off(path)
    return _Header(shape, fortran_order, dtype, head.tell())


def _clip_shape(path: Path, shape: tuple[int, ...], width: int | None) -> tuple[int, int]:
    """Return the width and the number of latents of one clip."""
    if len(shape) < 2 or shape[:-2] not in ((), (1,)):
        raise LatentsFileError(f"{path}: has shape {shape}; give one clip, [width, latents]")
    found, latents = shape[-2:]
    if width is not None and found != width:
        raise LatentsFileError(
            f"{path}: its latents are {found} wide, the model's {width}; use the model that made them"
        )
    return found, latents


def _check_finite(path: Path, values: Floats) -> None:
    if not np.isfinite(values).all():
        raise LatentsFileError(f"{path}: holds NaN or infinity; encode the audio again")


def _cut_off(path: Path) -> LatentsFileError:
    return LatentsFileError(f"{path}: is cut off; copy it or encode the audio again")


@contextmanager
def _readable(path: Path) -> Iterator[BinaryIO]:
    """Open a file, and raise errors of the operating system as LatentsFileError."""
    with _opening_errors(path), open_regular(path) as file:
        yield file


@contextmanager
def _opening_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise LatentsFileError(f"{path}: cannot be opened ({reason}); check name and permissions") from error


def _require_npy(path: Path) -> None:
    if path.suffix != ".npy":
        raise InputError(f"{path}: {path.suffix!r} is no format for latents; use .npy")


def require_replaceable(path: str | os.PathLike[str]) -> None:
    """Check that the `.json` file beside latents, if there is one, describes one encoded file and may be replaced.

    Raises:
        InputError: the suffix is not `.npy`.
        OutputError: it describes something else, such as a clip of a dataset, or cannot be read.
    """
    path = checked_path(path)
    _require_npy(path)
    metadata = _json_path(path)
    try:
        known = _read_metadata(metadata) if metadata.exists() else {MODEL_DIGEST: None}
        ours = MODEL_DIGEST in known and PADDING_MASK not in known
    except (LatentsFileError, OSError):
        ours = False
    if not ours:
        raise OutputError(f"{metadata}: is of something else, and is not replaced; move it, or choose another name")


def _json_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _metadata_path(path: Path) -> Path:
    """Return the metadata file of latents: beside the link's target if `path` is a link and nothing is beside it."""
    beside = _json_path(path)
    if path.is_symlink() and not os.path.lexists(beside):
        return _json_path(Path(os.path.realpath(path)))
    return beside


def _read_metadata(path: Path) -> dict[str, Any]:
    """Read a `.json` file; return an empty dict if it is missing."""
    with _opening_errors(path):
        try:
            data = read_regular(path)
        except FileNotFoundError:
            return {}
    try:
        metadata = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise LatentsFileError(f"{path}: is damaged; remove it") from error
    if not isinstance(metadata, dict):
        raise LatentsFileError(f"{path}: holds no JSON object; remove it")
    return metadata
