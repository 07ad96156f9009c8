"""The Hugging Face hub: fetch the files of engine folders through its client, upload them, describe its errors.

No other module of samekit imports `huggingface_hub`. All files of an engine are fetched from one commit, even if the
branch moves meanwhile. The client's cache and its offline mode (`HF_HUB_OFFLINE`) are used as they are.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from samekit.engine.spec import SPEC_FILE, GraphFile
from samekit.errors import EngineError, EngineNotFoundError, HubError
from samekit.files.paths import expanded_text, file_signature
from samekit.packages import import_package, install_command

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)

INSTALL_HUB: Final = install_command("hub")
"""The command that installs the client of the hub."""

SOURCE_KIND: Final = "hub"
"""`EngineSpec.source["kind"]` of weights from a repository."""

# A first part that begins with a dot is a path.
REPOSITORY: Final = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)
"""The form `owner/name`."""

_CHECKPOINT_SUFFIX: Final = ".safetensors"
# The client repeats requests that were answered so, and waits for as long as the hub says.
_REPEATED: Final = (408, 429, 500, 502, 503, 504)


def split_revision(name: str) -> tuple[str, str | None]:
    """Split `NAME@REVISION`, which the hub writes so too, into its parts. A path that exists is not split."""
    if os.path.lexists(name):
        return name, None
    base, _, revision = name.partition("@")
    return base, revision or None


def with_revision(name: str | os.PathLike[str], revision: str | None) -> str:
    """Return `NAME@REVISION`, or the name alone without a revision; a leading `~` is expanded."""
    text = expanded_text(name)
    return f"{text}@{revision}" if revision else text


def is_repository(name: str) -> bool:
    """Return whether a name has the form `owner/name`, and no local folder is called `owner`."""
    return bool(REPOSITORY.fullmatch(name)) and not os.path.isdir(os.path.dirname(name))


@dataclass(frozen=True)
class Snapshot:
    """A commit of a repository on the hub; `folder` is its folder in the client's cache."""

    repository: str
    folder: Path

    @property
    def name(self) -> str:
        """`owner/name@COMMIT`, by which the same files are found again."""
        return f"{self.repository}@{self.folder.name}"

    def fetch(self, graph: GraphFile, *, again: bool) -> None:
        """Put the files of a graph into the cache; `again` replaces those that are there.

        Raises:
            EngineError: the repository lacks a file.
            HubError: a file is not in the cache and cannot be downloaded.
        """
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.errors import RemoteEntryNotFoundError

        if again and constants.HF_HUB_OFFLINE:
            # The error of `hf_hub_download` would name `force_download`, which users of samekit cannot pass.
            raise HubError(f"{self.folder / graph.file}: is damaged; unset HF_HUB_OFFLINE to download it again")
        if again or not all((self.folder / name).exists() for name in graph.sizes):
            size = sum(graph.sizes.values()) / 1e6
            logger.warning("fetching %s of %s from the hub, %.0f MB", graph.file, self.repository, size)
        for name in graph.sizes:
            try:
                hf_hub_download(self.repository, name, revision=self.folder.name, force_download=again)
            except RemoteEntryNotFoundError:
                raise EngineError(
                    f"{self.name}: holds no {name}, which its {SPEC_FILE} names; push the engine again"
                ) from None
            except Exception as error:  # noqa: BLE001 the client raises errors of several libraries
                raise failure(self.repository, error) from None

    def is_verified(self, graph: GraphFile) -> bool:
        """Return whether `remember_verified` was called for these very files, in any process."""
        try:
            return self._mark(graph).read_text() == self._signatures(graph)
        except (OSError, ValueError):
            return False

    def remember_verified(self, graph: GraphFile) -> None:
        """Record that a graph has its digest, because hashing gigabytes takes seconds. The cache may be read-only."""
        mark = self._mark(graph)
        try:
            mark.parent.mkdir(exist_ok=True)
            mark.write_text(self._signatures(graph))
        except OSError:
            logger.info("%s: cannot be written, so digests are checked each time", mark)

    def _mark(self, graph: GraphFile) -> Path:
        """Return the path of the record: beside the folders of the client, which ignores it."""
        return self.folder.parents[1] / ".samekit" / f"{self.folder.name}-{graph.file}"

    def _signatures(self, graph: GraphFile) -> str:
        return f"{graph.sha256} {[file_signature(self.folder / name) for name in graph.sizes]}"


