"""Open a checkpoint in PyTorch: the entry point `torch` of `samekit.backends` names `open_torch`.

PyTorch is imported after the checks, so that the messages say which package is missing.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from samekit.engine.folder import Engine, search_path
from samekit.engine.hub import split_revision
from samekit.errors import BackendUnavailableError, CheckpointError, EngineNotFoundError
from samekit.packages import INSTALL_EXPORT, import_package
from samekit_export.checkpoint import BUNDLED_FOLDERS, HUB, hub_repository, known_name, load, load_source

if TYPE_CHECKING:
    from samekit.backends.base import Backend, BackendOptions

logger = logging.getLogger(__name__)


def open_torch(model: Engine | str, options: BackendOptions) -> Backend:
    """Open the checkpoint that an engine was exported from, or a checkpoint by its name or folder.

    Raises:
        EngineNotFoundError: there is no checkpoint of that name.
        BackendUnavailableError: a package is not installed, or the engine was exported from another checkpoint.
        BackendError: a package is installed, but cannot be imported.
        CheckpointError: the checkpoint cannot be loaded.
    """
    engine = model if isinstance(model, Engine) else None
    name, revision = split_revision(str(model))
    on_hub = engine.spec.source.get("kind") == HUB if engine else _require_checkpoint(name)
    for package in ("torch", "safetensors", *(("huggingface_hub",) if on_hub else ())):
        import_package(package, INSTALL_EXPORT)

    from samekit_export.backend import EagerBackend
    from samekit_export.model import Same
    from samekit_export.model_spec import spec_of

    if engine is None:
        # Logged before the checkpoint is loaded, because a download can take minutes.
        logger.warning(
            "no engine for %s: opening it in PyTorch, slower; for an engine run: samekit export %s", model, name
        )
    checkpoint = load_source(engine.spec.source) if engine else load(name, revision=revision)
    spec = spec_of(checkpoint)
    if engine and checkpoint.sha256 != engine.spec.source_sha256:
        raise BackendUnavailableError(
            f"{spec.origin}: not the checkpoint that {engine.folder} was exported from; export it again"
        )
    return EagerBackend(spec, Same.from_checkpoint(checkpoint), options)


def _require_checkpoint(model: str) -> bool:
    """Check that a name or folder can be a checkpoint, and return whether it is one on the hub."""
    # Path.is_dir raises for names that are too long.
    if os.path.isdir(model) or known_name(model) in BUNDLED_FOLDERS:
        return False
    try:
        hub_repository(known_name(model))
    except CheckpointError as error:
        raise EngineNotFoundError(f"no engine for {model!r} in {search_path()}, and {error}") from None
    return True
