"""Load SAME checkpoints: a folder, a repository on the Hugging Face hub, or seeded random weights.

Loading is strict. Values of the configuration that the model code does not honour, and missing or unexpected tensors of
the autoencoder, raise CheckpointError, because ignoring them would give wrong audio. The other parts of a full Stable
Audio 3 checkpoint are not read.
"""

from __future__ import annotations

import dataclasses
import errno
import inspect
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samekit.engine.spec import RANDOM
from samekit.errors import CheckpointError, SamekitError
from samekit.files.json_fields import check_kinds
from samekit.files.paths import checked_path, expanded_text, read_regular, utf8_path
from samekit.packages import INSTALL_EXPORT, import_package
from samekit_export import diffusers, hub
from samekit_export.config import CONFIG_FILE, parse_config
from samekit_export.digest import checkpoint_digest
from samekit_export.hub import WEIGHTS_FILE
from samekit_export.random_weights import RANDOM_MODELS, TRAINED_LIKE, random_checkpoint
from samekit_export.tensors import (
    Checkpoint,
    check_finite,
    check_shapes,
    derived_tensors,
    is_derived,
    tensor_shapes,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from collections.abc import Set as AbstractSet

    import torch

    from samekit_export.config import SameConfig

logger = logging.getLogger(__name__)

NESTED_PREFIX = "pretransform.model."
"""Prefix of the autoencoder's tensors in a full Stable Audio 3 checkpoint."""

BUNDLED_FOLDERS = {"same-tiny": Path(__file__).with_name("same-tiny")}
"""Checkpoints that come with samekit; the folder's README.md is the model card."""

HUB = "hub"
"""Weights from the Hugging Face hub."""
BUNDLED = "bundled"
"""Weights that come with samekit."""


def load(model: str, weights: str = HUB, revision: str | None = None) -> Checkpoint:
    """Load a checkpoint.

    Args:
        model: a name of `HUB_REPOSITORIES` or `BUNDLED_FOLDERS`, in upper or lower case; a checkpoint folder; or a hub
            repository `owner/name`.
        weights: "hub" for the published weights (`same-tiny`'s come with samekit), "random" for seeded random ones,
            or a checkpoint folder.
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or not exactly what we implement.
    """
    model, weights = expanded_text(model), expanded_text(weights)
    # Functions of os.path, because the methods of Path raise for names that no file system takes.
    is_folder = weights == HUB and os.path.isdir(model)
    if not is_folder:
        model = known_name(model)
    if weights == HUB and not is_folder and model not in BUNDLED_FOLDERS:
        return load_hub(model, revision)
    if revision is not None:
        raise CheckpointError("only weights on the hub have revisions, and these are elsewhere; leave the revision out")
    if weights == RANDOM:
        return random_checkpoint(model, version=TRAINED_LIKE)
    if weights != HUB:
        return load_folder(Path(weights), model)
    return load_folder(model) if is_folder else load_bundled(model)


def known_name(model: str) -> str:
    """Return the name of a known model in lower case, and any other text as it is."""
    known = (*hub.HUB_REPOSITORIES, *BUNDLED_FOLDERS, *RANDOM_MODELS)
    return model.lower() if model.lower() in known else model


def load_source(source: Mapping[str, Any]) -> Checkpoint:
    """Load a checkpoint again from its `source`."""
    loaders: dict[Any, Callable[..., Checkpoint]] = {
        "folder": load_folder,
        HUB: load_hub,
        BUNDLED: load_bundled,
        RANDOM: random_checkpoint,
    }
    arguments = {key: value for key, value in source.items() if key != "kind"}
    try:
        loader = loaders[source["kind"]]
        inspect.signature(loader).bind(**arguments)
        check_kinds(
            arguments, dict.fromkeys(("folder", "name", "revision", "weights"), str) | {"seed": int, "version": int}
        )
    except (KeyError, TypeError):
        raise CheckpointError(f"a checkpoint source {dict(source)!r} is not known; export the model again") from None
    return loader(**arguments)


def load_bundled(name: str) -> Checkpoint:
    """Load a checkpoint of `BUNDLED_FOLDERS`.

    Raises:
        CheckpointError: no such checkpoint comes with this samekit, or it is damaged.
    """
    if name not in BUNDLED_FOLDERS:
        raise CheckpointError(f"{name!r} does not come with this samekit; choose one of {', '.join(BUNDLED_FOLDERS)}")
    return dataclasses.replace(load_folder(BUNDLED_FOLDERS[name], name), source={"kind": BUNDLED, "name": name})


def load_folder(folder: str | Path, name: str | None = None) -> Checkpoint:
    """Load a checkpoint folder: the published format, either nesting, or `diffusers`' `AutoencoderSAME`.

    Args:
        folder: holds `model_config.json` and `model.safetensors`, or `config.json` and
            `diffusion_pytorch_model.safetensors`.
        name: what to call the model; the folder's name unless given.

    Raises:
        CheckpointError: a file is missing, damaged or not readable, or the checkpoint is not exactly what we implement.
    """
    folder = Path(os.path.realpath(checked_path(folder)))
    _check_permissions(folder)
    if os.path.isfile(folder / diffusers.WEIGHTS_FILE):
        path = folder / diffusers.CONFIG_FILE
        document = diffusers.published_config(_read_config(path), str(path))
        config, _ = parse_config(document, f"{path} (fields under their published names)")
        tensors = _read_tensors(folder / diffusers.WEIGHTS_FILE, config, diffusers.published_key, "")
        tensors = {key: diffusers.published_tensor(key, tensor) for key, tensor in tensors.items()}
    else:
        if not os.path.isdir(folder):
            raise CheckpointError(f"{folder}: there is no such folder; check the path")
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not os.path.isfile(folder / file):
                raise CheckpointError(
                    f"{folder}: no {file} here; pass a folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}, "
                    f"or {diffusers.CONFIG_FILE} and {diffusers.WEIGHTS_FILE}"
                )
        config, nested = parse_config(_read_config(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
        tensors = _read_tensors(folder / WEIGHTS_FILE, config, str, NESTED_PREFIX if nested else "")
    name = name or folder.name
    source = {"kind": "folder", "folder": str(folder), "name": name}
    return Checkpoint(name, config, tensors, source, checkpoint_digest(config, tensors))


def _check_permissions(folder: Path) -> None:
    """Refuse files that may not be read; the library that reads weights would say that they do not exist."""
    files = (CONFIG_FILE, WEIGHTS_FILE, diffusers.CONFIG_FILE, diffusers.WEIGHTS_FILE)
    for path, mode in ((folder, os.R_OK | os.X_OK), *((folder / file, os.R_OK) for file in files)):
        if os.path.exists(path) and not os.access(path, mode):
            raise CheckpointError(f"{path}: cannot be read ({os.strerror(errno.EACCES)}); check its permissions")


def _read_config(path: Path) -> Any:
    try:
        return json.loads(read_regular(path).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); download the checkpoint again") from None


def _read_tensors(
    path: Path, config: SameConfig, published_key: Callable[[str], str], prefix: str
) -> dict[str, torch.Tensor]:
    """Check the shapes of the autoencoder's tensors in a safetensors file, then read the tensors."""
    from safetensors import SafetensorError, safe_open  # not needed to look up names of models

    expected = tensor_shapes(config)
    try:
        with safe_open(utf8_path(path), framework="pt") as file:
            names = {key: published_key(key) for key in file.keys()}  # noqa: SIM118 the file is no mapping
            keys = _autoencoder_keys(names, expected.keys(), prefix, str(path))
            found = {bare: tuple(file.get_slice(key).get_shape()) for bare, key in keys.items()}
            shapes = {key: shape for key, shape in expected.items() if is_derived(key)}
            check_shapes(shapes | found, config, str(path))
            # Only after that check: a configuration alone could make these tensors larger than the memory.
            derived = derived_tensors(config)
            tensors = {bare: file.get_tensor(key).float() for bare, key in keys.items()}
    except SamekitError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}); download it again") from None
    check_finite(tensors, str(path))
    for key, tensor in derived.items():
        # Half-precision checkpoints hold rounded values. A larger difference means another model.
        if key in tensors and not tensors[key].allclose(tensor, rtol=0.01):
            raise CheckpointError(
                f"{path}: tensor {key} is not what its formula gives, which is not implemented; "
                "download the checkpoint again"
            )
    return tensors | derived


def _autoencoder_keys(names: Mapping[str, str], expected: AbstractSet[str], prefix: str, source: str) -> dict[str, str]:
    """Return name without prefix -> key of the file, for the autoencoder's tensors in `names` (key -> name).

    A name that the model does not have is tried again with one of its components (any but the first) left out, as the
    reference does. Names that begin with the prefix and match nothing are returned too.
    """
    model = {prefix + name for name in expected}
    missing = model.difference(names.values())
    # Longer names cannot match. Trying them would take time that grows with the square of their length.
    most = max((name.count(".") + 2 for name in missing), default=0)
    matched: dict[str, str] = {}
    for key, name in names.items():
        if name in model or name.count(".") >= most:
            continue
        parts = name.split(".")
        candidates = (".".join(parts[:i] + parts[i + 1 :]) for i in range(1, len(parts)))
        match = next((candidate for candidate in candidates if candidate in missing), None)
        if match in matched:
            raise CheckpointError(
                f"{source}: tensors {matched[match]} and {key} can both be {match}; pass the checkpoint as it was "
                "published"
            )
        if match is not None:
            matched[match] = key
    taken = set(matched.values())
    own = {name: key for key, name in names.items() if name.startswith(prefix) and key not in taken}
    return {name.removeprefix(prefix): key for name, key in (own | matched).items()}


def save_folder(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write a checkpoint folder in the published format."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS_FILE)


def hub_repository(name: str) -> str:
    """Return the repository of a published model, or `name` itself if it is `owner/name`; the hub is not asked.

    Raises:
        CheckpointError: `name` is neither of these, or it is a path.
    """
    if name not in hub.HUB_REPOSITORIES and os.path.isfile(name):
        raise CheckpointError(f"{name}: is no folder; pass the folder of the checkpoint")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        # No name on the hub is like that (`huggingface_hub.utils.validate_repo_id`).
        raise CheckpointError(f"{name}: there is no such folder; check the path")
    repository = hub.HUB_REPOSITORIES.get(name, name)
    if repository.count("/") != 1:
        known = ", ".join([*hub.HUB_REPOSITORIES, *BUNDLED_FOLDERS])
        raise CheckpointError(
            f"{name!r} is no published model ({known}), no hub repository owner/name and no folder; pass one of these"
        )
    return repository


def load_hub(name: str, revision: str | None = None, weights: str | None = None) -> Checkpoint:
    """Load a published checkpoint through `huggingface_hub`, from its cache if possible.

    A checkpoint in the cache that cannot be used is skipped with a warning if there is another.

    Args:
        name: a name of `HUB_REPOSITORIES`, or any hub repository `owner/name`.
        revision: branch, tag or commit; unless given, the pinned revision of a known repository, and the default branch
            of others.
        weights: what `describe_weights` returned in an earlier load. Unless given, the files of a known repository are
            hashed.

    Raises:
        CheckpointError: unknown name, no network and no cache, no access, or an unusable checkpoint.
        BackendUnavailableError: `huggingface_hub` is not installed.
    """
    repository = hub_repository(name)
    import_package("huggingface_hub", INSTALL_EXPORT)
    failures: list[CheckpointError] = []
    for found, folder, description in hub.snapshots(repository, hub.CONTAINING_REPOSITORIES.get(name, ()), revision):
        if failures:
            logger.warning("passed over in the hub's cache: %s", failures[-1])
        try:
            loaded = load_folder(folder, name.rsplit("/", 1)[-1].lower())
        except CheckpointError as error:
            failures.append(error)
            continue
        # A snapshot's folder is named after its commit.
        source = {"kind": HUB, "name": found, "revision": folder.name}
        described = weights or description or hub.describe_weights(found, folder)
        if described:
            source["weights"] = described
        if described and described not in (weights, hub.PUBLISHED_WEIGHTS):
            logger.warning("%s, revision %s: %s", found, folder.name, described)
        return dataclasses.replace(loaded, source=source)
    raise failures[0]
