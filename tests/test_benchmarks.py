"""The benchmarks on models of test size: what they print, and what they refuse. Their figures mean nothing here."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import latency
import numpy as np
import pytest
from click.testing import CliRunner

from samekit.spec import ENCODER

# Those that take an engine folder, with arguments for a short run.
OF_ENGINES = {
    "latency": ["--latents", 2, "--runs", 1, "--yardstick", "torch bf16", "--plot", "latency.png"],
    "limit": ["--latents", 2],
    "memory": ["--latents", "1,3", "--plot", "memory.png"],
    "opening": ["--runs", 1],
    "pre_encode": ["--clips", 2, "--seconds", 0.2],
    "throughput": ["--windows", 12, "--latents", 24, "--runs", 1, "--plot", "throughput.png"],
}
OF_MODELS = {
    "int8_trade": ["same-tiny", "--latents", 2, "--runs", 1, "--variants", "every product int8"],
    "islands": ["tiny-s", "--latents", 2, "--only", "exported", "--only", "none"],
}


def run(name, *arguments):
    """A benchmark as it is run from the command line."""
    return CliRunner().invoke(importlib.import_module(name).main, list(map(str, arguments)))


def results_of(done, name):
    """What stands on its last line."""
    assert done.exit_code == 0, done.output
    *table, last = done.stdout.splitlines()
    assert table
    document = json.loads(last)
    assert document["benchmark"] == name
    assert document["machine"]["cores"] >= 1
    return document["results"]


@pytest.fixture
def quick(monkeypatch):
    """Measure the limit of the machine with a small product."""
    limit = importlib.import_module("limit")
    monkeypatch.setattr(limit, "LARGE", ((64, 64, 64),))
    monkeypatch.setattr(limit, "RUNS", 2)
    # Its shortest way costs a minute of padding to 3,072 latents.
    monkeypatch.setattr(importlib.import_module("pre_encode"), "SAMPLE_SIZE", 8 * 4096)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", OF_ENGINES)
def test_table_and_json(engine_of, name):
    results = results_of(run(name, engine_of("tiny-s").folder, *OF_ENGINES[name]), name)
    assert results
    for option, plot in zip(OF_ENGINES[name], OF_ENGINES[name][1:], strict=False):
        if option == "--plot":
            assert Path(plot).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("name", OF_MODELS)
def test_table_and_json_of_a_model(name):
    assert results_of(run(name, *OF_MODELS[name]), name)


@pytest.mark.parametrize("name", [*OF_ENGINES, "ray_overhead"])
@pytest.mark.parametrize("folder", ["not there", "empty"])
def test_what_is_no_engine_folder(tmp_path, name, folder):
    (tmp_path / "empty").mkdir()
    done = run(name, tmp_path / folder)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert "; " in line


@pytest.mark.parametrize("name", [name for name in OF_ENGINES if name != "pre_encode"])
def test_precision_that_was_not_exported(engine_of, name):
    done = run(name, engine_of("tiny-s").folder, "--precision", "int8")
    assert done.exit_code == 2
    assert "no int8 graph" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("factor", "refused"), [(1, False), (1.01, True)])
def test_no_ratio_where_outputs_differ(engine_of, factor, refused):
    codecs = latency.open_all(engine_of("tiny-s").folder, ["fp32"], 1, [])
    backend = codecs["onnxruntime fp32"].backend
    original = backend._run
    backend._run = lambda half, array: original(half, array) * np.float32(factor)
    eager, ours = latency.measure(codecs, ENCODER, latents=3, runs=1)
    assert eager["times_eager"] == 1
    assert (ours["times_eager"] is None) == refused
    assert ("refused" in latency.show(ours)) == refused


def test_lists_of_numbers(engine_of):
    done = run("latency", engine_of("tiny-s").folder, "--latents", "2,x")
    assert done.exit_code == 2
    assert "'2,x' is no list of whole numbers from 1" in done.stderr
