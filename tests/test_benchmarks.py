"""The benchmarks on tiny models: their output and their errors. The figures themselves are not checked."""

from __future__ import annotations

import importlib
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import click
import common
import latency
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import DIRECTIONS, needs_bf16, needs_openvino

from samekit.engine.spec import ENCODER, PRECISIONS

# Benchmarks that take an engine folder, with arguments for a short run.
OF_ENGINES = {
    "accuracy": ["--latents", "1,3", "--seeds", 1, "--plot", "accuracy.png"],
    "latency": ["--latents", 2, "--runs", 1, "--yardstick", "torch bf16", "--plot", "latency.png"],
    "limit": ["--latents", 2, "--plot", "limit.png"],
    "memory": ["--latents", "1,3", "--plot", "memory.png"],
    "opening": ["--runs", 1, "--plot", "opening.png"],
    "pre_encode": ["--clips", 2, "--seconds", 0.2, "--plot", "pre_encode.png"],
    "throughput": ["--windows", 12, "--latents", 24, "--runs", 1, "--plot", "throughput.png"],
}
OF_MODELS = {
    "naive_tiers": ["tiny-s", "--latents", 2],
    "int8_trade": [
        "same-tiny",
        "--latents",
        2,
        "--runs",
        1,
        "--variants",
        "every product int8",
        "--plot",
        "int8_trade.png",
    ],
    "fp32_ops": ["tiny-s", "--latents", 2, "--only", "exported", "--only", "none", "--plot", "fp32_ops.png"],
}


def run(name, *arguments):
    """Run a benchmark as from the command line."""
    return CliRunner().invoke(importlib.import_module(name).main, list(map(str, arguments)))


def results_of(done, name):
    """Return the results from the last line."""
    assert done.exit_code == 0, done.output
    *table, last = done.stdout.splitlines()
    assert table
    document = json.loads(last)
    assert document["benchmark"] == name
    assert document["machine"]["cores"] >= 1
    assert document["options"]
    if name in OF_ENGINES:
        assert document["engine"]["name"] == "tiny-s"
    return document["results"]


def assert_plots(arguments):
    """Check that every picture is a PNG file."""
    for option, plot in itertools.pairwise(arguments):
        if option == "--plot":
            assert Path(plot).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.fixture
def quick(monkeypatch):
    """Measure the limit of the machine with a small product."""
    limit = importlib.import_module("limit")
    monkeypatch.setattr(limit, "LARGE", ((64, 64, 64),))
    monkeypatch.setattr(limit, "RUNS", 2)
    # Padding to 3,072 latents would take a minute.
    monkeypatch.setattr(importlib.import_module("pre_encode"), "SAMPLE_SIZE", 8 * 4096)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", OF_ENGINES)
def test_table_and_json(engine_of, name):
    results = results_of(run(name, engine_of("tiny-s").folder, *OF_ENGINES[name]), name)
    assert results
    assert_plots(OF_ENGINES[name])


@pytest.mark.parametrize("name", OF_MODELS)
def test_table_and_json_of_a_model(name):
    assert results_of(run(name, *OF_MODELS[name]), name)
    assert_plots(OF_MODELS[name])


@needs_openvino
@needs_bf16
@pytest.mark.usefixtures("quick")
def test_limit_of_bfloat16(engine_of):
    results = results_of(run("limit", engine_of("tiny-s").folder, "--latents", 2, "--precision", "bf16"), "limit")
    assert all(results[direction]["of_limit"] > 0 for direction in DIRECTIONS)


def test_speed_of_the_pipeline_by_format_and_rate():
    arguments = [
        "--formats",
        "wav,mp3",
        "--rates",
        "44100,48000",
        "--clip-seconds",
        "1,3",
        "--clips",
        10,
        "--rounds",
        1,
    ]
    results = results_of(run("pipeline", *arguments, "--readers", 2), "pipeline")
    kinds = [(row["clip_seconds"], row["format"], row["rate"]) for row in results]
    assert kinds == list(itertools.product((1, 3), ("wav", "mp3"), (44_100, 48_000)))
    for row in results:
        assert row["audio_seconds_per_second"] > 0
        assert 0 < row["bare_cpu_ms_per_clip"] < row["cpu_ms_per_clip"]
        assert row["parent_ms_per_clip"] > 0
        assert row["share_of_bare_decoding"] > 0


def test_format_that_the_pipeline_does_not_measure():
    done = run("pipeline", "--formats", "wav,aac")
    assert done.exit_code == 2
    assert "'wav,aac' is no list of wav, flac, mp3" in done.stderr


