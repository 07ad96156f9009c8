"""README and guides: every command and every Python snippet runs, on small models under the published names.

What they show of output, figures, messages, options and files is so.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import doctest
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import click
import pytest
import soundfile as sf
from click.testing import CliRunner
from helpers import RATE, noise, seeded
from test_triton import stand_in

from samekit.cli.main import main
from samekit.engine.spec import EngineSpec
from samekit_export import checkpoint, hub

ROOT = Path(__file__).parents[1]
DOCUMENTS = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in DOCUMENTS.items()}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
EXTRAS = set(
    re.findall(r"^(\w+) = \[", PYPROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0], re.MULTILINE)
)

# The languages of blocks. What is "text" is neither a command nor code.
LANGUAGES = ("sh", "console", "python", "pycon", "dockerfile", "text")
# Published name -> the small model that stands for it.
STAND_INS = {"same-s": "tiny-s", "same-l": "tiny-l"}
SECONDS = 12
PIECE_SECONDS = 24


# --- What the documents hold -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A command, or a piece of Python, with the output that is shown for it."""

    document: str
    line: int
    language: str
    text: str
    shown: str | None = None
    """None where no output is shown."""

    def __str__(self):
        return f"{self.document}:{self.line} {self.text.splitlines()[0][:60]}"

    @property
    def words(self):
        """Of a command, without what follows `#`."""
        return shlex.split(self.text, comments=True)


def blocks():
    """Document, line, language and text of every block."""
    for name, text in TEXTS.items():
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield name, text.count("\n", 0, match.start()) + 2, match[1], match[2]


def steps():
    """Everything that runs, in the order of the documents."""
    for name, line, language, text in blocks():
        if language == "sh":
            # A command may go on in the next line.
            for match in re.finditer(r"(?:.*\\\n)*.+", text):
                if shlex.split(match[0].replace("\\\n", " "), comments=True):
                    yield Step(name, line + text.count("\n", 0, match.start()), language, match[0].replace("\\\n", " "))
        elif language == "console":
            for match in re.finditer(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
                yield Step(name, line + text.count("\n", 0, match.start()), language, match[1], match[2])
        elif language in ("python", "pycon"):
            yield Step(name, line, language, text)


STEPS = list(steps())
COMMANDS = [step for step in STEPS if step.language in ("sh", "console")]


def commands_of(*programs):
    return [step for step in COMMANDS if step.words[0] in programs]


def test_nothing_is_missed():
    assert {language for _, _, language, _ in blocks()} == set(LANGUAGES)
    # Every fence belongs to a block that was found.
    fences = {name: len(re.findall(r"^\s*```", text, re.MULTILINE)) for name, text in TEXTS.items()}
    assert fences == {name: 2 * sum(each[0] == name for each in blocks()) for name in TEXTS}
    assert len([step for step in STEPS if step.language in ("python", "pycon")]) >= 6
    assert len(commands_of("make")) >= 6
    assert len(commands_of("samekit")) >= 30
    assert len([step for step in COMMANDS if step.shown is not None]) >= 14
    readme = {step.words[1] for step in commands_of("samekit") if step.document == "README.md"}
    assert {"export", "encode", "decode", "pre-encode", "doctor"} <= readme
    shown = {word for step in commands_of("samekit") for word in step.words[1:3]}
    assert set(main.list_commands(click.Context(main))) <= shown, "a command that no document shows"
    assert {step.words[0] for step in COMMANDS} == set(PROGRAM_RUNNERS)


# --- What runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, engine_of, bundled_engine):
    """A folder for each document, with the files that the documents speak of."""
    folders = {}

    def folder(document):
        if document not in folders:
            folders[document] = tmp_path_factory.mktemp("user")
            prepare(folders[document], engine_of, bundled_engine.folder, exports=document == "docs/export.md")
        return folders[document]

    return folder


def prepare(folder, engine_of, tiny, *, exports):
    for name, small in STAND_INS.items():
        engine = shutil.copytree(engine_of(small).folder, folder / "engines" / name)
        source = {"kind": "hub", "name": hub.HUB_REPOSITORIES[name]}
        spec = dataclasses.replace(EngineSpec.load(engine), name=name, source=source)
        (engine / "spec.json").write_text(spec.to_json(), encoding="utf-8")
    shutil.copytree(tiny, folder / "demo" / "engines" / "same-tiny")
    # The guide to exports makes it.
    if not exports:
        shutil.copytree(tiny, folder / "engines" / "same-tiny")
    sf.write(folder / "song.flac", noise((SECONDS * RATE, 2)), RATE)
    sf.write(folder / "demo" / "piece.flac", noise((PIECE_SECONDS * RATE, 2)), RATE)
    (folder / "empty").mkdir()
    (folder / "clips").mkdir()
    for index in range(2):
        sf.write(folder / "clips" / f"{index}.wav", noise((RATE, 2), index), RATE)
        (folder / "clips" / f"{index}.txt").write_text(f"caption {index}")


def small_checkpoint(model, *_):
    """In place of `checkpoint.load`: only what comes with samekit can be loaded here."""
    if model in checkpoint.BUNDLED_FOLDERS:
        return checkpoint.load_bundled(model)
    return dataclasses.replace(seeded(STAND_INS[model]), name=model)


def assert_shown(step, output):
    """Output is what the document shows; `...` there stands for anything."""
    checker, flags = doctest.OutputChecker(), doctest.ELLIPSIS
    if not checker.check_output(step.shown, output, flags):
        example = doctest.Example(step.text, step.shown)
        pytest.fail(f"{step}\n{checker.output_difference(example, output, flags | doctest.REPORT_NDIFF)}")


def run_samekit(step, _monkeypatch):
    arguments = step.words[1:]
    if "--ray" in arguments:
        # There is no such cluster here; that its options are there can be seen all the same.
        command = main.commands[arguments[0]]
        assert command.make_context(arguments[0], arguments[1:]).params["address"] == "HEAD:6379"
        return
    with mock.patch("samekit_export.checkpoint.load", small_checkpoint):
        result = CliRunner().invoke(main, arguments)
    assert result.exit_code == (2 if (step.shown or "").startswith("Error: ") else 0), result.output
    if step.shown is not None:
        # Progress is shown on standard error, and errors are.
        assert_shown(step, result.stdout if result.exit_code == 0 else result.stderr)


def run_make(step, _monkeypatch):
    arguments = step.words[1:]
    done = subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    named = {argument.split("=")[0] for argument in arguments if "=" in argument}
    assert named <= set(re.findall(r"^(\w+) \?=", MAKEFILE, re.MULTILINE))


def test_make_targets_in_running_text_exist():
    targets = set(re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.MULTILINE))
    for name, text in TEXTS.items():
        assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets, name


