"""Latents on disk: a `.npy` file that plain NumPy reads, and a `.json` beside it. Knows no model, no pickle.

Latents are float32 `[width, latents]`; the width is the length of one latent vector. The `.json` holds the
dict that the writer was given. It appears after its `.npy` and goes before that is replaced: a `.json` always
belongs to the `.npy` beside it, and says that the pair is complete.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import tokenize
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal

import numpy as np
import numpy.typing as npt

from samekit.errors import InputError, LatentsFileError, OutputError
from samekit.files.atomic import atomic_path, output_errors
from samekit.files.paths import checked_path, open_regular, read_regular

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

MODEL_DIGEST: Final = "model_sha256"
"""Field of the `.json` beside latents that names the weights, by their digest."""
PADDING_MASK: Final = "padding_mask"
"""Field of the `.json` that only clips of a dataset have."""

_DTYPES: Final[dict[str, np.dtype[np.floating[Any]]]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
}
# Size of every header written here: it holds any shape, and is a multiple of 64 as the format asks.
_HEADER_BYTES: Final = 128
# NumPy's own limit.
_MOST_HEADER_BYTES: Final = 10_000
# Values that are checked at a time, to keep memory flat.
_CHECKED_VALUES: Final = 2**20
# What NumPy raises for damaged headers, found by damaging many.
_HEADER_ERRORS: Final = (
    ValueError,
    TypeError,
    SyntaxError,
    MemoryError,
    RecursionError,
    tokenize.TokenError,
)


class LatentsWriter:
    """Write latents block by block in a memory that does not grow with their number.

    The `.npy` file and its `.json` appear when the `with` block ends well, or not at all.

    Args:
        path: the `.npy` file; the `.json` gets the same name.
        width: length of one latent vector.
        dtype: of the values on disk, `float32` or `float16`.
        follow_links: whether files that symbolic links lead to are replaced, as `atomic_path` does it.

    Raises:
        InputError: the suffix is not `.npy`, or the dtype is another.
        OutputError: the folder is missing, not writable or full.
    """

    def __init__(
        self, path: str | os.PathLike[str], width: int, dtype: str = "float32", *, follow_links: bool = False
    ) -> None:
        self.path = Path(path)
        """The `.npy` file; not there before the `with` block ends."""
        self.metadata: dict[str, Any] = {}
        """What becomes the `.json`; fill it before the `with` block ends."""
        self.latents = 0
        """How many were written so far."""
        self._width = width
        self._follow_links = follow_links
        _require_npy(self.path)
        if dtype not in _DTYPES:
            raise InputError(f"latents are not stored as {dtype!r}; use one of {', '.join(_DTYPES)}")
        self._dtype = _DTYPES[dtype]

    def __enter__(self) -> Self:
        with ExitStack() as stack, output_errors(self.path):
            # Closed in the opposite order: the .npy takes its place first, then the .json.
            self._json = stack.enter_context(atomic_path(_json_path(self.path), follow_links=self._follow_links))
            temporary = stack.enter_context(atomic_path(self.path, follow_links=self._follow_links))
            self._file: BinaryIO = stack.enter_context(temporary.open("wb"))
            self._file.write(self._header())
            self._outputs = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with output_errors(self.path):
            if error is not None:
                self._outputs.__exit__(kind, error, trace)
                return
            with self._outputs:
                self._finish()

    def write(self, block: npt.NDArray[np.floating[Any]]) -> None:
        """Append latents.

        Args:
            block: `[width, latents]`, finite in the dtype of the file.

        Raises:
            InputError: the block has another shape, or a value is NaN, infinite or too large for the dtype.
            OutputError: the disk is full.
        """
        if block.ndim != 2 or block.shape[0] != self._width:
            raise InputError(f"block of shape {block.shape} does not fit; give [{self._width}, latents]")
        # The bytes of a growing C-ordered [latents, width] array are those of a Fortran-ordered
        # [width, latents] array, so blocks can be appended.
        with np.errstate(over="ignore"):
            values = block.T.astype(self._dtype, order="C")
        if not np.isfinite(values).all():
            raise InputError(f"{self.path}: a latent is NaN or too large for {self._dtype}; check the encoder")
        with output_errors(self.path):
            self._file.write(values.tobytes())
        self.latents += block.shape[1]

    def _finish(self) -> None:
        """Complete both temporary files and make way for the new pair."""
        try:
            text = json.dumps(self.metadata, indent=2, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"{self.path}: the metadata are no JSON ({error}); use plain values") from error
        self._file.seek(0)
        self._file.write(self._header())
        self._json.write_text(text + "\n", encoding="utf-8")
        old = _json_path(self.path)
        if self._follow_links:
            # The file that a link leads to is removed, because it is what will be replaced; the link stays.
            old = Path(os.path.realpath(old))
        old.unlink(missing_ok=True)

    def _header(self) -> bytes:
        """Return the header for the latents written so far, in version 1.0 of NumPy's format."""
        fields = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": True,
            "shape": (self._width, self.latents),
        }
        magic = np.lib.format.magic(1, 0)
        text_bytes = _HEADER_BYTES - len(magic) - 2
        text = repr(fields).ljust(text_bytes - 1) + "\n"
        return magic + text_bytes.to_bytes(2, "little") + text.encode("ascii")


