"""Run every command and Python snippet of the README and the guides, and check the names and figures in them.

The published model names (`same-s`, `same-l`) stand for small models here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import doctest
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args
from unittest import mock

import click
import pytest
import soundfile as sf
from click.testing import CliRunner
from helpers import RATE, noise, seeded
from test_triton_client import stand_in

from samekit.cli.main import main
from samekit.dataset.manifest import Status
from samekit.engine.spec import EngineSpec
from samekit.serving.options import ServeOptions
from samekit_export import checkpoint, hub, open_backend

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md")))
OTHERS = ("ARCHITECTURE.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/README.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in (*DOCUMENTS, *OTHERS)}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
ENGINES_IN_CONTAINER = re.search(r"SAMEKIT_CACHE=(\S+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"))[1]
EXTRAS = set(
    re.findall(r"^(\w+) = \[", PYPROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0], re.MULTILINE)
)
SMALL_MODELS = {"same-s": "tiny-s", "same-l": "tiny-l"}
SECONDS = 12
PIECE_SECONDS = 24


# --- Commands and snippets --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A command or a Python snippet, with the output that the document shows for it, if any."""

    document: str
    line: int
    language: str
    text: str
    output: str | None = None

    def __str__(self):
        return f"{self.document}:{self.line} {self.text.splitlines()[0][:60]}"

    @property
    def words(self):
        """The words of a command, without its comment."""
        return shlex.split(self.text, comments=True)


