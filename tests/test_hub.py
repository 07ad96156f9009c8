"""Checkpoints from the hub: the real client, its cache, and a local server that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from click.testing import CliRunner
from helpers import seeded
from hub_server import OTHER, cache
from huggingface_hub import constants
from test_published import FILES as PUBLISHED_FILES
from test_published import FOLDER, KIND, tensors, tiny

from samekit.cli.main import main
from samekit.errors import CheckpointError
from samekit.packages import INSTALL_EXPORT
from samekit_export import hub
from samekit_export.checkpoint import load, load_source, save_folder

SAME_S = "stabilityai/SAME-S"
MUSIC, SFX_BASE = "stabilityai/stable-audio-3-small-music", "stabilityai/stable-audio-3-small-sfx-base"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Return a checkpoint folder for each published configuration."""
    folders = {file: tmp_path_factory.mktemp(file) for file in PUBLISHED_FILES}
    for file, folder in folders.items():
        save_folder(tiny(file), tensors(file), folder)
    return folders


def pin(repository):
    return hub.PUBLISHED[repository].revision


def know(monkeypatch, repository, folder):
    """Treat the files of a folder as the published ones of a repository."""
    files = {file: (folder / file).read_bytes() for file in hub.FILES}
    published = hub.Published(
        pin(repository),
        {file: len(data) for file, data in files.items()},
        {file: hashlib.sha256(data).hexdigest() for file, data in files.items()},
    )
    monkeypatch.setitem(hub.PUBLISHED, repository, published)


def assert_is_tiny(loaded, kind="s"):
    expected = seeded(f"tiny-{kind}")
    assert loaded.config == expected.config
    assert all(torch.equal(tensor, expected.tensors[key]) for key, tensor in loaded.tensors.items())


def refused(name, *arguments):
    with pytest.raises(CheckpointError) as caught:
        load(name, *arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert message.count("; ") == 1
    return message


# --- Known files -------------------------------------------------------------------------------------------


def test_every_repository_is_known():
    known = {*hub.HUB_REPOSITORIES.values(), *sum(hub.CONTAINING_REPOSITORIES.values(), ())}
    assert hub.PUBLISHED.keys() == known
    assert len(known) == 8
    for published in hub.PUBLISHED.values():
        assert len(bytes.fromhex(published.revision)) == 20
        assert all(len(bytes.fromhex(digest)) == 32 for digest in published.digests.values())
    data = (FOLDER / "SAME-S.json").read_bytes()
    assert hub.PUBLISHED[SAME_S].sizes["model_config.json"] == len(data)
    assert hub.PUBLISHED[SAME_S].digests["model_config.json"] == hashlib.sha256(data).hexdigest()


def test_the_pinned_revision_is_fetched(server, checkpoints, monkeypatch, caplog):
    know(monkeypatch, SAME_S, checkpoints["SAME-S"])
    # The default branch has a newer commit.
    server.repositories[SAME_S] = {OTHER: checkpoints["medium"], pin(SAME_S): checkpoints["SAME-S"]}
    loaded = load("same-s")
    assert_is_tiny(loaded)
    assert loaded.name == "same-s"
    expected = {"kind": "hub", "name": SAME_S, "revision": pin(SAME_S), "weights": "published weights"}
    assert loaded.source == expected
    # The client also asks about the default branch, but downloads nothing of it.
    assert {revision for _, _, kind, revision, *_ in server.requests if kind in ("resolve", "tree")} == {pin(SAME_S)}
    assert "not the published weights" not in caplog.text
    # The second load, and a load by the source, use the cache.
    server.requests.clear()
    assert load("same-s").source == expected
    assert load_source(loaded.source).source == expected
    assert load("stabilityai/SAME-S").source == expected
    assert server.requests == []


def test_other_files_are_named_and_not_refused(server, checkpoints, caplog):
    server.repositories[SAME_S] = {pin(SAME_S): checkpoints["SAME-S"]}
    loaded = load("same-s")
    assert_is_tiny(loaded)
    digest = hashlib.sha256((checkpoints["SAME-S"] / "model.safetensors").read_bytes()).hexdigest()
    assert loaded.source["weights"].startswith("not the published weights: model_config.json has SHA-256 ")
    assert loaded.source["weights"].endswith(f" and model.safetensors has SHA-256 {digest}")
    assert digest in caplog.text
    # Hashing once is enough, because the engine records the digest of its checkpoint.
    caplog.clear()
    assert load_source(loaded.source).source == loaded.source
    assert caplog.text == ""


@pytest.mark.parametrize("is_published", [True, False])
def test_export_and_info_tell(server, checkpoints, engine_of, tmp_path, monkeypatch, is_published):
    server.repositories[SAME_S] = {pin(SAME_S): checkpoints["SAME-S"]}
    if is_published:
        know(monkeypatch, SAME_S, checkpoints["SAME-S"])
    # An export of the same weights is current, so nothing is computed here.
    folder = shutil.copytree(engine_of("tiny-s").folder, tmp_path / "same-s")
    spec = json.loads((folder / "spec.json").read_text())
    (folder / "spec.json").write_text(json.dumps(spec | {"source": load("same-s").source}))
    exported = CliRunner().invoke(main, ["export", "same-s", "--out", str(tmp_path)])
    assert exported.exit_code == 0, exported.output
    assert (f"published weights of {SAME_S}, revision {pin(SAME_S)}" in exported.stdout.splitlines()) == is_published
    shown = CliRunner().invoke(main, ["info", str(folder)])
    assert shown.exit_code == 0, shown.output
    (line,) = [line for line in shown.stdout.splitlines() if line.startswith("  source ")]
    assert f"name {SAME_S}, revision {pin(SAME_S)}, " in line
    assert line.endswith(", published weights") == is_published
    assert ("not the published weights: model" in line) != is_published


def test_repositories_that_are_not_known(server, checkpoints):
    server.repositories["someone/My-SAME"] = {OTHER: checkpoints["SAME-S"]}
    loaded = load("someone/My-SAME")
    assert_is_tiny(loaded)
    assert loaded.source == {"kind": "hub", "name": "someone/My-SAME", "revision": OTHER}


def test_without_the_hubs_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    done = CliRunner().invoke(main, ["export", "same-s"])
    assert done.exit_code == 2, done.exception
    assert done.stderr == f"Error: huggingface_hub is not installed; run: {INSTALL_EXPORT}\n"


def test_a_pinned_revision_that_is_gone(server, checkpoints, caplog):
    server.repositories[SAME_S] = {OTHER: checkpoints["SAME-S"]}
    assert load("same-s").source["revision"] == OTHER
    assert f"has no revision {pin(SAME_S)} any more" in caplog.text


# --- What the cache holds ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "repository", "file"),
    [
        *[
            ("same-s", f"stabilityai/stable-audio-3-small-{kind}", "small-music")
            for kind in ("music", "sfx", "music-base", "sfx-base")
        ],
        *[("same-l", f"stabilityai/stable-audio-3-medium{base}", "medium") for base in ("", "-base")],
    ],
)
@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.usefixtures("offline")
def test_full_checkpoints_in_the_cache_serve(checkpoints, name, repository, file, pinned):
    commit = pin(repository) if pinned else OTHER
    cache(repository, commit, checkpoints[file])
    loaded = load(name)
    assert_is_tiny(loaded, KIND[file])
    assert (loaded.name, loaded.source["name"], loaded.source["revision"]) == (name, repository, commit)
    assert load_source(loaded.source).source == loaded.source


