"""Engines by name from a repository on the hub, `samekit pull` and `samekit push`, with the real client of the hub.

The stand-in hub is `hub_server.py`. The conditions of Stability AI's licence are those of the Stability AI Community
License Agreement of July 5, 2024: https://huggingface.co/stabilityai/stable-audio-3-medium/blob/main/LICENSE.md, whose
SHA-256 is d6f6b1a4dce5c852bd6d7d9482d002baf0ccdb71e662250b73be9eec8764ee8d. That a derived repository carries the text
as LICENSE.md and the attribution in a file NOTICE is done so by https://huggingface.co/thepatch/same-l-decoder-lora.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import assert_one_line, noise, seeded
from hub_server import OTHER
from huggingface_hub import constants, scan_cache_dir

from samekit import AutoencoderModel
from samekit.cli.main import main
from samekit.engine.exchange import publish
from samekit.engine.folder import Engine, find_engine
from samekit.engine.model_card import licence_of, model_card, notice
from samekit.errors import BackendUnavailableError, EngineError, EngineNotFoundError, HubError, InputError
from samekit.packages import install_command
from samekit_export.export import export

REPOSITORY = "someone/tiny"
FIRST, SECOND = "1" * 40, "2" * 40
STABILITY = {"kind": "hub", "name": "stabilityai/SAME-S", "revision": OTHER, "weights": "published weights"}


@pytest.fixture
def published(server, engine_of, tmp_path):
    """Serve an engine folder as the only commit of a repository, and return the folder."""
    folder = shutil.copytree(engine_of("tiny-s").folder, tmp_path / "published")
    server.repositories[REPOSITORY] = {FIRST: folder}
    return folder


def change_spec(folder, **fields):
    path = folder / "spec.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def newer(server, folder, **fields):
    """Add a commit to the default branch, and return its folder."""
    after = Path(shutil.copytree(folder, folder.with_name("second")))
    change_spec(after, **fields)
    server.repositories[REPOSITORY] = {SECOND: after, FIRST: folder}
    return after


def open_cpu(name=REPOSITORY, **options):
    return AutoencoderModel.from_pretrained(name, "cpu", backend="onnxruntime", threads=1, **options)


def encode(model):
    return model.encode(noise((2, 4 * model.downsampling_ratio)), model.sample_rate)


def run(*arguments, stdin=None):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


# --- Fetching ----------------------------------------------------------------------------------------------


def test_only_the_used_half_is_fetched(server, published):
    with open_cpu() as model:
        assert server.downloads() == ["spec.json"]
        latents = encode(model)
        assert [name for name in server.downloads() if "decoder" in name] == []
        with open_cpu(published) as local:
            np.testing.assert_array_equal(latents, encode(local))
        model.decode(latents)
    assert sorted(server.downloads()) == sorted(["spec.json", *graph_files(published)])


def graph_files(folder, precision="fp32"):
    pair = Engine.load(folder).spec.graphs[precision]
    return [name for graph in pair.values() for name in graph.sizes]


def test_everything_is_of_one_commit(server, published):
    """The branch moves between `spec.json` and the graphs."""
    with open_cpu() as model:
        newer(server, published, name="moved")
        (server.repositories[REPOSITORY][SECOND] / "encoder.onnx").write_bytes(b"of another commit")
        encode(model)
        copied = pickle.loads(pickle.dumps(model.autoencoder.backend))
        newest = open_cpu()
    # A copy in another process opens the same commit, although the branch has moved.
    assert (copied.spec.name, newest.spec.name) == (model.spec.name, "moved")
    copied.close()
    newest.close()


def test_a_moved_branch_is_seen_online_and_the_cached_one_serves_offline(server, published, monkeypatch):
    assert find_engine(REPOSITORY).name == f"{REPOSITORY}@{FIRST}"
    newer(server, published, name="moved")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_engine(REPOSITORY).name == f"{REPOSITORY}@{FIRST}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert find_engine(REPOSITORY).spec.name == "moved"
    server.answers[REPOSITORY] = (503, {"X-Error-Message": "Service Unavailable"})
    assert find_engine(REPOSITORY).name == f"{REPOSITORY}@{SECOND}"


def test_a_pinned_commit_needs_no_request_once_it_is_cached(server, published):
    newer(server, published, name="moved")
    with open_cpu(revision=FIRST) as model:
        latents = encode(model)
    server.requests.clear()
    with open_cpu(f"{REPOSITORY}@{FIRST}") as model:
        np.testing.assert_array_equal(encode(model), latents)
    assert server.requests == []
    assert model.spec.name != "moved"


def test_offline_from_the_cache(server, published, monkeypatch, tmp_path):
    song, out = tmp_path / "song.wav", tmp_path / "song.npy"
    write_song(song)
    arguments = ["encode", song, out, "--model", REPOSITORY, "--device", "cpu", "--backend", "onnxruntime"]
    assert run(*arguments).exit_code == 0
    out.unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert np.load(out).shape[1] == 2
    failed = run("decode", out, tmp_path / "out.wav", "--model", REPOSITORY, "--backend", "onnxruntime")
    assert failed.exit_code == 2
    assert "unset HF_HUB_OFFLINE" in failed.stderr
    assert not (tmp_path / "out.wav").exists()


def write_song(path):
    import soundfile

    soundfile.write(path, noise((8192, 2)), 44_100)


def test_a_local_folder_is_preferred(server, published):
    folder = Path(shutil.copytree(published, REPOSITORY))
    assert find_engine(REPOSITORY).folder == folder
    with pytest.raises(EngineError, match="is a local folder, which has no revision v1; leave it out") as caught:
        find_engine(f"{REPOSITORY}@v1")
    assert_one_line(caught.value)
    # A path beside others is mistyped, and no repository.
    with pytest.raises(EngineNotFoundError, match="check the path"):
        find_engine("someone/tyny")
    assert server.requests == []


def test_a_folder_in_engines_is_preferred(server, published):
    folder = Path(shutil.copytree(published, Path("engines", REPOSITORY)))
    assert find_engine(REPOSITORY).folder == folder
    assert server.requests == []


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    done = run("info", REPOSITORY)
    assert done.exit_code == 2
    assert done.stderr == (
        "Error: no engine for 'someone/tiny' in . or engines or "
        f"{Path.home()}/.cache/samekit/engines, and the hub cannot be asked (huggingface_hub is not installed); "
        f"check the path, or run: {install_command('hub')}\n"
    )


def test_other_commands_take_repositories(server, published, tmp_path):
    shown = run("info", REPOSITORY)
    assert shown.exit_code == 0, shown.output
    assert server.downloads() == ["spec.json"]
    written = run("triton", tmp_path / "models", "--model", REPOSITORY, "--revision", FIRST)
    assert written.exit_code == 0, written.output
    assert run("clean", f"{REPOSITORY}@{FIRST}").stdout == "nothing to remove\n"


def test_precisions_that_a_repository_lacks(server, published):
    with pytest.raises(BackendUnavailableError, match=f"^{REPOSITORY}@{FIRST}: no int8 graph") as caught:
        open_cpu(precision="int8")
    assert_one_line(caught.value)


@pytest.mark.parametrize("command", [["encode", "a.wav", "a.npy"], ["decode", "a.npy", "a.wav"], ["triton", "models"]])
def test_no_command_has_a_default_model(command):
    done = run(*command)
    assert done.exit_code == 2
    assert "Missing option '--model'" in done.stderr
    done = run("pre-encode", "--data_dir", "clips", "--output_path", "latents")
    assert done.exit_code == 2
    assert done.stderr == (
        "Error: pre-encode needs the model that you train with; pass --model (the reference takes same-l)\n"
    )


# --- Digests -----------------------------------------------------------------------------------------------


@pytest.fixture
def name(published):
    """Return the name of the file with the encoder's graph."""
    return Engine.load(published).spec.graphs["fp32"]["encoder"].file