def run_pip(step, _monkeypatch):
    """Nothing is installed here; the extras are those of the package."""
    assert step.words[1] == "install"
    (package,) = step.words[2:]
    name, extras = re.fullmatch(r"(\w+)\[([\w,]+)\]", package).groups()
    assert name == "samekit"
    assert set(extras.split(",")) <= EXTRAS


def test_extras_in_running_text_exist():
    for name, text in TEXTS.items():
        for extras in re.findall(r"samekit\[([\w,]+)\]", text):
            assert set(extras.split(",")) <= EXTRAS, name


def run_python_program(step, monkeypatch):
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
    elif program == "benchmarks/latency.py":
        # Takes minutes; that it takes these arguments can be seen all the same.
        code = "import sys, latency; latency.main.make_context('latency', sys.argv[1:])"
        monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'benchmarks'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
    else:
        # Takes an hour.
        assert step.words == ["python", "tools/train_tiny.py"]
        done = subprocess.run([sys.executable, ROOT / program, "--help"], capture_output=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr


def run_docker(step, _monkeypatch):
    """Not here; but what it serves is what was written before."""
    assert step.words[:3] == ["docker", "run", "--rm"]
    assert step.words[step.words.index("--model-repository") + 1] == "/models"
    assert "$PWD/models:/models" in step.words
    assert sorted(path.name for path in Path("models").iterdir()) == ["same-l-decoder", "same-l-encoder"]


def test_container_file():
    (text,) = [text for _, _, language, text in blocks() if language == "dockerfile"]
    assert set(re.findall(r"\.whl\)\[(\w+)\]", text)) <= EXTRAS
    assert 'ENTRYPOINT ["samekit"]' in text
    assert 'samekit = "samekit.cli.main:main"' in PYPROJECT
    (variable,) = re.findall(r"^ENV (\w+)=/engines$", text, re.MULTILINE)
    assert f'environ.get("{variable}")' in (ROOT / "runtime/samekit/engine/folder.py").read_text(encoding="utf-8")


def run_snippet(step, _monkeypatch):
    with contextlib.redirect_stdout(io.StringIO()):
        exec(step.text, {})  # noqa: S102 our own text


def run_session(step, _monkeypatch):
    session = doctest.DocTestParser().get_doctest(step.text, {}, str(step), step.document, step.line)
    assert len([example for example in session.examples if example.want]) >= 2
    report = io.StringIO()
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(session, out=report.write)
    assert results.failed == 0, report.getvalue()


LANGUAGE_RUNNERS = {"python": run_snippet, "pycon": run_session}
PROGRAM_RUNNERS = {
    "samekit": run_samekit,
    "make": run_make,
    "pip": run_pip,
    "python": run_python_program,
    "docker": run_docker,
}


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_step(step, folder_of, monkeypatch):
    """In the order of the document, in one folder a document: a step finds what those before it made."""
    monkeypatch.chdir(folder_of(step.document))
    run = LANGUAGE_RUNNERS.get(step.language) or PROGRAM_RUNNERS[step.words[0]]
    run(step, monkeypatch)


# --- What is so --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*DOCUMENTS, "ARCHITECTURE.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_files_and_links_that_are_named_exist(name):
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (path.parent / link).exists(), link
    for file in re.findall(r"`((?:tests|tools|examples|benchmarks|docs)/[\w./-]+\.(?:py|md))`", text):
        assert (ROOT / file).exists(), file


def test_every_guide_is_in_both_indexes():
    guides = {path.name for path in ROOT.glob("docs/*.md")} - {"README.md"}
    assert guides == set(re.findall(r"\]\(([\w-]+\.md)\)", TEXTS["docs/README.md"]))
    assert guides == set(re.findall(r"\]\(docs/([\w-]+\.md)\)", TEXTS["README.md"]))


def test_tree_of_the_code_names_every_file_once():
    tree = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split("## The code")[1].split("```")[1]
    named, above = [], []
    for line in tree.splitlines()[1:]:
        indent, name = re.match(r"( *)(\S+)", line).groups()
        above = [*above[: len(indent) // 2], name.rstrip("/")]
        named.append("/".join(above))
    assert len(named) == len(set(named))
    assert [name for name in named if not (ROOT / name).exists()] == []
    code = [path for folder in ("runtime", "export", "tools", "examples") for path in (ROOT / folder).rglob("*.py")]
    assert {path.relative_to(ROOT).as_posix() for path in code} <= set(named)


def rows_of(text):
    """The rows of every table, without spaces at their ends."""
    return [line.rstrip() for line in text.splitlines() if line.startswith("|")]


def test_figures_are_those_of_record():
    """The README's table is rows of benchmarks/README.md, and its figures of robustness are those of SECURITY.md."""
    figures = TEXTS["README.md"].split("<!-- Figures of record")[1].split("<!-- End of the figures")[0]
    record = rows_of((ROOT / "benchmarks/README.md").read_text(encoding="utf-8"))
    shown = rows_of(figures)
    assert len(shown) >= 7
    assert [row for row in shown if row not in record] == []
    robust = TEXTS["README.md"].split("## How far it can be trusted")[1].split("**No engine")[0]
    security = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    numbers = re.findall(r"\d[\d,]*\d", robust)
    assert len(numbers) == 4
    assert [number for number in numbers if number not in security] == []


@pytest.mark.parametrize("name", ["docs/dataset.md", "docs/deployment.md", "docs/encode.md"])
def test_figures_in_guides_are_those_of_record(name):
    record = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    shown = re.findall(r"\d+\.\d+(?= s\b| %)|\d+(?= MiB)", prose_of(name))
    assert len(shown) >= 2
    assert [figure for figure in shown if not re.search(rf"(?<![\d.]){re.escape(figure)}(?!\.?\d)", record)] == []


def prose_of(name):
    """A document without its blocks."""
    return re.sub(r"^```.*?^```", "", TEXTS[name], flags=re.MULTILINE | re.DOTALL)


def test_options_in_running_text_exist():
    """Every `--option` is one of the commands, of the benchmarks, or of a program that is named."""
    context = click.Context(main)
    commands = [main.get_command(context, name) for name in main.list_commands(context)]
    options = {option for command in commands for parameter in command.params for option in parameter.opts}
    benchmarks = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py"))
    others = {"--encoded_dir", "--cpuset-cpus", "--cpus", "--gpus", "--help", *re.findall(r'"(--\w+)"', benchmarks)}
    for name in TEXTS:
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", prose_of(name))) <= options | others, name


# --- Messages ----------------------------------------------------------------------------------------------


def texts_of(node, known):
    """What an expression says as text, with "..." for what is known only later; several if a name has several values.

    Args:
        node: the expression.
        known: name -> what it may say.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [re.sub(r"%[sd]", "...", node.value)]
    if isinstance(node, ast.Name):
        return known.get(node.id, [])
    if isinstance(node, ast.FormattedValue):
        return texts_of(node.value, known) or ["..."]
    if isinstance(node, ast.JoinedStr):
        parts = [texts_of(part, known) for part in node.values]
        return ["".join(choice) for choice in itertools.product(*parts)]
    return []


def messages_in_the_code():
    """Every text of the code. Those of a call's arguments, and of a function's defaults, are one: cause and cure."""
    found = set()
    for path in (each for folder in ("runtime", "export") for each in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            target.id: texts_of(node.value, {})
            for node in tree.body
            if isinstance(node, (ast.Assign, ast.AnnAssign))
            for target in (node.targets[:1] if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        for scope in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            known = {name: list(texts) for name, texts in constants.items()}
            for node in ast.walk(scope):
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    known.setdefault(node.targets[0].id, []).extend(texts_of(node.value, {}))
            found.add(" ".join(text for default in scope.args.defaults for text in texts_of(default, {})))
            for node in ast.walk(scope):
                found.update(texts_of(node, known))
                if isinstance(node, ast.Call):
                    found.add(" ".join(text for argument in node.args for text in texts_of(argument, known)[:1]))
    return found


MESSAGES = re.findall(r"^\| `(.*?)` \|", TEXTS["docs/troubleshooting.md"], re.MULTILINE)


@pytest.fixture(scope="module")
def messages():
    return messages_in_the_code()


def test_messages_are_many():
    assert len(MESSAGES) >= 40
    assert len(set(MESSAGES)) == len(MESSAGES)


def stands_in(message, messages):
    """Whether the parts of a message that do not vary stand in one text, in this order."""
    parts = [part for part in (each.strip(" :;().") for each in message.split("...")) if part]
    assert sum(map(len, parts)) >= 15, "too little to find it by"
    pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    return any(pattern.search(text) for text in messages)


@pytest.mark.parametrize("message", MESSAGES)
def test_message_is_in_the_code(message, messages):
    assert stands_in(message, messages)


def test_messages_that_are_not_there_are_noticed(messages):
    for message in ("no engine for ... in the attic", "contents have changed since the import", "is empty; paint it"):
        assert not stands_in(message, messages)


def test_statuses_of_clips_are_those_that_there_are():
    from typing import get_args

    from samekit.dataset.manifest import Status

    table = TEXTS["docs/dataset.md"].split("| status |")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) | {"encoded", "gone"} == set(get_args(Status))


def test_metadata_are_those_that_are_written(folder_of, monkeypatch):
    """The table of the guide names every field of a clip's `.json`."""
    monkeypatch.chdir(folder_of("docs/dataset.md"))
    arguments = ["pre-encode", "--model", "same-s", "--data_dir", "clips", "--output_path", "latents"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    clip = json.loads(Path("latents", "000000000000.json").read_text(encoding="utf-8"))
    table = TEXTS["docs/dataset.md"].split("| field of the `.json` |")[1].split("\n\n")[0]
    described = [row.split("|")[1] for row in table.splitlines()]
    assert set(re.findall(r"`(\w+)`", " ".join(described[1:]))) == set(clip)