def read_latents(
    path: str | os.PathLike[str], width: int | None = None
) -> tuple[npt.NDArray[np.floating[Any]], dict[str, Any]]:
    """Map latents from a `.npy` file, after checking every value, and read the `.json` beside it.

    Args:
        path: the `.npy` file, `[width, latents]` or `[1, width, latents]`, of float16, float32 or float64.
        width: the width that is wanted, or None for any.

    Returns:
        The latents, `[width, latents]`, read-only and of the file's dtype, which come from disk as they are
        used; and the metadata, empty if there is no `.json`.

    Raises:
        LatentsFileError: the file is missing, cut off, no array of finite numbers, empty, or of another
            width; or the `.json` is damaged.
    """
    path = checked_path(path)
    latents = map_array(path)
    latents = latents.reshape(_clip_shape(path, latents.shape, width))
    flat = latents.ravel(order="K")
    for start in range(0, flat.size, _CHECKED_VALUES):
        _check_finite(path, flat[start : start + _CHECKED_VALUES])
    return latents, _read_metadata(_metadata_path(path))


class LatentsReader:
    """Read latents block by block, in a memory that does not grow with their number.

    Unlike `read_latents` it maps nothing: where the file shrinks meanwhile, reading a map would end the process.

    Args:
        path: the `.npy` file, as `read_latents` takes it.
        width: the width that is wanted, or None for any.

    Raises:
        LatentsFileError: as `read_latents`; what the values are shows while they are read.
    """

    def __init__(self, path: str | os.PathLike[str], width: int | None = None) -> None:
        self._path = checked_path(path)
        self._layout = _read_layout(self._path)
        self.width, self.latents = _clip_shape(self._path, self._layout.shape, width)
        self.metadata = _read_metadata(_metadata_path(self._path))
        """What the `.json` holds; empty if there is none."""

    def blocks(self, latents: int) -> Iterator[npt.NDArray[np.floating[Any]]]:
        """Yield `[width, latents]` of the file's dtype, the last block maybe shorter.

        Args:
            latents: in a block.

        Raises:
            LatentsFileError: a value is NaN or infinite, or the file has become shorter.
        """
        with _readable(self._path) as file:
            for begin in range(0, self.latents, latents):
                block = self._read(file, begin, min(latents, self.latents - begin))
                _check_finite(self._path, block)
                yield block

    def _read(self, file: BinaryIO, begin: int, count: int) -> npt.NDArray[np.floating[Any]]:
        if self._layout.fortran_order:
            return self._read_values(file, begin * self.width, count * self.width).reshape(count, self.width).T
        starts = range(begin, self.width * self.latents, self.latents)
        return np.stack([self._read_values(file, start, count) for start in starts])

    def _read_values(self, file: BinaryIO, start: int, count: int) -> npt.NDArray[np.floating[Any]]:
        """Values that lie side by side in the file."""
        size = self._layout.dtype.itemsize
        file.seek(self._layout.offset + start * size)
        data = file.read(count * size)
        if len(data) != count * size:
            raise _cut_off(self._path)
        return np.frombuffer(data, self._layout.dtype)