def test_a_damaged_transfer_is_repeated(server, published, name, caplog):
    data = (published / name).read_bytes()
    server.once["GET", name] = bytes(len(data))
    with open_cpu() as model:
        encode(model)
    assert server.downloads().count(name) == 2
    assert f"{name} of {REPOSITORY}@{FIRST} does not have its digest" in caplog.text
    server.requests.clear()
    with open_cpu() as model:
        encode(model)
    assert server.downloads() == []


def test_a_wrong_digest_is_an_error(server, published, name, caplog):
    data = bytearray((published / name).read_bytes())
    data[-1] ^= 1
    (published / name).write_bytes(data)
    with (
        open_cpu() as model,
        pytest.raises(EngineError, match=r"does not have its digest in spec\.json, also after") as e,
    ):
        encode(model)
    assert_one_line(e.value)
    # The warning is about the first download only; the error is about the second.
    assert caplog.text.count("does not have its digest") == 1
    assert server.downloads().count(name) == 2


def test_a_damaged_cache_offline_is_one_error(server, published, name, monkeypatch, caplog):
    with open_cpu() as model:
        encode(model)
    path = find_engine(REPOSITORY).folder / name
    path.resolve().write_bytes(bytes(path.stat().st_size))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    caplog.clear()
    with open_cpu() as model, pytest.raises(HubError, match=r"is damaged; unset HF_HUB_OFFLINE to download") as caught:
        encode(model)
    assert_one_line(caught.value)
    assert "fetching" not in caplog.text


