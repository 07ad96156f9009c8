"""Every command and every Python snippet of the README runs, on small models under the published names."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import soundfile as sf
from click.testing import CliRunner
from helpers import RATE, noise, seeded

from samekit.cli import main
from samekit_export import checkpoint

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
LINES = [line for language, text in BLOCKS if not language for line in text.replace("\\\n", " ").splitlines()]


def commands_of(program):
    return [shlex.split(line, comments=True)[1:] for line in LINES if line.startswith(f"{program} ")]


def test_nothing_is_missed():
    assert len(PYTHON) >= 2
    assert len(commands_of("make")) >= 6
    assert len(commands_of("samekit")) >= 7


@pytest.fixture(scope="module")
def user(tmp_path_factory, engine_of):
    """A folder with the files that the README speaks of."""
    folder = tmp_path_factory.mktemp("user")
    for name in ("same-s", "same-l"):
        shutil.copytree(engine_of(name.replace("same", "tiny")).folder, folder / "engines" / name)
    sf.write(folder / "song.flac", noise((2 * RATE, 2)), RATE)
    (folder / "clips").mkdir()
    for index in range(2):
        sf.write(folder / "clips" / f"{index}.wav", noise((RATE, 2), index), RATE)
        (folder / "clips" / f"{index}.txt").write_text(f"caption {index}")
    return folder


@pytest.mark.parametrize("arguments", commands_of("make"), ids=" ".join)
def test_make(arguments):
    done = subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    named = {argument.split("=")[0] for argument in arguments if "=" in argument}
    assert named <= set(re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("arguments", commands_of("samekit"), ids=" ".join)
def test_commands(user, arguments, monkeypatch):
    monkeypatch.chdir(user)
    if "--ray" in arguments:
        # There is no such cluster here; that its options are there can be seen all the same.
        command = main.commands[arguments[0]]
        assert command.make_context(arguments[0], arguments[1:]).params["address"] == "HEAD:6379"
        return
    # Only what comes with samekit can be loaded here.
    bundled = checkpoint.load

    def load(model, *_):
        return bundled(model) if model in checkpoint.BUNDLED_FOLDERS else seeded("tiny-l")

    with mock.patch("samekit_export.checkpoint.load", load):
        result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[-1])
def test_snippets(user, code, monkeypatch):
    monkeypatch.chdir(user)
    shutil.rmtree(user / "latents", ignore_errors=True)
    exec(code, {"waveform": noise((2, RATE))})  # noqa: S102 our own text


def test_files_and_links_that_are_named_exist():
    for name in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / name).exists(), name
    tree = README.split("## The code")[1].split("```")[1]
    for name in re.findall(r"[\w/]+\.py", tree):
        assert any(list(ROOT.glob(f"{folders}{name}")) for folders in ("*/", "*/*/", "*/*/*/")), name
