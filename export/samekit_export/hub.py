"""Find the files of published weights in the cache of the Hugging Face hub, or download them."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from samekit.engine.hub import explain
from samekit.errors import CheckpointError
from samekit_export.config import CONFIG_FILE

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
"""Name of the published weights."""

FILES = (CONFIG_FILE, WEIGHTS_FILE)
"""The files of a repository that are downloaded and read."""

PUBLISHED_WEIGHTS = "published weights"
"""The description of files that have the published digests."""

_FULL_MODELS = {
    name: f"stabilityai/stable-audio-3-{name}"
    for name in ("small-music", "small-sfx", "small-music-base", "small-sfx-base", "medium", "medium-base")
}

HUB_REPOSITORIES = {"same-s": "stabilityai/SAME-S", "same-l": "stabilityai/SAME-L", **_FULL_MODELS}
"""Name of a model -> repository of its published weights. The names are those of the reference."""

CONTAINING_REPOSITORIES = {
    model: tuple(repository for name, repository in _FULL_MODELS.items() if name.startswith(size))
    for model, size in (("same-s", "small"), ("same-l", "medium"))
}
"""Full models that contain the same autoencoder. If one is in the cache, nothing needs to be downloaded."""


@dataclass(frozen=True)
class Published:
    """A revision of a repository whose files are known."""

    revision: str
    """Commit."""
    sizes: dict[str, int]
    """Bytes of each file."""
    digests: dict[str, str]
    """SHA-256 of each file."""


def _published(revision: str, config: tuple[int, str], weights: tuple[int, str]) -> Published:
    files = {CONFIG_FILE: config, WEIGHTS_FILE: weights}
    sizes = {file: size for file, (size, _) in files.items()}
    return Published(revision, sizes, {file: digest for file, (_, digest) in files.items()})


PUBLISHED = {
    "stabilityai/SAME-S": _published(
        "fbeb3dcf53a326e5682f38e22e7f740202d44232",
        (2_040, "c329dd0a6f61d0b3ea4f23930059a6c00437005692fed4310924eb286253303a"),
        (433_007_588, "c19698ce3a0b462acb967ee495e9eb7945221f236968c50206cce8cf22b3d305"),
    ),
    "stabilityai/SAME-L": _published(
        "41acf79dd242877d6499a1108ca5dba5d5eecfc5",
        (5_915, "9ca55d03d868b8f6769cd7d678430a6b70c328db24350601903a92001bd4f9f1"),
        (3_408_566_892, "8cf93d5345c559307fc429bde896f594516fd6a1a23014c2f6055f78d8e13378"),
    ),
    "stabilityai/stable-audio-3-small-music": _published(
        "0fef1392cd842149a2b6d445e181c97608faac06",
        (10_341, "100776f25af5aa83f70e0c6b384de6690cb4e5ad01c24f7cfbb6524d18765f06"),
        (2_270_384_940, "da85866b11b01d0694d990785f6abbd79c8064df1b0e6f8aea52935e0ef84b64"),
    ),
    "stabilityai/stable-audio-3-small-sfx": _published(
        "ae12755283df9d62ca39a9b050a39a0b607b8c20",
        (10_454, "a8aa5d45ae3d6524d3cd4e85e0d6e7d8d401267e7c6f28214bca8aae7b77bdeb"),
        (2_270_384_940, "ed9cf1b6172f1a8c2921a9560c21109ff3239524563ced9dce6dcdef41e2f515"),
    ),
    "stabilityai/stable-audio-3-medium": _published(
        "27b5a21b791b1b033d193a9e1e3ce78493f102f9",
        (10_360, "4f8846649df59167e1792d134acb6fc2bb7105227c5455300bad6cb107e20c88"),
        (9_222_116_660, "48d9c65e290e7bcd5194e0633bfc2424a59ee9683f5c2d58762d997b7d8ce0b5"),
    ),
    "stabilityai/stable-audio-3-small-music-base": _published(
        "eab5ceee5ad9c1ed38800aff30a8e49d1161c539",
        (8_452, "e97f53a0882a99b0307cf7d87d63423f75925b5def5efc180d29740899c62486"),
        (2_270_384_940, "79691fac2a08a99a229b98963f8377ddc78c16f5c63f7e3a022375c311093ab4"),
    ),
    "stabilityai/stable-audio-3-small-sfx-base": _published(
        "cc5ddb990e30daa68336ac61c140c37c7033ab7c",
        (8_476, "cecfbca43fa8ece5d1d128fba74a39594ea954b2b128048534f72665c6721165"),
        (2_270_384_940, "0c7cddb22cd7bf5e8169c6731a9eb7690c27ef5b53e8a4f9b4b2aaf8afcdaea2"),
    ),
    "stabilityai/stable-audio-3-medium-base": _published(
        "b32993f73c3bdc3864043a72d8032606bba737c8",
        (7_842, "27e2a299f0bda6ff742d3387398f929299575642f2c6a4d4c4f94830928fd0d5"),
        (9_222_116_660, "c443fcc4d491475064cd0ff3eb92459b1e5f5060e86d96d016f048e528e24195"),
    ),
}
"""The repositories whose files are known. The revision given here is loaded unless another is asked for."""


def describe_weights(repository: str, folder: Path) -> str | None:
    """Return whether the files of a known repository are the published ones, as text; None for other repositories."""
    if repository not in PUBLISHED:
        return None
    others = []
    for file, expected in PUBLISHED[repository].digests.items():
        with (folder / file).open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != expected:
            others.append(f"{file} has SHA-256 {digest}")
    return f"not the {PUBLISHED_WEIGHTS}: {' and '.join(others)}" if others else PUBLISHED_WEIGHTS


def snapshots(
    repository: str, containing: tuple[str, ...], revision: str | None
) -> Iterator[tuple[str, Path, str | None]]:
    """Yield folders that hold a model's files, the best ones first; each is searched for when the caller asks for it.

    Without a revision, the order is:

    1. the pinned revisions in the cache, of `repository` first;
    2. other revisions in the cache whose files have the published digests;
    3. the pinned revision of `repository`, downloaded if it is not in the cache;
    4. if nothing was downloaded, for example without a network, all other revisions in the cache.

    Args:
        repository: the repository that was asked for.
        containing: repositories that may be used instead if they are in the cache.
        revision: a branch, tag or commit of `repository`; nothing else is used then.

    Yields:
        The repository, the snapshot's folder, which is named after its commit, and what `describe_weights` returned if
        the files were hashed.

    Raises:
        CheckpointError: nothing is in the cache, and the download failed.
    """
    candidates = (repository, *(() if revision else containing))
    tried: list[tuple[str, str]] = []
    for candidate in candidates:
        folder = _cached(candidate, revision or _pinned(candidate))
        if folder:
            tried.append((candidate, folder.name))
            yield candidate, folder, None
    found = [] if revision else [(each, folder) for each in candidates for folder in _cached_revisions(each)]
    others = []
    for candidate, folder in found:
        if (candidate, folder.name) in tried:
            continue
        description = _describe_if_sizes_fit(candidate, folder)
        if description == PUBLISHED_WEIGHTS:
            yield candidate, folder, description
        else:
            others.append((candidate, folder, description))
    if repository in dict(tried):
        # It is in the cache, and a download would not change its files.
        yield from others
        return
    try:
        yield repository, _downloaded(repository, revision), None
    except CheckpointError as error:
        if not others:
            raise
        logger.warning("%s", error.cause)
        for candidate, folder, description in others:
            logger.warning("taking revision %s of %s, which is in the hub's cache", folder.name, candidate)
            yield candidate, folder, description
        raise


def _pinned(repository: str) -> str | None:
    return PUBLISHED[repository].revision if repository in PUBLISHED else None


def _cached(repository: str, revision: str | None) -> Path | None:
    """Return the folder of a revision in the cache, if both files are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(FILES), local_files_only=True)
        )
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
    return folder if _is_complete(folder) else None