# The names in the reference's `stable_audio_3/model_configs.py`, and their repositories there.
FULL_MODELS = {
    "small-music": "stabilityai/stable-audio-3-small-music",
    "small-sfx": "stabilityai/stable-audio-3-small-sfx",
    "small-music-base": "stabilityai/stable-audio-3-small-music-base",
    "small-sfx-base": "stabilityai/stable-audio-3-small-sfx-base",
    "medium": "stabilityai/stable-audio-3-medium",
    "medium-base": "stabilityai/stable-audio-3-medium-base",
}


@pytest.mark.parametrize("name", FULL_MODELS)
@pytest.mark.usefixtures("offline")
def test_full_models_have_the_names_of_the_reference(checkpoints, name):
    file = "medium" if "medium" in name else "small-music"
    # The autoencoder alone is in the cache too, but another repository was asked for.
    cache(SAME_S, pin(SAME_S), checkpoints["SAME-S"])
    message = refused(name)
    assert f"{FULL_MODELS[name]} cannot be fetched" in message
    assert f"export {'same-l' if 'medium' in name else 'same-s'} --weights random" in message
    cache(FULL_MODELS[name], pin(FULL_MODELS[name]), checkpoints[file])
    loaded = load(name.upper())
    assert_is_tiny(loaded, KIND[file])
    assert (loaded.name, loaded.source["name"]) == (name, FULL_MODELS[name])
    assert load_source(loaded.source).source == loaded.source


def test_a_base_model_is_named_where_access_is_missing(server):
    server.answers[MUSIC] = ANSWERS[0][:2]
    message = refused("small-music")
    assert f", or take {MUSIC}-base, which contains the same autoencoder, or export a folder" in message


def test_the_pinned_revision_in_the_cache_is_preferred(server, checkpoints):
    cache(SAME_S, OTHER, checkpoints["medium"])
    cache(MUSIC, pin(MUSIC), checkpoints["small-music"])
    loaded = load("same-s")
    assert (loaded.source["name"], loaded.source["revision"]) == (MUSIC, pin(MUSIC))
    assert server.requests == []