def require_client() -> None:
    """Raise BackendUnavailableError unless the client of the hub is installed."""
    import_package("huggingface_hub", INSTALL_HUB)


def open_snapshot(repository: str, revision: str | None = None) -> Snapshot:
    """Return a commit of a repository, after putting its `spec.json` into the cache.

    Args:
        repository: `owner/name`.
        revision: branch, tag or commit; by default the default branch. If the hub cannot be reached or refuses, the
            commit that the cache holds for it is used.

    Raises:
        EngineNotFoundError: the repository holds no engine, or only its checkpoint is in the cache.
        HubError: nothing is in the cache, and the hub cannot be reached or refuses.
        BackendUnavailableError: the client is not installed.
    """
    require_client()
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        if not isinstance(try_to_load_from_cache(repository, SPEC_FILE, revision=revision), str):
            _require_reachable(repository, revision)
        return Snapshot(repository, Path(hf_hub_download(repository, SPEC_FILE, revision=revision)).parent)
    except RemoteEntryNotFoundError:
        raise EngineNotFoundError(_without_engine(repository, revision)) from None
    except Exception as error:  # noqa: BLE001 the client raises errors of several libraries
        failed = failure(repository, error)
        if _has_cached_checkpoint(repository):
            raise EngineNotFoundError(str(failed)) from None
        raise failed from None


def _require_reachable(repository: str, revision: str | None) -> None:
    """Raise an error of the client at once if there is no network; it would repeat a download for 23 s."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        _information(repository, revision)
    except HfHubHTTPError as error:
        if error.response.status_code not in _REPEATED:
            raise


def _information(repository: str, revision: str | None) -> Any:
    """Return the `ModelInfo` of a repository; raise errors of the client, also if the hub does not answer in time."""
    from huggingface_hub import HfApi, constants

    # By default, this request has no time limit.
    return HfApi().model_info(repository, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)


def _without_engine(repository: str, revision: str | None) -> str:
    """Return the message about a repository that has no `spec.json`."""
    try:
        files = _information(repository, revision).siblings or ()
    except Exception as error:  # noqa: BLE001 the client raises errors of several libraries
        return str(failure(repository, error))
    if any(file.rfilename.endswith(_CHECKPOINT_SUFFIX) for file in files):
        options = f" --revision {revision}" if revision else ""
        return f"{repository} holds a checkpoint and no engine; run: samekit export {repository}{options}"
    return f"{repository} holds neither an engine ({SPEC_FILE}) nor a checkpoint; check the name"


def _has_cached_checkpoint(repository: str) -> bool:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}", "snapshots")
    return any(folder.glob(f"*/*{_CHECKPOINT_SUFFIX}"))


def read_file(repository: str, file: str, revision: str | None = None) -> bytes | None:
    """Return the contents of a small file of a repository; None if it has no such file. Raise HubError otherwise."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, file, revision=revision)).read_bytes()
    except RemoteEntryNotFoundError:
        return None
    except Exception as error:  # noqa: BLE001 the client raises errors of several libraries
        raise failure(repository, error) from None