@pytest.mark.parametrize("name", [*OF_ENGINES, "ray_overhead", "serve_load", "triton_load"])
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
    backend._run = lambda direction, array: original(direction, array) * np.float32(factor)
    eager, ours = latency.measure(codecs, ENCODER, latents=3, runs=1)
    assert eager["times_eager"] == 1
    assert (ours["times_eager"] is None) == refused
    assert ("refused" in latency.show(ours)) == refused


def test_batches_of_clips(engine_of):
    arguments = ["--device", "cpu", "--latents", "2", "--batches", "1,3", "--runs", 1]
    rows = results_of(run("latency", engine_of("tiny-s").folder, *arguments), "latency")
    assert [(row["direction"], row["batch"]) for row in rows[::2]] == list(itertools.product(DIRECTIONS, (1, 3)))
    for row in rows:
        assert row["per_latent_ms"] == pytest.approx(1e3 * row["seconds"]["median"] / (row["batch"] * row["latents"]))


def test_lengths_on_a_gpu_are_those_of_the_gpu_check():
    (option,) = (option for option in importlib.import_module("gpu_check").main.params if option.name == "latents")
    assert common.counts(None, None, option.default) == list(latency.LENGTHS["cuda"]) == [128, 256, 512, 1024, 4096]


def test_candidates_on_a_gpu(engine_of, monkeypatch, capsys):
    """Eager PyTorch and TensorRT; what cannot be opened is left out, with the reason."""

    def open_on_the_cpu(engine, backend, precision, threads, device):
        assert device == "cuda"
        return common.open_codec(engine, backend, precision, threads, "cpu" if backend == "torch" else device)

    monkeypatch.setattr(latency, "open_codec", open_on_the_cpu)
    codecs = latency.open_all(engine_of("tiny-s").folder, ["fp32", "torch fp16"], 1, ["torch bf16"], "cuda")
    assert list(codecs) == [latency.EAGER, "torch bf16", "torch fp16"]
    assert capsys.readouterr().out.startswith("tensorrt fp32 left out: ")


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize("gpu", [False, True])
def test_make_bench(tmp_path, gpu):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("make", "sh", "python3", "echo", "tr", "cut"):
        (tools / name).symlink_to(shutil.which(name))
    if gpu:
        (tools / "nvidia-smi").symlink_to(shutil.which("true"))
    root = Path(__file__).parents[1]
    done = subprocess.run(
        ["make", "-n", "bench"], cwd=root, env={"PATH": str(tools)}, capture_output=True, text=True, check=True
    )
    assert ("--tensorrt auto" in done.stdout, "--batches 1,8" in done.stdout) == (gpu, gpu)
    assert ("--tensorrt off" in done.stdout) == (not gpu)


def test_lists_of_numbers(engine_of):
    done = run("latency", engine_of("tiny-s").folder, "--latents", "2,x")
    assert done.exit_code == 2
    assert "'2,x' is no list of whole numbers from 1" in done.stderr


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("factor", "refused"), [(1, False), (1.01, True)])
def test_no_ratio_to_the_reference_where_latents_differ(engine_of, monkeypatch, factor, refused):
    pre_encode = importlib.import_module("pre_encode")
    measured = pre_encode.reference_method

    def changed(*arguments):
        seconds, latents = measured(*arguments)
        return seconds, [np.float32(factor) * clip for clip in latents]

    monkeypatch.setattr(pre_encode, "reference_method", changed)
    results = results_of(
        run("pre_encode", engine_of("tiny-s").folder, "--clips", 1, "--seconds", 0.2, "--threads", 1), "pre_encode"
    )
    assert (results["times_reference"] is None) == refused


def test_speeds_are_the_least_median_and_most(engine_of):
    arguments = ["--windows", 12, "--latents", 24, "--batches", 1, "--runs", 3]
    for row in results_of(run("throughput", engine_of("tiny-s").folder, *arguments), "throughput"):
        speed = row["audio_seconds_per_second"]
        assert speed["min"] <= speed["median"] <= speed["max"]


def test_every_candidate_has_a_floor():
    candidates = [latency.EAGER, *latency.YARDSTICKS, *(f"onnxruntime {of}" for of in PRECISIONS)]
    assert {name.split()[1] for name in candidates} <= set(latency.FLOORS)


def test_plots_are_refused_before_anything_is_measured(engine_of):
    done = run("latency", engine_of("tiny-s").folder, "--plot", "not there/latency.png")
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "no folder that can be written to" in done.stderr


def test_a_child_that_fails_ends_in_its_last_line():
    with pytest.raises(click.ClickException) as caught:
        common.child(sys.executable, "-c", "raise SystemExit('cause; cure')")
    assert str(caught.value) == "cause; cure"