def _is_complete(folder: Path) -> bool:
    return all((folder / file).is_file() for file in FILES)


def _cached_revisions(repository: str) -> list[Path]:
    """Return all complete snapshots of a repository in the cache, the newest first."""
    from huggingface_hub import constants

    try:
        # This is the documented structure of the cache. The hub's client needs the name of a revision.
        snapshots_folder = Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}", "snapshots")
        found = [(folder.stat().st_mtime, folder) for folder in snapshots_folder.iterdir() if _is_complete(folder)]
    except (OSError, ValueError):
        # A name that no file system accepts raises ValueError.
        return []
    return [folder for _, folder in sorted(found, reverse=True)]


def _describe_if_sizes_fit(repository: str, folder: Path) -> str | None:
    """Describe the files of a snapshot; None if their sizes are not the published ones, or if they cannot be read.

    Hashing the files of a full checkpoint takes seconds, and files of another size cannot be the published ones.
    """
    known = PUBLISHED.get(repository)
    try:
        if known is None or any((folder / file).stat().st_size != size for file, size in known.sizes.items()):
            return None
        return describe_weights(repository, folder)
    except OSError:
        return None


def _downloaded(repository: str, revision: str | None) -> Path:
    """Download a revision of a repository: the requested one, else the pinned one, else the newest one."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    def download(wanted: str | None) -> Path:
        # This request fails at once without a network. For a pinned revision, snapshot_download would repeat its
        # requests for 23 s and log each.
        HfApi().model_info(repository, revision=wanted)
        return Path(snapshot_download(repository, revision=wanted, allow_patterns=list(FILES)))

    pinned = _pinned(repository)
    # The client may repeat its requests for half a minute without a message.
    logger.warning("fetching %s from the hub", repository)
    try:
        try:
            return download(revision or pinned)
        except RevisionNotFoundError:
            if revision or not pinned:
                raise
            logger.warning("%s has no revision %s any more; taking its newest one", repository, pinned)
            return download(None)
    except Exception as error:  # noqa: BLE001 the hub's client raises errors of several libraries; each becomes one line
        raise _failure(repository, error) from None


def _failure(repository: str, error: Exception) -> CheckpointError:
    """Describe an error of the hub's client in one line, with a cure that fits it."""
    from huggingface_hub.errors import GatedRepoError

    said, cure = explain(repository, error)
    # Those who train have the base models, which need no access.
    if isinstance(error, GatedRepoError) and f"{repository}-base" in PUBLISHED:
        cure += f", or take {repository}-base, which contains the same autoencoder"
    short = repository.rsplit("/", 1)[-1].lower()
    # Random weights have the sizes of published models.
    sized = "same-l" if short == "same-l" or "medium" in short else "same-s"
    return CheckpointError(
        f"{repository} cannot be fetched from the hub ({said}); {cure}, or export a folder "
        f"with its {CONFIG_FILE} and {WEIGHTS_FILE}: samekit export {short} --weights DIR (make export MODEL={short} "
        f"WEIGHTS=DIR), or random weights: samekit export {sized} --weights random (make export MODEL={sized} "
        "WEIGHTS=random)"
    )
