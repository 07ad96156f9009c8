"""`make gpu-check`: its limits, that it goes on where it stopped, and what it says about a machine."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import psutil
import pytest
from click.testing import CliRunner
from fake_tensorrt import WRONG, FakeGpu, FakeTensorRT, answers_of
from gpu_check import Step
from helpers import DIRECTIONS

from samekit.cli.main import main
from samekit.engine.fingerprint import TENSORRT
from samekit_export.checkpoint import load
from samekit_export.export import export


def script(name, code, limit=60):
    return Step(name, limit, (sys.executable, "-c", code))


LEFT_OUT = {"benchmark": "gpu_latency", "results": {"left_out": "there is no GPU; use another"}}


@pytest.fixture
def check(monkeypatch, tmp_path):
    """A function that runs given steps, and returns the outcome and the results of each step."""

    def run(*steps, **options):
        monkeypatch.setattr(gpu_check, "steps_of", lambda *_: list(steps))
        arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        done = CliRunner().invoke(gpu_check.main, ["--device", "cpu", "--out", str(tmp_path / "out"), *arguments])
        return done, json.loads((tmp_path / "out" / "gpu-check.json").read_text(encoding="utf-8"))["steps"]

    return run


def test_states(check):
    done, steps = check(
        script("good", "print('line'); print('{\"results\": [1]}')"),
        script("bad", "raise SystemExit('cause; cure')"),
        script("impossible", f"print({json.dumps(json.dumps(LEFT_OUT))})"),
    )
    assert done.exit_code == 1
    assert {name: (step["state"], step["said"]) for name, step in steps.items()} == {
        "good": ("done", "line"),
        "bad": ("failed", "cause; cure"),
        "impossible": ("left out", "there is no GPU; use another"),
    }
    assert steps["good"]["results"] == {"results": [1]}
    *rows, last = done.output.splitlines()
    assert [row.split("  ")[0] for row in rows] == ["done", "failed", "left out"]
    assert last.startswith("1 done, 1 failed, 1 left out, 0 not finished; see ")


def test_a_step_that_hangs_is_killed_with_its_children(check, tmp_path):
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    done, steps = check(script("hangs", code, limit=8), script("next", "print('reached')"))
    assert time.monotonic() - start < 60
    assert done.exit_code == 0, done.output
    assert (steps["hangs"]["state"], steps["hangs"]["said"]) == ("not finished", "took more than 8 s")
    assert steps["hangs"]["output"] == ["begun"]
    assert steps["next"]["state"] == "done"
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_it_goes_on_where_it_stopped(check, tmp_path):
    counter = tmp_path / "runs"
    counting = script("counted", f"open({str(counter)!r}, 'a').write('x')")
    late = script("late", "print('done')")
    done, steps = check(counting, late, minutes=1e-9)
    assert [step["said"] for step in steps.values()] == ["no time was left; run the same command again"] * 2
    assert done.output.splitlines()[-1].startswith("0 done, 0 failed, 0 left out, 2 not finished")
    for _ in range(2):
        done, steps = check(counting, late)
        assert {step["state"] for step in steps.values()} == {"done"}
    assert counter.read_text() == "x"
    assert done.output.count("finished in an earlier run") == 2
    # A step of another command is run again.
    check(script("counted", f"open({str(counter)!r}, 'a').write('y')"), late)
    assert counter.read_text() == "xy"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_can_be_stopped(tmp_path, number):
    """The results of finished steps stay, and the running step ends."""
    out, pid = tmp_path / "out", tmp_path / "pid"
    hang = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    program = f"""
