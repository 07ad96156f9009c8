"""Seeded mutations of valid files, and a child process that opens the mutated files.

Run as a program, this module reads lines of JSON, `[format, path]`, and opens each file through the public interface.
It answers each line with `accepted`, the name of a SamekitError, or a traceback. Its memory is limited, so that a small
file that requests gigabytes causes a MemoryError.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import resource
import select
import shutil
import struct
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np

# Bytes that the child may allocate after its imports.
MEMORY = 1 << 30
# Seconds that the child may take for one file, and to start.
FILE_TIMEOUT, START_TIMEOUT = 20, 120

# Samples per clip of the datasets.
SAMPLE_SIZE = 8000

ACCEPTED = "accepted"


# --- Mutating bytes -----------------------------------------------------------------------------------------

_NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**60, 2**63 - 1, 2**64 - 1]


def _position(random, data):
    """Return a random position; half of the time it is in the first 200 bytes, where headers are."""
    return random.randrange(min(len(data), 200) if random.random() < 0.5 else len(data))


def _flip_bits(random, data):
    for _ in range(random.choice((1, 1, 2, 8, 64))):
        data[_position(random, data)] ^= 1 << random.randrange(8)


def _put_number(random, data):
    size, order = random.choice((1, 2, 4, 8)), random.choice(("little", "big"))
    at = _position(random, data)
    data[at : at + size] = (random.choice(_NUMBERS) % 256**size).to_bytes(size, order)


def _truncate(random, data):
    del data[_position(random, data) :]


def _insert(random, data):
    at = _position(random, data)
    data[at:at] = random.randbytes(random.choice((1, 2, 4, 100)))


def _remove(random, data):
    at = _position(random, data)
    del data[at : at + random.choice((1, 2, 4, 100))]


def _repeat(random, data):
    at = _position(random, data)
    data[at:at] = data[at : at + random.choice((4, 100, 1000))] * random.choice((1, 1, 50))


def _swap(random, data):
    size = random.choice((1, 4, 64))
    one, other = (_position(random, data) for _ in range(2))
    data[one : one + size], data[other : other + size] = data[other : other + size], data[one : one + size]


def _overwrite(random, data):
    at, size = _position(random, data), random.choice((8, 100))
    data[at : at + size] = random.choice((bytes(size), b"\xff" * size, random.randbytes(size)))


_BYTE_MUTATORS = (_flip_bits, _put_number, _truncate, _insert, _remove, _repeat, _swap, _overwrite)


def mutated_bytes(random, valid):
    """Return a mutated copy of the contents of a file."""
    data = bytearray(valid)
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        if data:
            random.choice(_BYTE_MUTATORS)(random, data)
    return bytes(data)


# --- Mutating JSON ------------------------------------------------------------------------------------------


class _Raw(str):
    """Text that `_text` writes into JSON unquoted."""

    __slots__ = ()


_VALUES = [
    *(None, True, False, -1, 0, 1, 2, 3.5, 1e308, -0.0, 10**12, 2**63, 10**30, "", "fp32", "x" * 300, [], {}, [[]]),
    *(
        "../../etc/passwd",
        "/etc/passwd",
        "\x1b[2J\r\n",
        "\ud800",
        "\0",
        "1e9",
        "$(touch x)",
        [1, 2],
        {"a": {"b": None}},
    ),
    *(_Raw("NaN"), _Raw("Infinity"), _Raw("-Infinity"), _Raw("9" * 5000), _Raw("1e999"), _Raw("[" * 900 + "]" * 900)),
    *(_Raw("[" * 10**5 + "]" * 10**5), _Raw('{"a":' * 10**5), _Raw('{"a": 1, "a": 2}'), _Raw("-"), _Raw("")),
]


def _containers(document):
    """Yield every object and list of a document that is not empty."""
    if isinstance(document, (dict, list)) and document:
        yield document
        for value in document.values() if isinstance(document, dict) else document:
            yield from _containers(value)


def _mutate_json(random, document):
    """Change one value, key or list item in place."""
    container = random.choice(list(_containers(document)))
    keys = list(container) if isinstance(container, dict) else list(range(len(container)))
    key = random.choice(keys)
    kind = random.randrange(10)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[random.choice(["", "x", "\ud800", *map(str, keys)])] = container.pop(key)
    elif kind == 2 and isinstance(container, list):
        container.insert(key, copy.deepcopy(random.choice(_VALUES)))
    elif kind == 3:
        other = random.choice(list(_containers(document)))
        container[key] = json.loads(json.dumps(other))
    elif kind == 4 and isinstance(container[key], int):
        container[key] = random.choice(
            (container[key] + 1, -container[key], container[key] * 2**20, str(container[key]))
        )
    else:
        container[key] = copy.deepcopy(random.choice(_VALUES))


def _text(value):
    """Return a document as JSON, with values of `_Raw` as they are."""
    if isinstance(value, _Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_text(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    return json.dumps(value)


def mutated_json(random, valid):
    """Return a mutated copy of JSON text; one in five is mutated as bytes."""
    if random.random() < 0.2:
        return mutated_bytes(random, valid)
    document = json.loads(valid)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        if next(_containers(document), None) is not None:
            _mutate_json(random, document)
    return _text(document).encode("utf-8", "surrogatepass")


def mutated_lines(random, valid):
    """Return a mutated copy of a file with one JSON object per line."""
    lines = valid.splitlines(keepends=True)
    at = random.randrange(len(lines))
    lines[at] = mutated_json(random, lines[at]) + random.choice((b"\n", b"\n", b"\n", b""))
    if random.random() < 0.1:
        random.shuffle(lines)
    return b"".join(lines)


def mutated_safetensors(random, valid):
    """Return a mutated copy of a safetensors file; 70 % of the mutations change only the header."""
    if random.random() < 0.3:
        return mutated_bytes(random, valid)
    size = int.from_bytes(valid[:8], "little")
    header, values = mutated_json(random, valid[8 : 8 + size]), valid[8 + size :]
    length = len(header) if random.random() < 0.8 else random.choice(_NUMBERS)
    return struct.pack("<Q", length) + header + values


def mutated_npy(random, valid):
    """Return a mutated copy of a .npy file; 60 % get another header that resembles a valid one."""
    if random.random() < 0.4:
        return mutated_bytes(random, valid)
    width = random.choice(("4", "4", "0", "-1", "True", "10**9", "1e9", "9" * 30, "1000000000000", "(4,)", "'4'"))
    shape = random.choice((f"({width}, 5)", f"(5, {width})", f"(1, {width}, 5)", f"({width},)", "()", "4", "(" * 300))
    dtype = random.choice(
        ("'<f4'", "'<f4'", "'<f2'", "'>f8'", "'O'", "'<f16'", "[('a', '<f4')]", "'V0'", "'U9'", "'<c8'")
    )
    order = random.choice(("True", "False", "1", "None"))
    text = f"{{'descr': {dtype}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    major = random.choice((1, 1, 1, 2, 3, 255))
    length = len(text) if random.random() < 0.8 else random.choice(_NUMBERS)
    packed = struct.pack("<H" if major == 1 else "<I", length % (2**16 if major == 1 else 2**32))
    return b"\x93NUMPY" + bytes((major, 0)) + packed + text + valid[128:]


# --- Opening files in the child -----------------------------------------------------------------------------


class Opener:
    """Opens a file of each format through the public interface.

    Other files that the operation needs are copied from a folder of valid files.
    """

    def __init__(self, valid):
        from click.testing import CliRunner
        from helpers import FakeBackend

        from samekit import AutoencoderModel
        from samekit.cli.main import main

        self._valid = valid
        self._work = Path(os.environ["HOSTILE_WORK"])
        self._model = AutoencoderModel(FakeBackend())
        self._command, self._runner = main, CliRunner()

    def _run(self, *arguments):
        """Run a command, raise its error, and check that its output has no control characters."""
        result = self._runner.invoke(self._command, [*map(str, arguments)], standalone_mode=False)
        for character in result.output:
            assert character.isprintable() or character in "\n\r", f"{character!r} reaches the terminal"
        if result.exception:
            # The command raises a ClickException while it handles the error.
            raise result.exception.__context__ or result.exception

    def _fresh(self, name):
        folder = self._work / "fresh"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._valid / name, folder)
        return folder

    def audio(self, path):
        """Read audio by pre-encode and by encode."""
        from samekit.dataset.options import PreEncodeOptions
        from samekit.dataset.run import pre_encode

        data = self._work / "data"
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir()
        clip = shutil.copyfile(path, data / f"clip{path.suffix}")
        clip.with_suffix(".txt").write_text("caption")
        shutil.rmtree(self._work / "out", ignore_errors=True)
        report = pre_encode(
            self._model, data, self._work / "out", PreEncodeOptions(crop="random", sample_size=100, batch_size=2)
        )
        assert sum(report.statuses.values()) == 1
        self._model.encode_file(path, self._work / "latents.npy")

    def caption(self, path):
        """Read the caption of a clip by pre-encode."""
        from samekit.dataset.options import PreEncodeOptions
        from samekit.dataset.run import pre_encode

        data = self._fresh("clip")
        shutil.copyfile(path, data / "clip.txt")
        shutil.rmtree(self._work / "out", ignore_errors=True)
        pre_encode(self._model, data, self._work / "out", PreEncodeOptions(sample_size=SAMPLE_SIZE))

    def npy(self, path):
        """Read latents by decode, and as `silence.npy` of a dataset."""
        from samekit.dataset.check import verify
        from samekit.dataset.options import PreEncodeOptions
        from samekit.dataset.run import pre_encode

        out = self._fresh("dataset")
        shutil.copyfile(path, out / "silence.npy")
        verify(out)
        pre_encode(self._model, self._valid / "clip", out, PreEncodeOptions(sample_size=SAMPLE_SIZE))
        self._model.decode_file(path, self._work / "audio.wav")

    def latents_json(self, path):
        """Read the metadata of latents in a dataset and by decode."""
        from samekit.dataset.check import verify

        out = self._fresh("dataset")
        shutil.copyfile(path, out / "000000000000.json")
        verify(out)
        folder = self._fresh("latents")
        shutil.copyfile(path, folder / "latents.json")
        self._model.decode_file(folder / "latents.npy", self._work / "audio.wav")

    def manifest(self, path):
        """Verify a dataset with this manifest, then resume it."""
        from samekit.dataset.check import verify
        from samekit.dataset.options import PreEncodeOptions
        from samekit.dataset.run import pre_encode
        from samekit.errors import SamekitError

        out = self._fresh("dataset")
        shutil.copyfile(path, out / ".samekit" / "manifest-000001.jsonl")
        with contextlib.suppress(SamekitError):
            verify(out)
        pre_encode(self._model, self._valid / "clip", out, PreEncodeOptions(sample_size=SAMPLE_SIZE))

    def spec(self, path):
        """Show, clean and run an engine folder with this `spec.json`."""
        from samekit import AutoencoderModel

        folder = self._fresh("engine")
        shutil.copyfile(path, folder / "spec.json")
        self._run("info", folder)
        self._run("clean", folder)
        with AutoencoderModel.from_pretrained(folder, backend="onnxruntime", threads=1) as model:
            model.decode(np.zeros((1, model.latent_dim, 2), np.float32))

    def onnx(self, path):
        """Open and run a graph; `spec.json` contains its actual size."""
        from samekit import AutoencoderModel

        folder = self._fresh("engine")
        shutil.copyfile(path, folder / "decoder.onnx")
        document = json.loads((folder / "spec.json").read_text())
        document["graphs"]["fp32"]["decoder"]["sizes"]["decoder.onnx"] = path.stat().st_size
        (folder / "spec.json").write_text(json.dumps(document))
        with AutoencoderModel.from_pretrained(folder, backend="onnxruntime", threads=1) as model:
            model.decode(model.encode(np.zeros((2, 9), np.float32), model.sample_rate))

    def build(self, path):
        """Read the description of a TensorRT build."""
        from samekit.engine.builds import build_folders, choose_build, is_whole
        from samekit.engine.folder import Engine

        folder = self._fresh("engine")
        (build,) = build_folders(Engine.load(folder))
        shutil.copyfile(path, build / "fingerprint.json")
        is_whole(build)
        self._run("info", folder)
        try:
            chosen = choose_build(Engine.load(folder), "fp32", (8, 9), {"tensorrt_rtx": "1.7.1.116"})
            chosen.read("encoder")
        finally:
            self._run("clean", folder)

    def config(self, path):
        """Load a checkpoint with this configuration."""
        folder = self._fresh("checkpoint")
        shutil.copyfile(path, folder / "model_config.json")
        self._checkpoint(folder)

    def diffusers_config(self, path):
        """Load a checkpoint in the format of Diffusers with this configuration."""
        folder = self._fresh("diffusers")
        shutil.copyfile(path, folder / "config.json")
        self._checkpoint(folder)

    def safetensors(self, path):
        """Load a checkpoint with these tensors."""
        folder = self._fresh("checkpoint")
        shutil.copyfile(path, folder / "model.safetensors")
        self._checkpoint(folder)

    def _checkpoint(self, folder):
        from samekit_export.checkpoint import load
        from samekit_export.model_spec import spec_of

        spec_of(load(str(folder))).to_json()


def _serve():
    """Open the files that the lines of standard input name, and write an answer for each."""
    import onnxruntime
    import torch

    from samekit.errors import SamekitError

    onnxruntime.set_default_logger_severity(4)
    torch.set_num_threads(1)
    opener = Opener(Path(os.environ["HOSTILE_VALID"]))
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        kind, path = json.loads(line)
        answer = ACCEPTED
        try:
            getattr(opener, kind)(Path(path))
        except SamekitError as error:
            answer = type(error).__name__
            if "\n" in str(error):
                answer = f"several lines: {error}"
        except BaseException:  # noqa: BLE001 the parent reports any other exception
            answer = traceback.format_exc()
        print(json.dumps(answer), file=answers, flush=True)


# --- Communicating with the child ---------------------------------------------------------------------------


class Child:
    """Process that opens files. It is started again after it died or hung."""

    def __init__(self, valid, work):
        self._environment = os.environ | {"HOSTILE_VALID": str(valid), "HOSTILE_WORK": str(work)}
        self._environment |= {"PYTHONWARNINGS": "error", "OMP_NUM_THREADS": "1"}
        self._log = work / "stderr.txt"
        self._process = None

    def open(self, kind, path):
        """Open a file in the child; return its answer, or how the child died or hung."""
        if self._process is None:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, __file__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=self._environment,
                )
            assert self._answer(START_TIMEOUT) == "ready", self._log.read_text(errors="replace")
        self._process.stdin.write(json.dumps([kind, str(path)]).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer(FILE_TIMEOUT)

    def _answer(self, seconds):
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        line = self._process.stdout.readline() if ready else b""
        if line:
            return json.loads(line)
        state = "hung" if not ready else f"died with {self._process.wait()}"
        self.close()
        return f"{state}: {self._log.read_text(errors='replace')[-2000:]}"

    def close(self):
        """Kill the process, if it runs."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None


if __name__ == "__main__":
    with contextlib.redirect_stdout(io.StringIO()):
        _serve()
