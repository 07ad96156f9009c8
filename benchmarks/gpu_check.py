"""Test and measure samekit on this machine's GPU: accuracy, latency, memory and datasets. `make gpu-check` runs it.

It takes at most 25 minutes, and each step has a time limit. After every step the results are in one JSON file. A
second run continues: it repeats only steps that did not finish. A step that this machine cannot do says why.

    python benchmarks/gpu_check.py --models same-s,same-l
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
from common import GPU_LATENTS, listed, question

from samekit.backends.base import has_driver
from samekit.doctor import examine
from samekit.engine.spec import GPU_PRECISIONS
from samekit.files.atomic import atomic_path

HERE: Final = Path(__file__).parent
RESULTS: Final = "gpu-check.json"
DONE, FAILED, LEFT_OUT, STOPPED = "done", "failed", "left out", "not finished"


@dataclass(frozen=True)
class Step:
    """One command, and how many seconds it may take."""

    name: str
    limit: float
    command: tuple[str, ...]


def steps_of(models: list[str], weights: str, device: str, latents: str, out: Path) -> list[Step]:
    """Return the steps, the most important ones first."""
    python, engines = sys.executable, out / "engines"
    samekit = (python, "-m", "samekit")

    def latency(model: str, backend: str, precision: str, *options: str, on: str = device) -> tuple[str, ...]:
        script = (python, str(HERE / "gpu_latency.py"), str(engines / model), "--backend", backend)
        shapes = ("--precision", precision, "--device", on, "--latents", latents, *options)
        # A trial is slow, and its times do not matter.
        return (*script, *shapes, *(("--runs", "1") if device == "cpu" else ()))

    steps = [Step("tests", 240, (python, "-m", "pytest", "-q", "-m", "gpu", str(HERE.parent / "tests")))]
    for model in models:
        export = (*samekit, "export", model, "--weights", weights, "--precision", ",".join(GPU_PRECISIONS))
        build = (*export, "--out", str(engines), "--tensorrt")
        steps += [Step(f"export {model}", 240, (*build, "off"))]
        steps += [Step(f"torch {p} {model}", 90, latency(model, "torch", p)) for p in GPU_PRECISIONS]
        steps += [Step(f"build and check TensorRT engines {model}", 300, (*build, "auto"))]
        for precision in GPU_PRECISIONS:
            tune = (*samekit, "tune", str(engines / model), "--precision", precision, "--json")
            steps += [
                Step(f"tensorrt {precision} {model}", 90, latency(model, "tensorrt", precision, "--batches", "1,8")),
                Step(f"tune {precision} {model}", 90, tune),
                Step(f"webgpu {precision} {model}", 90, latency(model, "onnxruntime", precision, on="webgpu")),
            ]
            steps += [
                Step(
                    f"onnxruntime {precision} {model} windows of {window}",
                    90,
                    latency(model, "onnxruntime", precision, "--window", str(window)),
                )
                for window in (128, 256)
            ]
    for readers in (1, 4, 16):
        pipeline = (python, str(HERE / "gpu_pipeline.py"), str(engines / models[0]), "--device", device)
        steps += [Step(f"dataset, {readers} readers", 60, (*pipeline, "--readers", str(readers)))]
    return steps


def run(step: Step, seconds: float) -> dict[str, Any]:
    """Run a step for at most so many seconds; return its state, the reason if it failed, and its output."""
    start = time.monotonic()
    process = subprocess.Popen(
        step.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        lines = _kill(process).strip().splitlines()
        found = {"state": STOPPED, "said": f"took more than {seconds:.0f} s", "results": None, "output": lines[-60:]}
    except BaseException:
        _kill(process)
        raise
    else:
        found = outcome(process.returncode, output)
    return {"seconds": round(time.monotonic() - start, 1), **found}


def outcome(code: int, output: str) -> dict[str, Any]:
    """Return the state of a step that has ended, the reason if it was not done, and the JSON of its last line."""
    lines = output.strip().splitlines()
    state, said, results = DONE, lines[-1] if lines else "", None
    with suppress(ValueError, IndexError):
        results, said = json.loads(lines[-1]), lines[-2] if len(lines) > 1 else ""
    if code:
        state, said = FAILED, said or f"exit code {code}"
    elif isinstance(results, dict) and isinstance(results.get("results"), dict) and "left_out" in results["results"]:
        state, said = LEFT_OUT, results["results"]["left_out"]
    return {"state": state, "said": said, "results": results, "output": lines[-60:]}


def _kill(process: subprocess.Popen[str]) -> str:
    """Kill a step with the processes that it started; return what it printed."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0]


def why_impossible(step: Step, device: str) -> str | None:
    """Return why no step that computes can be done here."""
    computes = not step.name.startswith("export")
    return "this machine has no NVIDIA driver" if computes and device == "cuda" and not has_driver() else None


def load(path: Path) -> dict[str, Any]:
    """Return the results of earlier runs."""
    with suppress(OSError, ValueError):
        document = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(document, dict) and isinstance(document.get("steps"), dict):
            return document
    return {"steps": {}}


def save(path: Path, document: dict[str, Any]) -> None:
    """Replace the file of results."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def show(name: str, result: dict[str, Any]) -> str:
    """Return one line of the table."""
    return f"{result['state']:13}{result['seconds']:>7.1f} s  {name:50} {result['said'][:160]}"


@question
@click.option("--models", default="same-s,same-l", show_default=True, help="By commas.")
@click.option("--weights", default="random", show_default=True, help="As of samekit export; hub needs a network.")
@click.option("--device", default="cuda", show_default=True, type=click.Choice(["cuda", "cpu"]), help="cpu: a trial.")
@click.option("--latents", default=listed(GPU_LATENTS), show_default=True, help="Lengths to measure, by commas.")
@click.option("--minutes", default=25.0, show_default=True, help="Longest time of this run.")
@click.option("--only", help="Run only steps whose names contain this.")
@click.option("--out", default="build/gpu-check", show_default=True, type=click.Path(path_type=Path))
def main(models: str, weights: str, device: str, latents: str, minutes: float, only: str | None, out: Path) -> None:
    """Run the steps, print a table, and write gpu-check.json into the folder OUT."""
    end = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    path = out / RESULTS
    document = load(path)
    document |= {"machine": dict(examine()), "command": sys.argv[1:]}
    steps = [
        step for step in steps_of(models.split(","), weights, device, latents, out) if not only or only in step.name
    ]
    for step in steps:
        earlier = document["steps"].get(step.name)
        if earlier and earlier["state"] == DONE and earlier["step"] == json.loads(json.dumps(dataclasses.asdict(step))):
            print(show(step.name, earlier | {"said": "finished in an earlier run"}), flush=True)
            continue
        left = end - time.monotonic()
        empty: dict[str, Any] = {"seconds": 0.0, "results": None, "output": []}
        if reason := why_impossible(step, device):
            result = {"state": LEFT_OUT, "said": reason, **empty}
        elif left <= 0:
            result = {"state": STOPPED, "said": "no time was left; run the same command again", **empty}
        else:
            result = run(step, min(step.limit, left))
        document["steps"][step.name] = {"step": dataclasses.asdict(step), **result}
        save(path, document)
        print(show(step.name, result), flush=True)
    states = [document["steps"][step.name]["state"] for step in steps]
    print(", ".join(f"{states.count(state)} {state}" for state in (DONE, FAILED, LEFT_OUT, STOPPED)) + f"; see {path}")
    if FAILED in states:
        sys.exit(1)


if __name__ == "__main__":
    main()
