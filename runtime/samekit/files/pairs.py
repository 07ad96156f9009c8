"""Pairs of a `.npy` file of latents and its `.json` file that are complete in memory."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np

from samekit.errors import InputError
from samekit.files.atomic import AtomicFiles, make_parents, remove_files

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    import numpy.typing as npt

    Floats = npt.NDArray[np.floating[Any]]

DTYPES: Final[dict[str, np.dtype[np.floating[Any]]]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
"""Name of a type -> the type of the values on disk."""
_TO_JSON: Final = json.JSONEncoder(allow_nan=False).encode


class Pair(NamedTuple):
    """The contents of a `.npy` file and of the `.json` file beside it."""

    name: str
    """Name of the `.npy` file below the folder of the output, with `/`."""
    npy: bytes
    json: bytes
    replaces: bool = True
    """Whether the output may hold an older `.json` file of this name."""

    @property
    def json_name(self) -> str:
        """Name of the `.json` file."""
        return self.name.removesuffix(".npy") + ".json"

    @classmethod
    def of(
        cls,
        name: str,
        latents: Floats,
        metadata: Mapping[str, Any],
        dtype: str = "float32",
        *,
        replaces: bool = True,
    ) -> Self:
        """Return the files of latents `[width, latents]`.

        Raise InputError if a latent is NaN, infinite or too large for the dtype, or the metadata are no JSON.
        """
        values = stored_values(name, latents, DTYPES[dtype])
        npy = b"".join((npy_header(values.dtype, values.shape), values.data))
        return cls(name, npy, json_text(name, metadata).encode(), replaces)


def write_pairs(folder: str | os.PathLike[str], pairs: Sequence[Pair]) -> None:
    """Write pairs so that a power failure at any moment leaves, of each, the old, the new or no `.json` file.

    Missing folders between `folder` and a file are created. All files are synced together, which takes a fraction of
    the time of one after another. Links are replaced, not followed. Raise OutputError if a file cannot be written; then
    no file has changed, unless an older file could not be removed or renaming failed.
    """
    arrays = {os.path.join(folder, pair.name): pair.npy for pair in pairs}
    texts = {os.path.join(folder, pair.json_name): pair.json for pair in pairs}
    for below in sorted({pair.name.rpartition("/")[0] for pair in pairs} - {""}):
        make_parents(Path(folder), f"{below}/")
    with AtomicFiles() as files:
        for path, data in (*arrays.items(), *texts.items()):
            files.write(path, data)
        files.sync()
        remove_files(texts)
        files.rename(arrays)
        files.rename(texts)


def npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return the header of a `.npy` file whose values are in C order."""
    header = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()


def stored_values(name: object, latents: Floats, dtype: np.dtype[Any], order: Literal["C", "F"] = "C") -> Floats:
    """Return latents in the dtype of the file; raise InputError for values that it cannot hold."""
    with np.errstate(over="ignore"):
        values = latents.astype(dtype, order=order, copy=False)
    if not np.isfinite(values).all():
        raise InputError(f"{name}: a latent is NaN or too large for {dtype}; check the encoder")
    return values


def json_text(name: object, metadata: Mapping[str, Any]) -> str:
    """Return the contents of a `.json` file, with one line for each field."""
    try:
        lines = [f"  {_TO_JSON(field)}: {_TO_JSON(value)}" for field, value in metadata.items()]
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: the metadata are no JSON ({error}); use plain values") from error
    return "{\n" + ",\n".join(lines) + "\n}\n"