@dataclass(frozen=True)
class _Layout:
    """Where the values of a `.npy` file lie, once its header is known to be true."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]
    offset: int
    """Bytes before the first value."""


def _clip_shape(path: Path, shape: tuple[int, ...], width: int | None) -> tuple[int, int]:
    """Width and latents of one clip."""
    *batch, found, latents = shape if len(shape) > 1 else (0, 0, 0, 0)
    if batch not in ([], [1]):
        raise LatentsFileError(f"{path}: has shape {shape}; give one clip, [width, latents]")
    if width is not None and found != width:
        raise LatentsFileError(
            f"{path}: its latents are {found} wide, the model's {width}; use the model that made them"
        )
    return found, latents


def _check_finite(path: Path, values: npt.NDArray[np.floating[Any]]) -> None:
    if not np.isfinite(values).all():
        raise LatentsFileError(f"{path}: holds NaN or infinity; encode the audio again")


def _cut_off(path: Path) -> LatentsFileError:
    return LatentsFileError(f"{path}: is cut off; copy it or encode the audio again")


@contextmanager
def _readable(path: Path) -> Iterator[BinaryIO]:
    """The open file; what goes wrong with it becomes a LatentsFileError."""
    try:
        with open_regular(path) as file:
            yield file
    except OSError as error:
        reason = error.strerror or error
        raise LatentsFileError(f"{path}: cannot be opened ({reason}); check name and permissions") from error


def map_array(path: Path) -> npt.NDArray[np.floating[Any]]:
    """Map the array of a `.npy` file once its header is known to be true.

    Raises:
        LatentsFileError: the file is missing, cut off, or no array of floating-point numbers, or of none at all.
    """
    layout = _read_layout(path)
    order: Literal["F", "C"] = "F" if layout.fortran_order else "C"
    # A plain array that keeps the map alive: np.memmap would make every result computed from it a memmap too.
    return np.asarray(np.memmap(path, layout.dtype, "r", layout.offset, layout.shape, order))


def _read_layout(path: Path) -> _Layout:
    """Read the header of a `.npy` file, and check it against the size of the file."""
    with _readable(path) as file:
        try:
            shape, fortran_order, dtype = _read_header(file)
        except _HEADER_ERRORS as error:
            raise LatentsFileError(f"{path}: is no .npy file, or a damaged one; encode the audio again") from error
        offset = file.tell()
        data_bytes = file.seek(0, os.SEEK_END) - offset
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise LatentsFileError(f"{path}: holds {dtype.name} values; convert them to float32, or encode again")
    if len(shape) > 3:
        raise LatentsFileError(f"{path}: has shape {reprlib.repr(shape)}; give one clip, [width, latents]")
    # In a header, true may stand for one.
    shape = tuple(map(int, shape))
    if min(shape, default=0) < 1:
        raise LatentsFileError(f"{path}: holds no latents, its shape is {shape}; encode the audio again")
    if math.prod(shape) * dtype.itemsize > data_bytes:
        raise _cut_off(path)
    return _Layout(shape, bool(fortran_order), dtype, offset)


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of a `.npy` file: shape, whether in Fortran order, dtype."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        # NumPy reads all that the header claims to be, and judges it then.
        claimed = int.from_bytes(file.read(4), "little")
        if claimed > _MOST_HEADER_BYTES:
            raise ValueError(claimed)
        file.seek(-4, os.SEEK_CUR)
        return np.lib.format.read_array_header_2_0(file)
    # Version 3.0 names the fields of structured arrays.
    raise ValueError(version)


def _require_npy(path: Path) -> None:
    if path.suffix != ".npy":
        raise InputError(f"{path}: {path.suffix!r} is no format for latents; use .npy")


def require_replaceable(path: str | os.PathLike[str]) -> None:
    """Refuse to write latents where the `.json` beside them is not of one encoded file: it would be replaced.

    That of a clip of a dataset is refused too. A link that leads nowhere holds nothing.

    Raises:
        InputError: the suffix is not `.npy`.
        OutputError: there is such a `.json`, or one that cannot be read.
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
    """Return where the metadata of a `.npy` file are."""
    return path.with_suffix(".json")


def _metadata_path(path: Path) -> Path:
    """Return where the metadata of latents are that are read: beside a link's target if none are beside the link."""
    beside = _json_path(path)
    if path.is_symlink() and not os.path.lexists(beside):
        return _json_path(Path(os.path.realpath(path)))
    return beside


def _read_metadata(path: Path) -> dict[str, Any]:
    """Read a `.json` file, or nothing if it is not there."""
    try:
        metadata = json.loads(read_regular(path).decode())
    except FileNotFoundError:
        return {}
    except OSError as error:
        reason = error.strerror or error
        raise LatentsFileError(f"{path}: cannot be opened ({reason}); check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise LatentsFileError(f"{path}: is damaged; remove it") from error
    if not isinstance(metadata, dict):
        raise LatentsFileError(f"{path}: holds no JSON object; remove it")
    return metadata