def create_repository(repository: str, branch: str | None, *, private: bool) -> None:
    """Create a repository and a branch of it, unless they exist.

    Raises:
        HubError: the hub cannot be reached or refuses, or the repository is public although `private` was asked for.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        # None leaves the choice to the settings of an organisation.
        api.create_repo(repository, private=private or None, exist_ok=True)
        if branch:
            api.create_branch(repository, branch=branch, exist_ok=True)
        is_private = _information(repository, None).private
    except Exception as error:  # noqa: BLE001 the client raises errors of several libraries
        raise failure(repository, error, writing=True) from None
    if private and not is_private:
        raise HubError(f"{repository} is public already; make it private on the hub, or leave out --private")


def upload(
    repository: str, files: Mapping[str, Path | bytes], branch: str | None, is_obsolete: Callable[[str], bool]
) -> str:
    """Upload files in one commit, which also deletes other files for which `is_obsolete` is true.

    Args:
        repository: `owner/name`, which exists.
        files: name in the repository -> a file or its contents.
        branch: the branch to commit to; by default the default branch.
        is_obsolete: tells by its name whether a file of the repository is deleted.

    Returns:
        The commit.

    Raises:
        HubError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    try:
        present = api.list_repo_files(repository, revision=branch)
        added = [
            CommitOperationAdd(name, str(file) if isinstance(file, Path) else file) for name, file in files.items()
        ]
        deleted = [CommitOperationDelete(name) for name in present if is_obsolete(name) and name not in files]
        # `upload_folder` may make several commits, so that `spec.json` could name files that are not there yet.
        made = api.create_commit(
            repository, [*added, *deleted], commit_message="Upload an engine with samekit", revision=branch
        )
    except Exception as error:  # noqa: BLE001 the client raises errors of several libraries
        raise failure(repository, error, writing=True) from None
    return str(made.oid)


def model_card(metadata: Mapping[str, Any], text: str) -> str:
    """Return the text of a model card whose YAML header holds `metadata`."""
    from huggingface_hub import ModelCardData

    return f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n{text}"


def failure(repository: str, error: Exception, *, writing: bool = False) -> HubError:
    """Return an error that describes one of the client in one line."""
    if isinstance(error, HubError):
        return error
    said, cure = explain(repository, error, writing=writing)
    action = "uploaded to" if writing else "fetched from"
    return HubError(f"{repository} cannot be {action} the hub ({said}); {cure}")


def explain(repository: str, error: Exception, *, writing: bool = False) -> tuple[str, str]:
    """Return what an error of the client says, in one line, and a cure that fits it."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    # The client wraps errors of connections, and some answers of the hub, in an error about its cache.
    while isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = str(error).strip() or type(error).__name__
    # For too many requests (429), only the client's text contains the time to wait.
    if status != 429:
        said = getattr(error, "server_message", None) or said
    return " ".join(said.split())[:500], _cure(repository, error, status, writing=writing)


def _cure(repository: str, error: Exception, status: int | None, *, writing: bool) -> str:
    """Return what helps against an error of the client; `status` is the HTTP status of the hub's answer."""
    from huggingface_hub import errors

    log_in = "log in (hf auth login, or HF_TOKEN)"
    # The first that fits counts: GatedRepoError is a RepositoryNotFoundError too.
    by_kind = (
        (errors.GatedRepoError, f"ask for access at https://huggingface.co/{repository} and {log_in}"),
        (errors.RevisionNotFoundError, "check --revision"),
        (errors.RepositoryNotFoundError, f"check the name, and if the repository is private, {log_in}"),
        (errors.DisabledRepoError, "take another repository"),
        (errors.OfflineModeIsEnabled, "unset HF_HUB_OFFLINE"),
        (errors.LocalTokenNotFoundError, log_in),
        (errors.HFValidationError, "check the name"),
    )
    for kind, cure in by_kind:
        if isinstance(error, kind):
            return cure
    if status in (401, 403):
        may = "write to" if writing else "read"
        return f"log in again with a token that may {may} this repository (hf auth login, or HF_TOKEN)"
    if status == 429:
        return "wait, and run the same command again (users who are logged in may send more requests)"
    if status is not None and status >= 500:
        return "the hub has an internal fault, so try again later"
    if isinstance(error, OSError) and error.errno is not None:
        return "check the folder of the hub's cache (HF_HOME) and its disk"
    return "check the network and the proxy"