def test_a_file_that_changed_in_the_cache_is_noticed(server, published, name):
    with open_cpu() as model:
        latents = encode(model)
    path = find_engine(REPOSITORY).folder / name
    data = path.read_bytes()
    path.resolve().write_bytes(bytes(len(data)))
    with open_cpu() as model:
        np.testing.assert_array_equal(encode(model), latents)
    assert path.read_bytes() == data
    # The record of checked files is none of the cache's own, which it must not disturb.
    assert scan_cache_dir(constants.HF_HUB_CACHE).warnings == []


def test_digests_are_computed_once(server, published, monkeypatch):
    with open_cpu() as model:
        encode(model)
    monkeypatch.setattr("samekit.engine.folder.describe_graph", None)
    with open_cpu() as model:
        encode(model)


def test_weights_stay_mapped_if_the_cache_is_deleted(server, published, monkeypatch, caplog):
    """The third call would open the graph again, to pack its weights."""
    with open_cpu() as model:
        latents = encode(model)
        shutil.rmtree(constants.HF_HUB_CACHE)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        for _ in range(3):
            np.testing.assert_array_equal(encode(model), latents)
    assert "weights of the encoder are not packed" in caplog.text


# --- Faults of the hub -------------------------------------------------------------------------------------


def test_a_broken_transfer_is_resumed(server, published, name, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    # The client keeps whole chunks only, which are larger than this file.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 512)
    server.once["GET", name] = 1000
    with open_cpu() as model:
        encode(model)
    assert ("RANGE", name, 512) in server.requests


def test_too_many_requests_are_repeated_after_the_time_that_the_hub_says(server, published, name, monkeypatch):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    server.once["GET", name] = (429, {"Retry-After": "7"})
    with open_cpu() as model:
        encode(model)
    # The client adds a second.
    assert 8.0 in waited


REFUSALS = [
    (403, "GatedRepo", "Access to model someone/tiny is restricted.", "ask for access at https://huggingface.co/"),
    (401, "GatedRepo", "Please log in.", "ask for access at https://huggingface.co/someone/tiny and log in"),
    (401, "RepoNotFound", "Invalid username or password.", "check the name, and if the repository is private, log in"),
    (429, "", "Too Many Requests", "wait, and run the same command again"),
    (500, "", "Internal Error", "the hub has an internal fault"),
]


@pytest.mark.parametrize(("status", "code", "sentence", "cure"), REFUSALS)
@pytest.mark.usefixtures("_impatient")
def test_refusals(server, status, code, sentence, cure):
    server.answers[REPOSITORY] = (status, {"X-Error-Code": code, "X-Error-Message": sentence, "Retry-After": "0"})
    done = run("info", REPOSITORY)
    assert done.exit_code == 2, done.exception
    assert f"; {cure}" in done.stderr
    assert done.stderr.startswith(f"Error: there is no folder {REPOSITORY}, and {REPOSITORY} cannot be fetched from")


def test_a_hub_that_does_not_answer(server, published, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    server.silent.add(REPOSITORY)
    start = time.monotonic()
    with pytest.raises(HubError, match=r"cannot be fetched from the hub \(.*timed out.*\); check the network") as error:
        find_engine(REPOSITORY)
    assert time.monotonic() - start < 10
    assert_one_line(error.value)


def test_a_revision_that_is_not_there(server, published):
    with pytest.raises(HubError, match=r"\(Invalid rev id: v9\); check --revision$"):
        find_engine(f"{REPOSITORY}@v9")


def test_a_file_that_the_repository_lacks(server, published, name):
    (published / name).unlink()
    with (
        open_cpu() as model,
        pytest.raises(EngineError, match=f"holds no {name}, which its spec.json names; push") as e,
    ):
        encode(model)
    assert_one_line(e.value)


def test_repositories_without_an_engine(server, checkpoint_of, tmp_path):
    server.repositories["someone/checkpoint"] = {FIRST: Path(checkpoint_of("tiny-s"))}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").touch()
    server.repositories["someone/other"] = {FIRST: tmp_path / "other"}
    cure = "someone/checkpoint holds a checkpoint and no engine; run: samekit export someone/checkpoint"
    with pytest.raises(EngineNotFoundError, match=f"^{cure}$"):
        find_engine("someone/checkpoint")
    with pytest.raises(EngineNotFoundError, match=f"^{cure} --revision {FIRST}$"):
        find_engine(f"someone/checkpoint@{FIRST}")
    with pytest.raises(EngineNotFoundError, match=r"holds neither an engine \(spec.json\) nor a checkpoint; check"):
        find_engine("someone/other")
    # PyTorch runs the checkpoint in place of an engine, as it does with those of folders.
    with AutoencoderModel.from_pretrained("someone/checkpoint", "cpu", revision=FIRST, threads=1) as model:
        assert (model.autoencoder.backend.name, model.spec.source["revision"]) == ("torch", FIRST)


# --- pull --------------------------------------------------------------------------------------------------


def test_pull_to_the_cache(server, published, monkeypatch):
    done = run("pull", REPOSITORY, "--only", "encoder")
    assert (done.exit_code, done.stdout) == (0, f"{REPOSITORY}@{FIRST}\n"), done.output
    assert not any("decoder" in file for file in server.downloads())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with open_cpu(done.stdout.strip()) as model:
        encode(model)


@pytest.mark.parametrize("only", [None, "encoder", "decoder"])
def test_pull_to_a_folder(server, published, tmp_path, only):
    folder = tmp_path / "pulled"
    arguments = ["pull", f"{REPOSITORY}@{FIRST}", folder, *(["--only", only] if only else [])]
    for _ in range(2):
        done = run(*arguments)
        assert (done.exit_code, done.stdout) == (0, f"{folder}\n"), done.output
    engine = Engine.load(folder)
    engine.check_digests()
    assert list(engine.spec.graphs["fp32"]) == ([only] if only else ["encoder", "decoder"])
    assert not any(path.is_symlink() for path in folder.iterdir())
    with open_cpu(folder) as model:
        if only == "decoder":
            with pytest.raises(BackendUnavailableError, match="no encoder of fp32, because only the other half was"):
                encode(model)
        else:
            assert encode(model).shape[1] == model.latent_dim


def test_pull_replaces_nothing(server, published, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").touch()
    done = run("pull", REPOSITORY, tmp_path / "used")
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1] == f"Error: {tmp_path}/used: holds other files; pass a new folder"
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["thesis.txt"]


def test_pull_checks_its_arguments_before_it_fetches(server, published, tmp_path):
    (tmp_path / "thesis.txt").touch()
    assert "holds other files" in run("pull", REPOSITORY, tmp_path).stderr
    assert "no int8 graph (there is: fp32)" in run("pull", REPOSITORY, tmp_path / "new", "--precision", "int8").stderr
    assert server.downloads() == ["spec.json"]
    server.requests.clear()
    for given in ("fp8", "fp32,", ""):
        done = run("pull", REPOSITORY, "--precision", given)
        assert done.exit_code == 2
        assert done.stderr.endswith(" is not known; pass some of fp32, fp16, int8, bf16\n")
    assert server.requests == []


@pytest.mark.usefixtures("published")
def test_pull_completes_a_folder_whose_graph_is_damaged(server, tmp_path, name):
    folder = tmp_path / "pulled"
    assert run("pull", REPOSITORY, folder).exit_code == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for damage in (Path.unlink, lambda path: path.write_bytes(b"")):
        damage(folder / name)
        assert run("pull", REPOSITORY, folder).exit_code == 0
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_pull_of_another_engine_replaces_nothing(server, published, tmp_path):
    folder = tmp_path / "pulled"
    assert run("pull", REPOSITORY, folder).exit_code == 0
    newer(server, published, name="moved")
    done = run("pull", REPOSITORY, folder)
    assert done.exit_code == 2
    assert done.stderr == f"Error: {folder}: holds another engine; pass a new folder\n"
    assert Engine.load(folder).spec.name != "moved"


@pytest.mark.parametrize(
    "files",
    [
        {"../../stolen.onnx": 1},
        {"/etc/passwd": 1},
        {"encoder.onnx": 2**64},
        {"encoder.onnx": 1, "encoder.onnx.data": 1, ".bashrc": 1},
        {"encoder.onnx": 1, **{f"{index}.bin": 1 for index in range(1000)}},
    ],
)
def test_a_hostile_spec_makes_nothing_be_fetched(server, published, tmp_path, files):
    graphs = json.loads((published / "spec.json").read_text())["graphs"]
    graphs["fp32"]["encoder"] |= {"file": next(iter(files)), "sizes": files}
    change_spec(published, graphs=graphs)
    done = run("pull", REPOSITORY, tmp_path / "pulled")
    assert done.exit_code == 2
    assert "spec.json: damaged (" in done.stderr
    assert server.downloads() == ["spec.json"]
    assert not (tmp_path / "pulled").exists()


@pytest.mark.usefixtures("published", "ready_graphs")
def test_half_an_engine_is_exported_again(tmp_path):
    done = run("pull", REPOSITORY, tmp_path / "tiny-s", "--only", "encoder")
    assert done.exit_code == 0, done.output
    engine = export(seeded("tiny-s"), tmp_path)
    assert set(engine.spec.graphs["fp32"]) == {"encoder", "decoder"}
    engine.check("fp32")


# --- push --------------------------------------------------------------------------------------------------


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")


@pytest.mark.usefixtures("token")
def test_push_and_use(server, own_engine):
    done = run("push", own_engine.folder, "me/engine", "--private")
    assert done.exit_code == 0, done.output
    (commit, folder), *_ = server.repositories["me/engine"].items()
    assert done.stdout == f"uploaded; use it with --model me/engine@{commit}\n"
    assert server.private["me/engine"]
    # Everything is in one commit, so no commit names a graph that is not there.
    assert [request[-2:] for request in server.requests if "commit" in request] == [("commit", "main")]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert "samekit encode song.wav song.npy --model me/engine" in card
    least = min(case["snr_db"] for case in own_engine.spec.verification["fp32"])
    assert f" {least:.1f} dB |" in card
    with open_cpu("me/engine") as model, open_cpu(own_engine.folder) as local:
        np.testing.assert_array_equal(encode(model), encode(local))


@pytest.mark.usefixtures("token")
def test_push_again_deletes_replaced_graphs(server, own_engine, tmp_path):
    first = publish(own_engine, "me/engine")
    folder = Path(shutil.copytree(own_engine.folder, tmp_path / "again"))
    spec = json.loads((folder / "spec.json").read_text())
    graph = spec["graphs"]["fp32"]["encoder"]
    old = graph["file"]
    graph["sizes"] = {file.replace("encoder", "encoder.2"): size for file, size in graph["sizes"].items()}
    graph["file"] = old.replace("encoder", "encoder.2")
    (folder / old).rename(folder / graph["file"])
    (folder / "spec.json").write_text(json.dumps(spec))
    second = publish(Engine.load(folder), "me/engine")
    newest = server.repositories["me/engine"][second.split("@")[1]]
    assert graph["file"] in {path.name for path in newest.iterdir()}
    assert old not in {path.name for path in newest.iterdir()}
    # The older commit can still be used.
    with open_cpu(first) as model:
        encode(model)


@pytest.mark.usefixtures("token")
def test_push_to_a_branch(server, own_engine):
    done = run("push", own_engine.folder, "me/engine", "--revision", "v1")
    assert done.exit_code == 0, done.output
    assert (server.repositories["me/engine"]["v1"] / "spec.json").is_file()
    assert not (next(iter(server.repositories["me/engine"].values())) / "spec.json").exists()


@pytest.mark.usefixtures("token")
def test_a_card_of_the_user_is_kept(server, own_engine, tmp_path, caplog):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my own words")
    server.repositories["me/engine"] = {FIRST: tmp_path / "mine"}
    publish(own_engine, "me/engine")
    newest = next(iter(server.repositories["me/engine"].values()))
    assert (newest / "README.md").read_text() == "my own words"
    assert "README.md of me/engine is kept" in caplog.text


@pytest.mark.usefixtures("token")
def test_private_is_not_public(server, own_engine, tmp_path):
    (tmp_path / "public").mkdir()
    server.repositories["me/engine"] = {FIRST: tmp_path / "public"}
    with pytest.raises(HubError, match="me/engine is public already; make it private on the hub, or leave out"):
        publish(own_engine, "me/engine", private=True)
    assert list(server.repositories["me/engine"]) == [FIRST]


def test_push_without_a_token(server, own_engine):
    with pytest.raises(HubError, match=r"me/engine cannot be uploaded to the hub .*; .*log in"):
        publish(own_engine, "me/engine")


def test_damaged_engines_are_not_pushed(server, own_engine):
    path = own_engine.folder / own_engine.spec.graphs["fp32"]["encoder"].file
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(EngineError, match="contents have changed since the export"):
        publish(own_engine, "me/engine")
    assert server.requests == []


@pytest.mark.parametrize("name", ["same-s", "me/you/them", "./here", "https://huggingface.co/me/x"])
def test_names_that_are_no_repositories(own_engine, name):
    with pytest.raises(InputError, match="is no repository of the hub; pass owner/name"):
        publish(own_engine, name)


def of_source(engine, source):
    change_spec(engine.folder, source=source)
    return Engine.load(engine.folder)


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize("source", [STABILITY, {"kind": "folder", "folder": "/home/me/secret/mine", "name": "mine"}])
def test_conditions_are_asked_about(server, own_engine, source):
    """Without a terminal there is no question and no upload, except with --yes."""
    engine = of_source(own_engine, source)
    done = run("push", engine.folder, "me/engine")
    assert done.exit_code == 2
    assert "there is no terminal to ask on; read them above, and pass --yes" in done.stderr
    assert server.requests == []
    shown = done.stdout
    if source is STABILITY:
        for duty in (
            "copy of the licence",
            "Powered by Stability AI",
            "community-license",
            "1,000,000 USD",
            "use-policy",
        ):
            assert duty in shown
        (engine.folder / "LICENSE.md").write_text("the licence")
    done = run("push", engine.folder, "me/engine", "--yes")
    assert done.exit_code == 0, done.output
    newest = next(iter(server.repositories["me/engine"].values()))
    assert "secret" not in "".join(path.read_text("latin-1") for path in newest.iterdir())
    assert (newest / "NOTICE").exists() == (newest / "LICENSE.md").exists() == (source is STABILITY)


def test_the_notice_is_that_of_the_licence(own_engine):
    """Section IV.a (ii) of the licence gives these words, and asks how the materials were changed."""
    spec = of_source(own_engine, STABILITY).spec
    words = (
        "This Stability AI Model is licensed under the Stability AI Community License, Copyright © Stability AI Ltd. "
        "All Rights Reserved"
    )
    assert notice(spec).startswith(words + "\n")
    assert "stabilityai/SAME-S" in notice(spec)
    assert "exported the autoencoder to ONNX" in notice(spec)
    card = model_card(spec, "me/engine")
    assert "**Powered by Stability AI.**" in card
    header = card.split("---\n")[1]
    for line in ("license: other", "license_name: stable-audio-community", "license_link: LICENSE.md"):
        assert line in header.splitlines()
    assert "base_model: stabilityai/SAME-S" in header.splitlines()


@pytest.mark.usefixtures("token")
def test_a_licence_that_cannot_be_fetched_stops_the_upload(server, own_engine, tmp_path):
    engine = of_source(own_engine, STABILITY)
    with pytest.raises(EngineError, match=r"LICENSE.md: is missing, and .*; put the licence there$") as caught:
        publish(engine, "me/engine")
    assert_one_line(caught.value)
    # Another text under that name is not taken for the licence.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "LICENSE.md").write_text("other terms")
    commit = "27b5a21b791b1b033d193a9e1e3ce78493f102f9"
    server.repositories["stabilityai/stable-audio-3-medium"] = {commit: tmp_path / "other"}
    with pytest.raises(EngineError, match=r"does not hold the known text; put the licence there$"):
        publish(engine, "me/engine")
    assert "me/engine" not in server.repositories


@pytest.mark.usefixtures("token")
def test_a_linked_licence_is_not_published(server, own_engine, tmp_path):
    """An engine folder that was downloaded may hold a link to any file of the user."""
    engine = of_source(own_engine, STABILITY)
    (tmp_path / "secret").write_text("a private key")
    (engine.folder / "LICENSE.md").symlink_to(tmp_path / "secret")
    with pytest.raises(EngineError, match=r"LICENSE\.md: is a link; put the licence itself there$"):
        publish(engine, "me/engine")
    assert server.requests == []


def test_licences(own_engine):
    sources = {
        "Stability AI Community License": STABILITY,
        "MIT": {"kind": "bundled", "name": "same-tiny"},
        "none": {"kind": "random", "name": "same-s", "seed": 0},
        "unknown": {"kind": "hub", "name": "someone/else", "revision": OTHER},
    }
    for title, source in sources.items():
        found = licence_of(dataclasses.replace(own_engine.spec, source=source))
        assert found.title == title
        assert bool(found.duties) == (title not in ("MIT", "none"))