import sys, gpu_check
from gpu_check import Step
scripts = {{"quick": "print('done')", "hangs": {hang!r}}}
gpu_check.steps_of = lambda *_: [Step(name, 600, (sys.executable, "-c", code)) for name, code in scripts.items()]
gpu_check.main(["--device", "cpu", "--out", {str(out)!r}])
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(gpu_check.__file__).parent)
    end = time.monotonic() + 120
    while not (pid.exists() and pid.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    child = int(pid.read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    steps = json.loads((out / "gpu-check.json").read_text(encoding="utf-8"))["steps"]
    assert {name: step["state"] for name, step in steps.items()} == {"quick": "done"}


@pytest.mark.parametrize("text", ["", "[]", '{"steps": 1}', "{"])
def test_results_that_are_damaged_are_replaced(check, tmp_path, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "gpu-check.json").write_text(text, encoding="utf-8")
    _, steps = check(script("good", "pass"))
    assert steps["good"]["state"] == "done"


def test_machine_without_a_gpu(check, monkeypatch):
    monkeypatch.setattr(gpu_check, "has_driver", lambda: False)
    done, steps = check(script("torch", "raise SystemExit(1)"), script("export tiny", "pass"), device="cuda")
    assert done.exit_code == 0
    assert (steps["torch"]["state"], steps["torch"]["said"]) == ("left out", "this machine has no NVIDIA driver")
    assert steps["export tiny"]["state"] == "done"


def test_steps_are_in_the_order_of_their_value(tmp_path):
    steps = gpu_check.steps_of(["same-s"], "random", "cuda", "128", tmp_path)
    names = [step.name for step in steps]
    first = [names.index(next(name for name in names if name.startswith(kind))) for kind in ORDER]
    assert first == sorted(first)
    assert len(set(names)) == len(names)
    assert all(0 < step.limit <= 300 for step in steps)


ORDER = ("tests", "torch fp32", "build and check TensorRT", "tensorrt fp32", "webgpu", "onnxruntime", "dataset")


def run(name, *arguments):
    done = CliRunner().invoke(importlib.import_module(name).main, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])["results"]


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_latency_on_the_cpu(engine_of, backend):
    folder = engine_of("tiny-s").folder
    arguments = ["--device", "cpu", "--latents", "2,4", "--batches", "1,2", "--runs", 1]
    rows = run("gpu_latency", folder, "--backend", backend, *arguments)
    assert [(row["direction"], row["batch"], row["latents"]) for row in rows] == [
        (direction, batch, latents) for direction in ("encoder", "decoder") for batch in (1, 2) for latents in (2, 4)
    ]
    assert all(row["snr_db"] >= 90 and row["median_ms"] >= row["least_ms"] > 0 for row in rows)


def test_latency_of_a_backend_that_cannot_be_used(engine_of):
    results = run("gpu_latency", engine_of("tiny-s").folder, "--backend", "tensorrt", "--device", "cpu")
    assert "; " in results["left_out"]


def test_latency_of_an_unknown_backend_is_an_error(engine_of):
    """Otherwise a step with a mistake would seem impossible on every machine."""
    arguments = [str(engine_of("tiny-s").folder), "--backend", "webgpu", "--device", "cpu"]
    done = CliRunner().invoke(importlib.import_module("gpu_latency").main, arguments)
    assert done.exit_code == 2
    assert "unknown backend 'webgpu'; choose one of" in done.stderr


@pytest.mark.webgpu
def test_webgpu_step(half_engine, tmp_path):
    """gpu-check runs the WebGPU step in separate processes, with the Vulkan driver that `make test-webgpu` finds."""
    out = tmp_path / "out"
    shutil.copytree(half_engine, out / "engines" / "tiny-s")
    arguments = ["--models", "tiny-s", "--device", "cpu", "--latents", "1", "--only", "webgpu", "--out", str(out)]
    done = CliRunner().invoke(gpu_check.main, arguments)
    assert done.exit_code == 0, done.output
    steps = json.loads((out / "gpu-check.json").read_text(encoding="utf-8"))["steps"]
    assert set(steps) == {"webgpu fp32 tiny-s", "webgpu fp16 tiny-s"}
    full, half = steps["webgpu fp32 tiny-s"], steps["webgpu fp16 tiny-s"]
    assert full["state"] == "done", full
    rows = full["results"]["results"]
    assert [(row["direction"], row["latents"]) for row in rows] == [(direction, 1) for direction in DIRECTIONS]
    assert all(row["snr_db"] >= 100 and row["median_ms"] > 0 for row in rows)
    assert half["state"] == "done" or (half["state"] == "left out" and "fp16 needs shader-f16" in half["said"])


def test_pipeline_on_the_cpu(engine_of):
    arguments = ["--device", "cpu", "--clips", 2, "--seconds", 0.2, "--readers", 1]
    results = run("gpu_pipeline", engine_of("tiny-s").folder, *arguments)
    assert results["backend"] == "onnxruntime"
    assert results["audio_seconds_per_second"] > 0


def test_on_the_fake_gpu(monkeypatch, tmp_path):
    """The commands of all steps for TensorRT, from the build to the figures, run in this process with the fake GPU."""
    out = tmp_path / "out"
    engine = export(load("tiny-s", "random"), out / "engines", ["fp32", "fp16"])
    module = FakeTensorRT(engine.spec, answers_of(engine))
    monkeypatch.setenv("SAMEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, TENSORRT, module)
    monkeypatch.setattr("samekit_export.to_tensorrt.Gpu", lambda _: FakeGpu(module))
    monkeypatch.setattr("samekit.tensorrt.opening.Gpu", lambda _: FakeGpu(module))
    monkeypatch.setattr("samekit.tensorrt.check.CASES", ((1, 1), (2, 3), (1, 257)))
    monkeypatch.setattr("samekit.tensorrt.tuning.WINDOWS", (16,))
    monkeypatch.setattr("samekit.tensorrt.tuning.BATCHES", (1, 2))
    monkeypatch.setattr(importlib.import_module("gpu_latency"), "SECONDS", 0.1)
    monkeypatch.setattr(gpu_check, "has_driver", lambda: True)
    commands = {"gpu_latency.py": "gpu_latency", "gpu_pipeline.py": "gpu_pipeline"}

    def in_this_process(step, seconds):
        _, script, *arguments = step.command
        command = main if script == "-m" else importlib.import_module(commands[Path(script).name]).main
        done = CliRunner().invoke(command, arguments[1:] if script == "-m" else arguments)
        return {"seconds": 0.0, **gpu_check.outcome(done.exit_code, done.output)}

    monkeypatch.setattr(gpu_check, "run", in_this_process)

    def check(only):
        arguments = ["--models", "tiny-s", "--latents", "2,3", "--out", str(out), "--only", only]
        done = CliRunner().invoke(gpu_check.main, arguments)
        return done, json.loads((out / "gpu-check.json").read_text(encoding="utf-8"))["steps"]

    for only in ("build", "tensorrt fp32", "tensorrt fp16", "tune fp32"):
        done, steps = check(only)
        assert done.exit_code == 0, done.output
    states = {name: step["state"] for name, step in steps.items()}
    assert set(states.values()) == {"done"}
    assert len(states) == 4
    for precision in ("fp32", "fp16"):
        rows = steps[f"tensorrt {precision} tiny-s"]["results"]["results"]
        assert {(row["direction"], row["batch"], row["latents"]) for row in rows} == {
            (direction, batch, latents) for direction in DIRECTIONS for batch in (1, 8) for latents in (2, 3)
        }
        assert all(row["snr_db"] >= 90 for row in rows)
    assert steps["tune fp32 tiny-s"]["results"]["gpu"] == "Fake GPU"
    # A wrong engine is a failure.
    module.wrong = WRONG[0]
    for record in out.glob("engines/tiny-s/tensorrt/*/check-*"):
        record.unlink()
    done, steps = check("tune fp16")
    assert done.exit_code == 1
    assert "wrong values on Fake GPU" in steps["tune fp16 tiny-s"]["said"]