def blocks(name):
    """Yield the line, language and text of every fenced block of a document."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", TEXTS[name], re.MULTILINE | re.DOTALL):
        yield TEXTS[name].count("\n", 0, match.start()) + 2, match[1], match[2]


def steps(name):
    """Yield all commands and snippets of a document, in order."""
    for first, language, text in blocks(name):
        if language in ("python", "pycon"):
            yield Step(name, first, language, text)
        # A command can be continued on the next line, and can be followed by its output.
        pattern = {"sh": r"((?:.*\\\n)*.+)", "console": r"^\$ (.*)\n((?:(?!\$ ).*\n)*)"}.get(language)
        for match in re.finditer(pattern, text, re.MULTILINE) if pattern else ():
            line = first + text.count("\n", 0, match.start())
            yield Step(name, line, language, match[1].replace("\\\n", " "), *match.groups()[1:])


STEPS = [step for name in DOCUMENTS for step in steps(name)]


def command_named(name):
    """Return the subcommand of samekit that has this name."""
    return main.get_command(click.Context(main), name)


def command_names():
    """Return the names of all subcommands of samekit."""
    return main.list_commands(click.Context(main))


def test_every_block_is_known():
    languages = {language for name in DOCUMENTS for _, language, _ in blocks(name)}
    assert languages <= {"sh", "console", "python", "pycon", "yaml", "text"}
    for name in DOCUMENTS:
        assert len(re.findall(r"^\s*```", TEXTS[name], re.MULTILINE)) == 2 * len(list(blocks(name))), name


def test_every_command_is_shown():
    shown = {word for step in STEPS if step.language in ("sh", "console") for word in step.words[1:3]}
    assert set(command_names()) <= shown


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, engine_of, bundled_engine):
    """Return the working folder of a document, with the files that the document uses."""
    folders = {}

    def folder(document):
        if document not in folders:
            folders[document] = tmp_path_factory.mktemp("user")
            prepare(folders[document], engine_of, bundled_engine.folder, exports=document == "docs/export.md")
        return folders[document]

    return folder


def prepare(folder, engine_of, tiny, *, exports):
    for name, small in SMALL_MODELS.items():
        engine = shutil.copytree(engine_of(small).folder, folder / "engines" / name)
        source = {"kind": "hub", "name": hub.HUB_REPOSITORIES[name]}
        spec = dataclasses.replace(EngineSpec.load(engine), name=name, source=source)
        (engine / "spec.json").write_text(spec.to_json(), encoding="utf-8")
    # The guide to exports exports it.
    if not exports:
        shutil.copytree(tiny, folder / "engines" / "same-tiny")
    sf.write(folder / "song.flac", noise((SECONDS * RATE, 2)), RATE)
    (folder / "demo").mkdir()
    sf.write(folder / "demo" / "piece.flac", noise((PIECE_SECONDS * RATE, 2)), RATE)
    (folder / "empty").mkdir()
    (folder / "clips").mkdir()
    for index in range(2):
        sf.write(folder / "clips" / f"{index}.wav", noise((RATE, 2), index), RATE)
        (folder / "clips" / f"{index}.txt").write_text(f"caption {index}")


def load_small_checkpoint(model, *_, **__):
    """Load a small checkpoint instead of a published one."""
    if model in checkpoint.BUNDLED_FOLDERS:
        return checkpoint.load_bundled(model)
    return dataclasses.replace(seeded(SMALL_MODELS[model]), name=model)


def assert_shown(step, output):
    """Compare output with the document, in which `...` matches any text."""
    checker, flags = doctest.OutputChecker(), doctest.ELLIPSIS
    if not checker.check_output(step.output, output, flags):
        example = doctest.Example(step.text, step.output)
        pytest.fail(f"{step}\n{checker.output_difference(example, output, flags | doctest.REPORT_NDIFF)}")


def run_samekit(step):
    arguments = step.words[1:]
    if arguments[0] in ("serve", "tune") or "--ray" in arguments or any(word.startswith("me/") for word in arguments):
        # There is no such cluster, repository or GPU here, and a server would not end. So the options are checked.
        assert command_named(arguments[0]).make_context(arguments[0], arguments[1:])
        return
    with contextlib.ExitStack() as stack:
        # Modules that import this function have a name of their own for it, which stays after the patch has ended.
        for module in (checkpoint, open_backend):
            stack.enter_context(mock.patch.object(module, "load", load_small_checkpoint))
        result = CliRunner().invoke(main, arguments)
    assert result.exit_code == (2 if (step.output or "").startswith("Error: ") else 0), result.output
    if step.output is not None:
        # Progress and errors are printed to standard error.
        assert_shown(step, result.stdout if result.exit_code == 0 else result.stderr)


def run_make(step):
    arguments = step.words[1:]
    done = subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    variables = {argument.split("=")[0] for argument in arguments if "=" in argument}
    assert variables <= set(re.findall(r"^(\w+) \?=", MAKEFILE, re.MULTILINE))


def run_pip(step):
    """Check the arguments only, because `test_extras_exist` checks the extras."""
    assert step.words[1] == "install"
    assert re.fullmatch(r"samekit\[[\w,]+\]", *step.words[2:])


def run_python_program(step):
    program, *arguments = step.words[1:]
    if program == "-m":
        done = subprocess.run([sys.executable, *step.words[1:]], capture_output=True, text=True, check=True, timeout=60)
        assert_shown(step, done.stdout)
    elif program == "examples/triton_client.py":
        import triton_client

        with stand_in(Path("models")) as address:
            assert arguments[-2:] == ["--url", "localhost:8001"]
            result = CliRunner().invoke(triton_client.main, [*arguments[:-1], address])
        assert result.exit_code == 0, result.output
    else:
        # Training takes an hour.
        assert step.words == ["python", "tools/train_tiny.py"]
        done = subprocess.run([sys.executable, ROOT / program, "--help"], capture_output=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr


def run_curl(step):
    """Check that the server has this route. `test_serve.py` sends such requests."""
    (url,) = [word for word in step.words if word.startswith("http:")]
    route = url.removeprefix("http://127.0.0.1:8000")
    assert f'.post("{route}",' in (ROOT / "runtime/samekit/serving/http.py").read_text(encoding="utf-8")


def run_docker(step):
    """Check the options of samekit in a container, or that Triton would serve the models that an earlier step wrote."""
    if step.words[1] == "build":
        assert step.words[2:] == ["--tag", "samekit", "."]
        return
    assert step.words[:3] == ["docker", "run", "--rm"]
    if "samekit" in step.words:
        assert f"$PWD/engines:{ENGINES_IN_CONTAINER}:ro" in step.words
        command, *arguments = step.words[step.words.index("samekit") + 1 :]
        assert command_named(command).make_context(command, arguments)
        return
    assert step.words[step.words.index("--model-repository") + 1] == "/models"
    assert "$PWD/models:/models" in step.words
    assert sorted(path.name for path in Path("models").iterdir()) == ["same-l-decoder", "same-l-encoder"]


def run_snippet(step):
    with contextlib.redirect_stdout(io.StringIO()):
        exec(step.text, {})


def run_session(step):
    session = doctest.DocTestParser().get_doctest(step.text, {}, str(step), step.document, step.line)
    report = io.StringIO()
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(session, out=report.write)
    assert results.attempted > 0
    assert results.failed == 0, report.getvalue()


LANGUAGE_RUNNERS = {"python": run_snippet, "pycon": run_session}
PROGRAM_RUNNERS = {
    "curl": run_curl,
    "samekit": run_samekit,
    "make": run_make,
    "pip": run_pip,
    "python": run_python_program,
    "docker": run_docker,
}


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_step(step, folder_of, monkeypatch):
    """Run one step; the steps of a document share a folder and run in order."""
    monkeypatch.chdir(folder_of(step.document))
    run = LANGUAGE_RUNNERS.get(step.language) or PROGRAM_RUNNERS[step.words[0]]
    run(step)


# --- Names and links --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_files_links_and_anchors_exist(name):
    for link, _, anchor in re.findall(r"\]\(([\w./-]*)(#([\w-]+))?\)", TEXTS[name]):
        target = ((ROOT / name).parent / link if link else ROOT / name).resolve()
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, f"{link}#{anchor}"
    for file in re.findall(r"`((?:tests|tools|examples|benchmarks|docs)/[\w./-]+\.(?:py|md))`", TEXTS[name]):
        assert (ROOT / file).exists(), file


def test_both_indexes_list_every_guide():
    guides = {Path(name).name for name in DOCUMENTS if name.startswith("docs/")} - {"README.md"}
    assert guides == set(re.findall(r"\]\(([\w-]+\.md)\)", TEXTS["docs/README.md"]))
    assert guides == set(re.findall(r"\]\(docs/([\w-]+\.md)\)", TEXTS["README.md"]))


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.MULTILINE))
    for name, text in TEXTS.items():
        assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets, name


def test_extras_exist():
    for name, text in TEXTS.items():
        for extras in re.findall(r"samekit\[([\w,]+)\]", text):
            assert set(extras.split(",")) <= EXTRAS, name


def prose_of(name):
    """Return a document without its blocks."""
    return re.sub(r"^```.*?^```", "", TEXTS[name], flags=re.MULTILINE | re.DOTALL)


def test_options_exist():
    """Every `--option` belongs to a command of samekit or to another program that the documents name."""
    options = {
        option
        for name in command_names()
        for each in command_named(name).params
        for option in (*each.opts, *each.secondary_opts)
    }
    others = {"--encoded_dir", "--cpuset-cpus", "--cpus", "--gpus", "--help", "--build-arg", "--shm-size", "--publish"}
    others |= {"--no-deps"}
    for name in DOCUMENTS:
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", prose_of(name))) <= options | others, name


def test_extras_of_containers_exist():
    found = re.findall(r"EXTRAS=([\w,]+)", "".join(TEXTS.values()))
    assert found
    assert {extra for extras in found for extra in extras.split(",")} <= EXTRAS


def test_file_for_a_cluster():
    """Ray Serve would find the application, and `ServeOptions` has every argument."""
    yaml = pytest.importorskip("yaml")
    (text,) = [text for name in DOCUMENTS for _, language, text in blocks(name) if language == "yaml"]
    (application,) = yaml.safe_load(text)["applications"]
    module, function = application["import_path"].split(":")
    assert f"\ndef {function}(" in (ROOT / "runtime" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    assert application["args"].keys() <= {field.name for field in dataclasses.fields(ServeOptions)}


def test_tree_of_the_code_names_every_module_once():
    tree = TEXTS["ARCHITECTURE.md"].split("## The code")[1].split("```text\n")[1].split("```")[0]
    named, package, folder = [], "", ""
    for line in tree.splitlines():
        # Folders of packages are indented; a line without a folder continues the line above.
        if match := re.match(r"( ?)(?: ?)([\w/]+/) ", line):
            package = package if match[1] else match[2]
            folder = package + match[2] if match[1] else package
        named += [folder + file for file in re.findall(r"\w+\.py", line)]
    modules = [path for root in ("runtime", "export", "tools", "examples") for path in (ROOT / root).rglob("[!_]*.py")]
    assert sorted(named) == sorted(path.relative_to(ROOT).as_posix() for path in modules)


# --- Figures, tables and messages ---------------------------------------------------------------------------


def rows_of(text):
    """Return the rows of every table."""
    return [line for line in text.splitlines() if line.startswith("|")]


def test_figures_of_the_readme_are_those_of_record():
    rows = rows_of(TEXTS["README.md"])
    assert rows
    assert set(rows) <= set(rows_of(TEXTS["benchmarks/README.md"]))


def test_figures_of_guides_are_those_of_record():
    guides = [prose_of(name) for name in DOCUMENTS if name.startswith("docs/")]
    figures = re.findall(r"\d+\.\d+(?= s\b| %)|\d+(?= MiB)", "".join(guides))
    assert figures
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\.?\d)", TEXTS["benchmarks/README.md"]), figure


def test_quoted_messages_are_in_the_code():
    paths = [path for folder in ("runtime", "export") for path in (ROOT / folder).rglob("*.py")]
    # A long message consists of several string literals.
    code = re.sub(r'"\s*\n\s*f?"', "", "".join(path.read_text(encoding="utf-8") for path in paths))
    messages = re.findall(r"\*\*`(.*?)`\*\*", TEXTS["docs/troubleshooting.md"])
    assert messages
    missing = [message for message in messages for part in message.split("...") if part.strip(" ()") not in code]
    assert missing == []


def test_statuses_of_clips_are_complete():
    table = TEXTS["docs/dataset.md"].split("| status |")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) | {"encoded", "gone"} == set(get_args(Status))


def test_metadata_fields_are_complete(folder_of, monkeypatch):
    monkeypatch.chdir(folder_of("docs/dataset.md"))
    # The commands of the guide have written `latents` with other settings.
    arguments = ["pre-encode", "--model", "same-s", "--data_dir", "clips", "--output_path", "fields"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    clip = json.loads(Path("fields", "000000000000.json").read_text(encoding="utf-8"))
    table = TEXTS["docs/dataset.md"].split("| field of the `.json` |")[1].split("\n\n")[0]
    fields = " ".join(row.split("|")[1] for row in rows_of(table))
    assert set(re.findall(r"`(\w+)`", fields)) == set(clip)