def test_another_revision_with_the_published_files_is_taken_before_a_download(server, checkpoints, monkeypatch):
    """A commit may change the model card only, so the weights are the published ones."""
    know(monkeypatch, MUSIC, checkpoints["small-music"])
    cache(MUSIC, OTHER, checkpoints["small-music"])
    loaded = load("same-s")
    assert (loaded.source["revision"], loaded.source["weights"]) == (OTHER, "published weights")
    assert server.requests == []


def test_another_revision_is_not_taken_before_a_download(server, checkpoints):
    cache(SAME_S, OTHER, checkpoints["SAME-S"])
    server.repositories[SAME_S] = {pin(SAME_S): checkpoints["SAME-S"]}
    assert load("same-s").source["revision"] == pin(SAME_S)


@pytest.mark.usefixtures("offline")
def test_files_are_hashed_once(checkpoints, monkeypatch):
    """The weights of a full checkpoint have up to 9 GB, so hashing takes seconds."""
    know(monkeypatch, MUSIC, checkpoints["small-music"])
    cache(MUSIC, OTHER, checkpoints["small-music"])
    with mock.patch("hashlib.file_digest", wraps=hashlib.file_digest) as hashed:
        assert load("same-s").source["weights"] == "published weights"
    assert hashed.call_count == len(hub.FILES)
    # A source that describes its weights needs no digests.
    with mock.patch("hashlib.file_digest", wraps=hashlib.file_digest) as hashed:
        load_source({"kind": "hub", "name": MUSIC, "revision": OTHER, "weights": "published weights"})
    assert hashed.call_count == 0


@pytest.mark.usefixtures("offline")
def test_files_of_a_known_size_that_are_not_the_published_ones_are_hashed_once(checkpoints, monkeypatch, tmp_path):
    """Other revisions are used only if nothing else is available, and are described then."""
    know(monkeypatch, MUSIC, checkpoints["small-music"])
    other = shutil.copytree(checkpoints["small-music"], tmp_path / "other")
    config = (other / "model_config.json").read_text()
    (other / "model_config.json").write_text(config.replace("\n", " ", 1))
    cache(MUSIC, OTHER, other)
    with mock.patch("hashlib.file_digest", wraps=hashlib.file_digest) as hashed:
        assert load("same-s").source["weights"].startswith("not the published weights: model_config.json has")
    assert hashed.call_count == len(hub.FILES)


@pytest.mark.parametrize("main_is", [True, False])
@pytest.mark.usefixtures("offline")
def test_another_revision_serves_without_a_network(checkpoints, caplog, main_is):
    cache(SAME_S, OTHER, checkpoints["SAME-S"], main_is)
    loaded = load("same-s")
    assert_is_tiny(loaded)
    assert loaded.source["revision"] == OTHER
    assert f"taking revision {OTHER} of {SAME_S}, which is in the hub's cache" in caplog.text


@pytest.mark.parametrize("damage", ["weights", "configuration", "missing"])
@pytest.mark.usefixtures("offline")
def test_an_unusable_one_does_not_stop_the_others(checkpoints, tmp_path, caplog, damage):
    damaged = shutil.copytree(checkpoints["SAME-S"], tmp_path / "damaged")
    if damage == "weights":
        (damaged / "model.safetensors").write_bytes(b"1234")
    elif damage == "configuration":
        (damaged / "model_config.json").write_text("{}")
    else:
        (damaged / "model.safetensors").unlink()
    cache(SAME_S, pin(SAME_S), damaged)
    cache(MUSIC, pin(MUSIC), damaged)
    cache(SFX_BASE, pin(SFX_BASE), checkpoints["small-music"])
    assert load("same-s").source["name"] == SFX_BASE
    assert caplog.text.count("passed over in the hub's cache: ") == (0 if damage == "missing" else 2)


@pytest.mark.usefixtures("offline")
def test_another_revision_in_place_of_a_damaged_one(checkpoints, tmp_path):
    damaged = shutil.copytree(checkpoints["SAME-S"], tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"1234")
    cache(SAME_S, pin(SAME_S), damaged)
    cache(SAME_S, OTHER, checkpoints["SAME-S"])
    assert load("same-s").source["revision"] == OTHER


@pytest.mark.usefixtures("offline")
def test_the_first_failure_is_told_if_nothing_serves(checkpoints, tmp_path):
    damaged = shutil.copytree(checkpoints["SAME-S"], tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"1234")
    cache(SAME_S, pin(SAME_S), damaged)
    assert "SAME-S" in refused("same-s")
    assert "not a readable safetensors file" in refused("same-s")


