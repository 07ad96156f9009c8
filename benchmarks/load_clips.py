"""The clips that `serve_load.py` sends, the library's answers to them, and the speed of the bare model."""

from __future__ import annotations

import io
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import soundfile as sf
from common import open_codec

from samekit import AutoencoderModel
from samekit.backends.cpu import available_cpus
from samekit.engine.spec import DECODER, ENCODER, Direction
from samekit_export.verify import snr_db

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import httpx

Task = Literal["encode", "decode"]
DIRECTIONS: dict[Task, Direction] = {"encode": ENCODER, "decode": DECODER}
CLIPS = 8
"""Different clips that are sent."""
LEAST_SNR_DB = 90
"""What an answer must reach that is not equal byte for byte."""


@dataclass(frozen=True)
class Clip:
    """The body of a request, and the library's answer to it."""

    body: bytes
    expected: bytes


def write_clips(engine: Path, precision: str, task: Task, seconds: float, folder: Path) -> None:
    """Write bodies of requests and the library's answers to a folder."""
    model = AutoencoderModel.from_pretrained(engine, "cpu", precision=precision)
    with model:
        for direction in DIRECTIONS.values():
            model.autoencoder.backend.use_packed_weights(direction)
        for number in range(CLIPS):
            chance = np.random.default_rng(number)
            audio = chance.standard_normal((round(seconds * model.sample_rate), model.spec.channels)) * 0.1
            wav, latents = folder / f"{number}.wav", folder / f"{number}.npy"
            sf.write(wav, audio.clip(-1, 1), model.sample_rate, "PCM_16")
            model.encode_file(wav, latents)
            if task == "decode":
                # The server gets the latents alone.
                latents.with_suffix(".json").unlink()
                model.decode_file(latents, wav)


def read_clips(task: Task, folder: Path) -> list[Clip]:
    """Return what `write_clips` wrote."""
    bodies, answers = (".wav", ".npy") if task == "encode" else (".npy", ".wav")
    return [
        Clip((folder / f"{number}{bodies}").read_bytes(), (folder / f"{number}{answers}").read_bytes())
        for number in range(CLIPS)
    ]


def bare_speed(engine: Path, precision: str, task: Task, clip_seconds: float, seconds: float) -> tuple[float, float]:
    """Encode arrays for some seconds; return seconds of audio per second, and per second of processor time."""
    direction = DIRECTIONS[task]
    codec = open_codec(engine, "onnxruntime", precision, available_cpus())
    codec.backend.use_packed_weights(direction)
    spec = codec.spec
    samples = round(clip_seconds * spec.sample_rate)
    shape = (1, spec.channels, samples) if task == "encode" else (1, spec.latent_width, spec.latents(samples))
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * np.float32(0.1)
    run = codec.encode_audio if task == "encode" else codec.decode_audio
    run(array)
    begin, cpu, count = time.perf_counter(), time.process_time(), 0
    while count == 0 or time.perf_counter() - begin < seconds:
        run(array)
        count += 1
    audio = count * clip_seconds
    return audio / (time.perf_counter() - begin), audio / (time.process_time() - cpu)


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a new process, whose memory and threads end with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def outcome_of(task: Task, answer: httpx.Response, expected: bytes) -> str:
    """Return how an answer compares with the library's."""
    if answer.status_code in (429, 503):
        try:
            announced = isinstance(answer.json()["error"], str)
        except (ValueError, KeyError, TypeError):
            announced = False
        return f"{answer.status_code}" if announced else f"{answer.status_code} without a line of error"
    if answer.status_code != 200:
        return f"status {answer.status_code}: {answer.text[:200]}"
    if answer.content == expected:
        return "equal"
    try:
        ours, theirs = (array_of(task, data) for data in (expected, answer.content))
    except (ValueError, EOFError, sf.LibsndfileError):
        return "wrong"
    return "close" if ours.shape == theirs.shape and snr_db(ours, theirs) >= LEAST_SNR_DB else "wrong"


def array_of(task: Task, data: bytes) -> np.ndarray:
    """Return the array in an answer."""
    file = io.BytesIO(data)
    array: np.ndarray = np.load(file, allow_pickle=False) if task == "encode" else sf.read(file, always_2d=True)[0]
    return array
