"""What a newcomer meets first: the start screen, completion, `--json`, one line for each wrong argument, progress."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from click.testing import CliRunner
from helpers import noise

from samekit.cli.group import say_json
from samekit.cli.main import main
from samekit.packages import install_command

SAMEKIT = [sys.executable, "-m", "samekit"]


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(*arguments):
    """Run a command that must fail, and return its error message of one line."""
    result = run(*arguments)
    assert result.exit_code == 2, repr(result.exception)
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert "; " in line
    assert result.stdout == ""
    return line


def test_without_arguments_it_shows_three_commands_to_begin_with():
    result = run()
    assert result.exit_code == 0
    begin = [line.split()[:2] for line in result.stdout.splitlines() if line.startswith("  samekit ")]
    assert begin == [["samekit", "demo"], ["samekit", "encode"], ["samekit", "doctor"]]
    assert "samekit --help" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "cause", "command"),
    [
        (["encode", "a", "b", "--model", "x", "--window", "0"], "'--window': 0 is not in the range x>=1", "encode"),
        (["encode", "a", "b", "--model", "x", "--precision", "fp8"], "is not one of 'fp32', 'fp16', 'int8'", "encode"),
        (["encode", "a", "b", "--model", "x", "--colour", "red"], "No such option '--colour'", "encode"),
        (["decode", "a"], "Missing argument 'AUDIO'", "decode"),
        (["export"], "Missing argument 'MODEL'", "export"),
        (["triton", "out", "--kind", "\x1b[31m", "--model", "x"], r"'\x1b[31m' is not one of", "triton"),
        (["nonsense"], "No such command 'nonsense'", ""),
        (["--nonsense"], "No such option '--nonsense'", ""),
    ],
)
def test_wrong_arguments_take_one_line(arguments, cause, command):
    line = refused(*arguments)
    assert cause in line
    assert line.endswith(f"; run: {f'main {command}'.strip()} --help")


def test_verbose_works_before_and_after_the_command(engine_of, tmp_path):
    engine, source = engine_of("tiny-s").folder, tmp_path / "a.npy"
    np.save(source, np.zeros((32, 4), np.float32))
    command = ["decode", source, tmp_path / "a.wav", "--model", engine, "--backend", "auto", "--device", "cpu"]
    for arguments in (["-v", *command], [*command, "-v"], [*command, "--verbose"], command):
        done = subprocess.run([*SAMEKIT, *map(str, arguments)], capture_output=True, text=True, check=True, timeout=60)
        shown = "samekit: backend onnxruntime on cpu, fp32" in done.stderr.splitlines()
        assert shown == (arguments is not command)


def test_verbose_ends_with_the_command():
    before = logging.getLogger().level
    assert run("doctor", "-v").exit_code == 0
    assert logging.getLogger().level == before


def complete(*words):
    """Return what the Tab key would offer after these words, as bash asks click for it."""
    line = ["samekit", *words]
    variables = {"_SAMEKIT_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(line), "COMP_CWORD": str(len(words))}
    script = Path(sys.executable).with_name("samekit")
    done = subprocess.run([script], env=os.environ | variables, capture_output=True, text=True, check=True, timeout=60)
    return {item.split(",")[1] for item in done.stdout.splitlines()}


def test_completion():
    """Commands of entry points complete too."""
    assert {"encode", "export"} <= complete("e")
    assert "--tensorrt" in complete("export", "--ten")
    assert complete("decode", "a.npy", "a.wav", "--peak", "at") == {"attenuate"}
    assert "_SAMEKIT_COMPLETE=bash_source samekit" in run("--help").output


def json_of(*arguments):
    """Run a command with --json, and return the only object that it prints."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    return json.loads(line)


def test_json_of_info(own_engine):
    document = json.loads((own_engine.folder / "spec.json").read_text(encoding="utf-8"))
    assert json_of("info", own_engine.folder) == {
        **{name: document[name] for name in ("name", "sample_rate", "channels", "hop", "latent_width", "alignment")},
        **{name: document[name] for name in ("contexts", "source", "tools")},
        "folder": str(own_engine.folder),
        "graphs": {
            "fp32": {
                "bytes": sum(path.stat().st_size for path in own_engine.folder.glob("*.onnx*")),
                "snr_db": min(case["snr_db"] for case in document["verification"]["fp32"]),
            }
        },
        "tensorrt": [],
    }
    (own_engine.folder / "encoder.onnx").write_bytes(b"")
    assert "encoder.onnx: has 0 bytes" in refused("info", own_engine.folder, "--json")


def test_json_of_encode(engine_of, tmp_path):
    sf.write(tmp_path / "song.wav", noise((50_000, 2), level=0.1), 44100, "PCM_16")
    options = ("--model", engine_of("tiny-s").folder, "--backend", "onnxruntime")
    done = json_of("encode", tmp_path / "song.wav", tmp_path / "a.npy", *options)
    assert done == {"path": str(tmp_path / "a.npy"), **json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))}
    assert (done["samples"], done["latents"]) == (50_000, 13)
    assert "No such file" in refused("encode", tmp_path / "none.wav", tmp_path / "a.npy", *options, "--json")


def test_json_of_verify(engine_of):
    engine = engine_of("tiny-s").folder
    measured = json_of("verify", engine)
    assert measured["engine"] == str(engine)
    assert {case["direction"] for case in measured["graphs"]["fp32"]} == {"encoder", "decoder"}
    assert all(case["snr_db"] > 90 for case in measured["graphs"]["fp32"])


def test_json_has_no_infinity(capsys):
    """RFC 8259, section 6: Infinity and NaN are not permitted."""
    say_json({"snr_db": float("inf"), "nested": [float("nan"), 1.5]})
    assert capsys.readouterr().out == '{"snr_db": null, "nested": [null, 1.5]}\n'


# --- Options are checked before work -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "options", "extra"),
    [("tensorrt_rtx", ["--tensorrt", "rtx"], "rtx"), ("onnxruntime", [], "cpu")],
)
def test_export_checks_packages_before_it_begins(tmp_path, monkeypatch, package, options, extra):
    monkeypatch.setitem(sys.modules, package, None)
    out = tmp_path / "engines"
    line = refused("export", "tiny-s", "--weights", "random", "--out", out, *options)
    assert line == f"Error: {package} is not installed; run: {install_command(extra)}"
    assert not out.exists()


def test_install_commands_of_a_checkout_name_its_versions():
    constraints = Path(__file__).parents[1] / "constraints.txt"
    assert install_command("cpu", "report").endswith(f"pip install 'samekit[cpu,report]' -c {constraints}")


# --- make ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_writes_no_picture_into_engines_and_says_what_it_cleans():
    def make(*arguments):
        root = Path(__file__).parents[1]
        return subprocess.run(["make", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout

    assert "--plot build/same-s-latency.png" in make("-n", "bench")
    removed = make("-n", "clean").splitlines()[-1].split()[2:]
    assert "engines" not in removed
    assert re.search(r"make clean +.*except the engines", make("help"))