@pytest.mark.usefixtures("offline")
def test_a_revision_is_of_one_repository(checkpoints):
    cache(SAME_S, pin(SAME_S), checkpoints["SAME-S"])
    cache(MUSIC, OTHER, checkpoints["small-music"])
    assert f"{SAME_S} cannot be fetched" in refused("same-s", "hub", OTHER)


@pytest.mark.usefixtures("offline")
def test_damaged_caches_are_no_caches(checkpoints):
    cache(SAME_S, pin(SAME_S), checkpoints["SAME-S"])
    (Path(constants.HF_HUB_CACHE) / "models--stabilityai--stable-audio-3-small-music").write_text("no folder")
    assert load("same-s").source["name"] == SAME_S


# --- What the hub says -------------------------------------------------------------------------------------

# Answers as the hub gives them: status and headers of the code that huggingface_hub maps to errors
# (utils/_http.py), sentences from users' reports (huggingface/diffusers issue 4447, ariG23498/gemma3-object-detection
# issue 5, vllm-project/semantic-router issue 817).
GATED = (
    f"Access to model {SAME_S} is restricted and you are not in the authorized list. "
    f"Visit https://huggingface.co/{SAME_S} to ask for access."
)
LOG_IN = (
    f"Access to model {SAME_S} is restricted. You must have access to it and be authenticated to access it. "
    "Please log in."
)
FINE_GRAINED = (
    "Please enable access to public gated repositories in your fine-grained token settings to view this repository."
)
ANSWERS = [
    (
        403,
        {"X-Error-Code": "GatedRepo", "X-Error-Message": GATED},
        GATED,
        f"ask for access at https://huggingface.co/{SAME_S} and log in",
    ),
    (
        401,
        {"X-Error-Code": "GatedRepo", "X-Error-Message": LOG_IN},
        LOG_IN,
        f"ask for access at https://huggingface.co/{SAME_S} and log in",
    ),
    (
        404,
        {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"},
        "Repository not found",
        "check the name",
    ),
    (
        401,
        {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."},
        "Invalid username or password.",
        "check the name, and if the repository is private, log in",
    ),
    (
        401,
        {"X-Error-Message": "Invalid credentials in Authorization header"},
        "Invalid credentials in Authorization header",
        "log in again with a token",
    ),
    (403, {"X-Error-Message": FINE_GRAINED}, FINE_GRAINED, "log in again with a token that may read this repository"),
    (
        403,
        {"X-Error-Message": "Access to this resource is disabled."},
        "Access to this resource is disabled.",
        "take another repository",
    ),
    (503, {"X-Error-Message": "Service Unavailable"}, "Service Unavailable", "the hub has an internal fault"),
    (
        429,
        {"ratelimit": '"api";r=0;t=55', "ratelimit-policy": '"fixed window";"api";q=500;w=300'},
        "Retry after 55 seconds",
        "wait, and run the same command again",
    ),
]


@pytest.mark.parametrize(("status", "headers", "sentence", "cure"), ANSWERS, ids=lambda part: str(part)[:40])
@pytest.mark.usefixtures("_impatient")
def test_the_hubs_own_sentence_is_kept(server, status, headers, sentence, cure):
    server.answers[SAME_S] = (status, headers)
    message = refused("same-s")
    assert message.startswith(f"{SAME_S} cannot be fetched from the hub (")
    said, _, advice = message.partition("); ")
    assert sentence in said
    assert advice.startswith(cure)
    assert "samekit export same-s --weights DIR" in advice


def test_a_revision_that_is_not_there(server, checkpoints):
    server.repositories[SAME_S] = {OTHER: checkpoints["SAME-S"]}
    message = refused("same-s", "hub", "v9")
    assert "(Invalid rev id: v9); check --revision, or" in message


@pytest.mark.usefixtures("offline")
def test_offline_mode():
    message = refused("same-s")
    assert "unset HF_HUB_OFFLINE, or export a folder" in message
    assert "offline mode is enabled" in message


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["a/..b", "a/" + "b" * 300], ids=ascii)
def test_names_that_no_repository_can_have(name):
    assert "; check the name, or export a folder" in refused(name)


@pytest.mark.usefixtures("_impatient")
def test_no_server(server):
    server.shutdown()
    server.server_close()
    message = refused("same-s")
    assert "; check the network and the proxy, or export a folder" in message


def test_gated_and_cached(server, checkpoints, caplog):
    """Without access to the pinned revision, another one in the cache is used."""
    caplog.set_level(logging.WARNING)
    server.answers[SAME_S] = ANSWERS[0][:2]
    cache(MUSIC, OTHER, checkpoints["small-music"])
    assert load("same-s").source["name"] == MUSIC
    assert GATED in caplog.text
