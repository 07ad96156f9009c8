"""Publish an engine folder on the hub, and copy an engine, or one half of it, to a new folder."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import shutil
from typing import TYPE_CHECKING, Final

from samekit.engine import hub, model_card
from samekit.engine.contents import commit_export, is_engine_file, is_graph_file, remove_leftovers, staging_folder
from samekit.engine.folder import Engine
from samekit.engine.spec import SPEC_FILE
from samekit.errors import EngineError, HubError, InputError, OutputError
from samekit.files.atomic import output_errors
from samekit.files.locks import folder_lock

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from samekit.engine.spec import Direction, EngineSpec

logger = logging.getLogger(__name__)

# A repository with the text of the licence, which can be read without access to the weights; its commit and its digest.
_LICENSE_SOURCE: Final = ("stabilityai/stable-audio-3-medium", "27b5a21b791b1b033d193a9e1e3ce78493f102f9")
_LICENSE_SHA256: Final = "d6f6b1a4dce5c852bd6d7d9482d002baf0ccdb71e662250b73be9eec8764ee8d"


def publish(engine: Engine, repository: str, *, branch: str | None = None, private: bool = False) -> str:
    """Upload an engine to a repository on the hub, which is created if it does not exist, in one commit.

    The commit holds the graphs, `spec.json`, a model card, and what the licence of the weights asks for. It deletes
    graphs that the repository held before. TensorRT engines are left out, because they fit one kind of GPU. A model
    card that samekit has not written is kept. The caller asks for consent, see `model_card.duties`.

    Returns:
        `owner/name@COMMIT`.

    Raises:
        EngineError: a graph of the engine is damaged.
        HubError: the hub cannot be reached or refuses, or the repository is public although `private` was asked for.
        BackendUnavailableError: the client of the hub is not installed.
    """
    hub.require_client()
    if not hub.REPOSITORY.fullmatch(repository):
        raise InputError(f"{repository!r} is no repository of the hub; pass owner/name")
    engine.check_digests()
    spec = _without_paths(engine.spec)
    files: dict[str, Path | bytes] = {
        name: engine.folder / name for pair in spec.graphs.values() for graph in pair.values() for name in graph.sizes
    }
    files[SPEC_FILE] = spec.to_json().encode()
    if notice := model_card.notice(spec):
        files[model_card.NOTICE_FILE] = notice.encode()
        files[model_card.LICENSE_FILE] = _licence_text(engine)
    hub.create_repository(repository, branch, private=private)
    present = hub.read_file(repository, model_card.CARD_FILE, branch)
    if present is None or model_card.CARD_MARK.encode() in present:
        files[model_card.CARD_FILE] = model_card.model_card(spec, repository).encode()
    else:
        logger.warning(
            "%s of %s is kept, because samekit has not written it; see that it says what the licence asks for",
            model_card.CARD_FILE,
            repository,
        )
    return f"{repository}@{hub.upload(repository, files, branch, is_obsolete=is_graph_file)}"


def _without_paths(spec: EngineSpec) -> EngineSpec:
    """Return a spec that does not tell where a checkpoint folder lies on this machine."""
    source = dict(spec.source)
    if "folder" in source:
        source["folder"] = os.path.basename(str(source["folder"]))
    return dataclasses.replace(spec, source=source)


def _licence_text(engine: Engine) -> bytes:
    """Return the Stability AI Community License, from the engine folder or from the hub."""
    local = engine.folder / model_card.LICENSE_FILE
    if local.is_symlink():
        # A folder that was downloaded may hold a link to any file of the user, which must not be published.
        raise EngineError(f"{local}: is a link; put the licence itself there")
    if local.is_file():
        return local.read_bytes()
    repository, commit = _LICENSE_SOURCE
    try:
        text = hub.read_file(repository, local.name, commit)
    except HubError as error:
        raise EngineError(f"{local}: is missing, and {error.cause}; put the licence there") from None
    if text is None or hashlib.sha256(text).hexdigest() != _LICENSE_SHA256:
        raise EngineError(f"{local}: is missing, and {repository} does not hold the known text; put the licence there")
    return text


def fetch(engine: Engine, precisions: Sequence[str], directions: Sequence[Direction]) -> None:
    """Put graphs of an engine on the hub into the cache; errors as of `Engine.graph`."""
    for precision in precisions:
        for direction in directions:
            engine.graph(direction, precision)


def copy_engine(engine: Engine, folder: Path, precisions: Sequence[str], directions: Sequence[Direction]) -> None:
    """Copy some graphs of an engine to a new folder, which becomes an engine folder of these graphs.

    A folder that holds these graphs already is left as it is, and what a killed copy left is replaced.

    Raises:
        BackendUnavailableError, EngineError, HubError: as `Engine.graph`.
        OutputError: the folder holds something else, or cannot be written.
    """
    chosen = {p: {d: engine.graph_file(d, p) for d in directions} for p in precisions}
    verification = {p: engine.spec.verification.get(p, []) for p in precisions}
    spec = dataclasses.replace(engine.spec, graphs=chosen, verification=verification)
    with output_errors(folder):
        # The folder is checked before gigabytes are fetched, and again while no other process can write there.
        if _holds(folder, spec):
            return
        fetch(engine, precisions, directions)
        with folder_lock(folder):
            if _holds(folder, spec):
                return
            remove_leftovers(folder)
            with staging_folder(folder) as staging:
                for name in (name for pair in chosen.values() for graph in pair.values() for name in graph.sizes):
                    shutil.copyfile(engine.folder / name, staging / name)
                commit_export(folder, staging, spec)


def _holds(folder: Path, spec: EngineSpec) -> bool:
    """Return whether a folder holds all files of an engine; raise OutputError if it holds something else."""
    if not (folder / SPEC_FILE).exists():
        if folder.exists() and not all(map(is_engine_file, folder.iterdir())):
            raise OutputError(f"{folder}: holds other files; pass a new folder")
        return False
    found = Engine.load(folder)
    if found.spec != spec:
        raise OutputError(f"{folder}: holds another engine; pass a new folder")
    try:
        for precision in spec.graphs:
            found.check(precision)
    except EngineError:
        return False
    return True
