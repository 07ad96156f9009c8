"""Any bytes in place of a file: an error with a name or a result, never a traceback, a crash, a hang, or gigabytes."""

from __future__ import annotations

import ast
import json
import pickle
import random
import re
import shutil
import struct
import zlib
from collections import Counter
from pathlib import Path

import hostile
import mangle
import numpy as np
import pytest
import soundfile as sf
from click.testing import CliRunner
from helpers import DIRECTIONS, RATE, SUMMARY, FakeBackend, edit, noise, variant
from onnx import TensorProto, helper
from small import SMALL, write_engine

from samekit import AutoencoderModel, errors
from samekit.audio import AudioReader
from samekit.cli.main import main
from samekit.dataset.check import verify
from samekit.dataset.options import PreEncodeOptions
from samekit.dataset.run import pre_encode
from samekit.files.latents import LatentsWriter
from samekit_export.checkpoint import save_folder
from samekit_export.diffusers import CLASS_NAME
from samekit_export.random_weights import published_config

# suffix -> format and subtype of soundfile.
_AUDIO = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
    ".aiff": ("AIFF", "PCM_24"),
    ".rf64.wav": ("RF64", "FLOAT"),
    ".w64.wav": ("W64", "PCM_32"),
    ".caf.wav": ("CAF", "ALAC_16"),
    ".au.wav": ("AU", "ULAW"),
    ".adpcm.wav": ("WAV", "MS_ADPCM"),
}


# --- Valid files --------------------------------------------------------------------------------------------


def diffusers_document():
    """A configuration of the other format."""
    return {
        "_class_name": CLASS_NAME,
        "audio_channels": 2,
        "patch_size": 8,
        "sampling_rate": RATE,
        "latent_dim": 4,
        "use_differential_attention": True,
        "dim_heads": 64,
        "ff_mult": 1,
        "sliding_window": 1,
        **{
            f"{direction}_{name}": value
            for direction in DIRECTIONS
            for name, value in {
                "channels": 64,
                "c_mults": [1],
                "strides": [2],
                "transformer_depths": [2],
                "sinusoidal_blocks": [0],
            }.items()
        },
    }


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """A folder of valid files, as `hostile.Opener` wants it."""
    folder = tmp_path_factory.mktemp("valid")
    model = AutoencoderModel(FakeBackend())
    (folder / "audio").mkdir()
    for suffix, (container, subtype) in _AUDIO.items():
        rate = 48_000 if subtype == "OPUS" else RATE
        sf.write(folder / "audio" / f"song{suffix}", noise((3000, 2), level=0.1), rate, subtype, format=container)
    (folder / "clip").mkdir()
    shutil.copyfile(folder / "audio" / "song.wav", folder / "clip" / "clip.wav")
    (folder / "clip" / "clip.txt").write_text("a caption, größer", encoding="utf-8")
    pre_encode(model, folder / "clip", folder / "dataset", PreEncodeOptions(sample_size=hostile.SAMPLE_SIZE))
    (folder / "latents").mkdir()
    with LatentsWriter(folder / "latents" / "latents.npy", 4) as writer:
        writer.write(noise((4, 5)))
        writer.metadata = {"model": "fake", "model_sha256": "0", "samples": 39, "latents": 5, "source": "a.wav"}
    write_engine(folder / "engine")
    checkpoint = variant("tiny-s", SMALL)
    document = edit(published_config("tiny-s"), {f"model.{path}": value for path, value in SMALL.items()})
    save_folder(document, checkpoint.tensors, folder / "checkpoint")
    (folder / "diffusers").mkdir()
    (folder / "diffusers" / "config.json").write_text(json.dumps(diffusers_document()))
    (folder / "diffusers" / "diffusion_pytorch_model.safetensors").write_bytes(
        (folder / "checkpoint" / "model.safetensors").read_bytes()
    )
    return folder


# format -> valid file, how it is damaged, part of all inputs.
FORMATS = {
    **{f"audio {suffix}": (f"audio/song{suffix}", hostile.mutated_bytes, 2) for suffix in _AUDIO},
    "caption": ("clip/clip.txt", hostile.mutated_bytes, 1),
    "npy": ("latents/latents.npy", hostile.mutated_npy, 3),
    "latents_json": ("dataset/000000000000.json", hostile.mutated_json, 3),
    "manifest": ("dataset/.samekit/manifest-000001.jsonl", hostile.mutated_lines, 4),
    "spec": ("engine/spec.json", hostile.mutated_json, 4),
    "onnx": ("engine/decoder.onnx", hostile.mutated_bytes, 4),
    "build": (None, hostile.mutated_json, 4),
    "config": ("checkpoint/model_config.json", hostile.mutated_json, 4),
    "diffusers_config": ("diffusers/config.json", hostile.mutated_json, 4),
    "safetensors": ("checkpoint/model.safetensors", hostile.mutated_safetensors, 4),
}


@pytest.fixture(scope="module")
def child(valid, tmp_path_factory):
    """The process that opens files."""
    process = hostile.Child(valid, tmp_path_factory.mktemp("work"))
    yield process
    process.close()


def valid_file(valid, name):
    """The path of a format's valid file."""
    if name == "build":
        (path,) = (valid / "engine" / "tensorrt").glob("*/fingerprint.json")
        return path
    return valid / FORMATS[name][0]


@pytest.mark.parametrize("name", FORMATS)
def test_valid_files_are_accepted(child, valid, name):
    """Otherwise damage would prove nothing."""
    expected = hostile.ACCEPTED if name != "diffusers_config" else "CheckpointError"
    assert child.open(name.split()[0], valid_file(valid, name)) == expected


TOLD = []


@pytest.fixture(scope="module", autouse=True)
def _summary(request):
    """The counts of all formats, shown by `-s`, and in the terminal's summary of the whole run."""
    yield
    if TOLD:
        files, accepted, named, wrong = (sum(column) for column in list(zip(*TOLD, strict=True))[1:])
        line = f"{files} damaged files: {accepted} accepted, {named} named errors, {wrong} anything else"
        request.config.stash[SUMMARY].append(line)


def attack(child, valid, folder, name, count):
    """Open so many damaged files of a format; what came of them, and what should not have."""
    path, mutate = valid_file(valid, name), FORMATS[name][1]
    contents = path.read_bytes()
    numbers = random.Random(zlib.crc32(name.encode()))
    outcomes, wrong = Counter(), []
    for index in range(count):
        hostile_file = folder / f"{name.split()[0]}-{index}{path.suffix}"
        hostile_file.write_bytes(mutate(numbers, contents))
        outcome = child.open(name.split()[0], hostile_file)
        if outcome in NAMED or outcome == hostile.ACCEPTED:
            outcomes[outcome] += 1
            hostile_file.unlink()
        else:
            wrong.append(f"{hostile_file}: {outcome}")
    return outcomes, wrong


NAMED = {name for name, value in vars(errors).items() if isinstance(value, type)}


def check(child, valid, folder, name, count, record, inputs):
    """No file may do anything but be accepted or be refused by name; the counts go to the report (`-rA` shows them)."""
    outcomes, wrong = attack(child, valid, folder, name, count)
    accepted = outcomes.pop(hostile.ACCEPTED, 0)
    record("files", count)
    inputs["damaged files"] += count
    named = ", ".join(f"{number} {error}" for error, number in outcomes.most_common())
    record("outcomes", f"{accepted} accepted, {named or 'none refused'}")
    TOLD.append((name, count, accepted, count - accepted - len(wrong), len(wrong)))
    assert not wrong, "\n".join(wrong[:3])


@pytest.mark.parametrize("name", FORMATS)
def test_some_damaged_files(child, valid, tmp_path, name, record_property, inputs):
    check(child, valid, tmp_path, name, 8 * FORMATS[name][2], record_property, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_ten_thousand_damaged_files(child, valid, tmp_path, name, record_property, inputs):
    check(child, valid, tmp_path, name, 200 * FORMATS[name][2], record_property, inputs)


# --- Files that were made to harm ------------------------------------------------------------------------------


def wav_header(channels=2, rate=RATE, bits=16, size=100, code=1):
    """A WAV file of 100 bytes of samples that says what it likes."""
    frame = channels * bits // 8
    form = struct.pack("<HHIIHH", code, channels, rate % 2**32, rate * frame % 2**32, frame % 2**16, bits)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", size) + bytes(100)
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def npy_header(shape, dtype="<f4", rest=b""):
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + rest


def with_external_data(location, **fields):
    """The decoder's graph, whose weights are said to lie in another file."""
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Identity", ["w"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 4, "t"])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, 16])],
            [TensorProto(name="w", data_type=1, dims=[1, 2, 16], data_location=TensorProto.EXTERNAL)],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    for key, value in {"location": location, **fields}.items():
        model.graph.initializer[0].external_data.add(key=key, value=str(value))
    return model.SerializeToString()


def safetensors_of(header, length=None, rest=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + rest


DEEP = b"[" * 10**5 + b"]" * 10**5
TENSOR = {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2**62]}
HARMFUL = {
    "a rate of 4 GHz": ("audio", ".wav", wav_header(rate=2**32 - 1)),
    "a rate of nothing": ("audio", ".wav", wav_header(rate=0)),
    "65,535 channels": ("audio", ".wav", wav_header(channels=65_535)),
    "1,024 channels": ("audio", ".wav", wav_header(channels=1024, bits=8)),
    "no channels": ("audio", ".wav", wav_header(channels=0)),
    # Larger ones stand for an unknown length, as they do in files that were written to a pipe.
    "1 GiB of samples": ("audio", ".wav", wav_header(size=2**30)),
    "samples of no bits": ("audio", ".wav", wav_header(bits=0)),
    "an unknown code": ("audio", ".wav", wav_header(code=0x1234)),
    "chunks without end": ("audio", ".wav", b"RIFF\xff\xff\xff\xffWAVE" + bytes(10**6)),
    "an Ogg page of nothing": ("audio", ".ogg", b"OggS" + bytes(23) + b"\xff" * 300),
    "a FLAC of zeros": ("audio", ".flac", b"fLaC" + bytes(10_000)),
    "a FLAC of empty blocks": ("audio", ".flac", b"fLaC" + bytes(10**7)),
    "a WAV of empty chunks": ("audio", ".wav", b"RIFF\xff\xff\xff\x7fWAVE" + (b"junk" + bytes(4)) * 10**6),
    "an AIFF of empty chunks": ("audio", ".aiff", b"FORM\x7f\xff\xff\xffAIFF" + (b"ANNO" + bytes(4)) * 10**6),
    "a CAF chunk of 2^64 bytes": ("audio", ".caf", b"caff\0\1\0\0desc" + b"\xff" * 8 + bytes(100)),
    "empty ID3 tags": ("audio", ".mp3", (b"ID3\4" + bytes(6)) * 10**5),
    "empty tags at the end": ("audio", ".mp3", b"\xff\xfb\x90\x00" + bytes(413) + (b"3DI\4" + bytes(6)) * 10**5),
    "MPEG headers without frames": ("audio", ".mp3", b"ID3\4" + bytes(6) + b"\xff\xfb\x92\x00\0" * 10**5),
    "Ogg pages without packets": (
        "audio",
        ".ogg",
        b"".join(
            mangle.page(b"OggS\0\2" + bytes(8) + bytes((n % 256, n >> 8, 0, 0)) + bytes(9)) for n in range(50_000)
        ),
    ),
    "an ID3 tag of 256 MiB": ("audio", ".mp3", b"ID3\x04\x00\x00\x7f\x7f\x7f\x7f" + b"\xff\xfb\x90\x00" * 100),
    "raw samples": ("audio", ".raw", bytes(1000)),
    "10^12 latents": ("npy", ".npy", npy_header("(4, 1000000000000)", rest=bytes(1000))),
    "10^30 latents": ("npy", ".npy", npy_header(f"(4, {10**30})")),
    "65 dimensions": ("npy", ".npy", npy_header("(" + "1," * 65 + ")", rest=bytes(4))),
    "a shape of products": ("npy", ".npy", npy_header("(9**9**9, 1)")),
    "pickled objects": ("npy", ".npy", npy_header("(4, 5)", "|O", pickle.dumps([1]))),
    "a pickle": ("npy", ".npy", pickle.dumps({"a": 1})),
    "an archive": ("npy", ".npy", b"PK\x03\x04" + bytes(100)),
    "deep brackets in a header": ("npy", ".npy", npy_header("(" * 4000 + ")" * 4000)),
    "deep JSON beside latents": ("latents_json", ".json", DEEP),
    "a huge number beside latents": ("latents_json", ".json", b'{"samples": ' + b"9" * 10**5 + b"}"),
    "a deep spec": ("spec", ".json", DEEP),
    "a deep configuration": ("config", ".json", DEEP),
    "a huge number in a configuration": ("config", ".json", b'{"sample_rate": ' + b"9" * 5000 + b"}"),
    "a deep diffusers configuration": ("diffusers_config", ".json", DEEP),
    "a deep fingerprint": ("build", ".json", DEEP),
    "a deep manifest": ("manifest", ".jsonl", DEEP + b"\n"),
    "a spec that is no text": ("spec", ".json", b"\xff\xfe\x00"),
    "a safetensors header of 2^60 bytes": ("safetensors", ".safetensors", safetensors_of({}, 2**60)),
    "a safetensors header of 2^64 - 1 bytes": ("safetensors", ".safetensors", safetensors_of({}, 2**64 - 1)),
    "tensors of 2^62 values": ("safetensors", ".safetensors", safetensors_of({"a": TENSOR})),
    "deep JSON in safetensors": ("safetensors", ".safetensors", safetensors_of(DEEP)),
    "a PyTorch file": ("safetensors", ".safetensors", b"PK\x03\x04" + pickle.dumps({})),
    "weights of a parent folder": ("onnx", ".onnx", with_external_data("../latents/latents.npy")),
    "weights of /etc/passwd": ("onnx", ".onnx", with_external_data("/etc/passwd")),
    "weights of /dev/zero": ("onnx", ".onnx", with_external_data("/dev/zero")),
    "weights of a folder": ("onnx", ".onnx", with_external_data(".")),
    "weights of nothing": ("onnx", ".onnx", with_external_data("")),
    "weights beyond the end": ("onnx", ".onnx", with_external_data("encoder.onnx.data", offset=2**60, length=128)),
    "weights before the beginning": ("onnx", ".onnx", with_external_data("encoder.onnx.data", offset=-64, length=128)),
    "2^60 bytes of weights": ("onnx", ".onnx", with_external_data("encoder.onnx.data", offset=0, length=2**60)),
    "an empty graph": ("onnx", ".onnx", b""),
    "a pickle for a graph": ("onnx", ".onnx", pickle.dumps({})),
}


@pytest.mark.parametrize("harm", HARMFUL)
def test_harmful_file_is_refused(child, tmp_path, harm, inputs):
    kind, suffix, contents = HARMFUL[harm]
    path = tmp_path / f"harmful{suffix}"
    path.write_bytes(contents)
    outcome = child.open(kind, path)
    inputs["files made to harm"] += 1
    assert outcome in NAMED, outcome


def spec_document(valid, changes):
    return json.dumps(edit(json.loads((valid / "engine" / "spec.json").read_text()), changes)).encode()


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": 10_000_000, "hop": 10_000_000},
        {"channels": 64, "hop": 2**20},
        {"hop": 2**20 + 1},
        {"latent_width": 10**7},
        {"contexts.encoder": 10**7},
        {"alignment": 10**7},
        {"sample_rate": 10**7},
        {"graphs.fp32.decoder.file": "../decoder.onnx"},
        {"graphs.fp32.decoder.sizes": {"decoder.onnx": 1, "/etc/passwd": 1}},
        *({"name": name} for name in ("../../evil", "/evil", "a/b", "a\\b", "", ".", "..", "a\0b", "\ud800", None)),
    ],
    ids=str,
)
def test_spec_that_asks_for_too_much_or_leads_out_of_its_folder(child, valid, tmp_path, changes):
    path = tmp_path / "spec.json"
    path.write_bytes(spec_document(valid, changes))
    assert child.open("spec", path) == "EngineError"


def test_configuration_that_asks_for_too_much(child, valid, tmp_path):
    """Its tensors would take gigabytes; the file beside it has none of them."""
    document = json.loads((valid / "checkpoint" / "model_config.json").read_text())
    width = {"*.config.channels": 10**6, "*.config.c_mults": [10**6], "*.config.dim_heads": 10**6}
    edit(document["model"], width | {"*.config.transformer_depths": [1000]})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(document))
    assert child.open("config", path) == "CheckpointError"


def test_text_does_not_multiply(child, valid, tmp_path):
    document = json.loads((valid / "diffusers" / "config.json").read_text())
    path = tmp_path / "config.json"
    for field in ("patch_size", "encoder_strides"):
        text = ["x" * 1000] if field == "encoder_strides" else "x" * 1000
        path.write_text(json.dumps(document | {field: text, "audio_channels": 10**9}))
        assert child.open("diffusers_config", path) == "CheckpointError"


def test_manifest_that_promises_too_much(child, valid, tmp_path):
    header, line = (valid / "dataset" / ".samekit" / "manifest-000001.jsonl").read_text().splitlines()
    path = tmp_path / "manifest.jsonl"
    path.write_text(f"{header}\n{json.dumps(json.loads(line) | {'latents': 10**12})}\n")
    assert child.open("manifest", path) in NAMED | {hostile.ACCEPTED}
    out = shutil.copytree(valid / "dataset", tmp_path / "dataset")
    shutil.copyfile(path, out / ".samekit" / "manifest-000001.jsonl")
    (problem,) = verify(out)
    assert "padding_mask does not fit 1000000000000" in problem
    shutil.copyfile(path, out / ".samekit" / "manifest-1-of-999999999999-000001.jsonl")
    assert verify(out)


def test_blocks_of_many_channels_stay_small(tmp_path):
    """A header of 1,024 channels would make a block of a gigabyte of two megabytes."""
    path = tmp_path / "many.wav"
    samples = noise((5000, 1024))
    sf.write(path, samples, RATE, "FLOAT")
    with AudioReader(path) as reader:
        blocks = list(reader)
    assert max(block.size for block in blocks) <= 2**21
    assert np.array_equal(np.concatenate(blocks, axis=1), samples.T)


def test_names_in_files_do_not_steer_the_terminal(valid, tmp_path):
    folder = shutil.copytree(valid / "engine", tmp_path / "engine")
    changes = {"name": "a\x1b[2J\nb\u202ec", "tools": {"x\r": "\x07"}, "source": {"kind\x1b]0;title\x07": "\x9b2J"}}
    (folder / "spec.json").write_bytes(spec_document(valid, changes))
    result = CliRunner().invoke(main, ["info", str(folder)])
    assert result.exit_code == 0
    assert all(line.isprintable() for line in result.output.split("\n"))
    assert "a\\x1b[2J b\\u202ec in " in result.output


def test_silence_that_is_an_archive(valid, tmp_path):
    out = shutil.copytree(valid / "dataset", tmp_path / "dataset")
    with (out / "silence.npy").open("wb") as file:
        np.savez(file, a=np.zeros(3))
    (problem,) = verify(out)
    assert "is no .npy file" in problem


def test_links_out_of_the_folder_are_not_followed(valid, tmp_path):
    """A graph's external data may be a link; ONNX Runtime looks where it leads."""
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(128))
    folder = shutil.copytree(valid / "engine", tmp_path / "engine")
    (folder / "decoder.onnx.data").symlink_to(secret)
    (folder / "decoder.onnx").write_bytes(with_external_data("decoder.onnx.data"))
    document = json.loads((folder / "spec.json").read_text())
    sizes = {name: (folder / name).stat().st_size for name in ("decoder.onnx", "decoder.onnx.data")}
    document["graphs"]["fp32"]["decoder"]["sizes"] = sizes
    (folder / "spec.json").write_text(json.dumps(document))
    with (
        AutoencoderModel.from_pretrained(folder, backend="onnxruntime", threads=1) as model,
        pytest.raises(errors.BackendError, match="is a link that leaves the folder"),
    ):
        model.decode(noise((1, 4, 2)))


# --- What the code itself never does ---------------------------------------------------------------------------


# The only processes that samekit itself starts (Ray starts its own); no argument of theirs comes from a file or a user.
PROCESSES = {
    # nvidia-smi, and the program in nvidia-pytriton that runs models.
    ("subprocess.run", "[tool, *_GPU_QUERY]"),
    ("subprocess.run", "[self.stub]"),
    # Python, and a Triton server.
    ("subprocess.Popen", "[sys.executable, '-c', _PROGRAM.format(module=module), str(theirs.fileno()), *sys.path]"),
    ("subprocess.Popen", "command"),
}

FORBIDDEN = re.compile(
    r"(eval|exec|compile|__import__|os\.(system|popen|exec|spawn|startfile).*|torch\.load)$"
    r"|.*(pickle|marshal|shelve|joblib|dill|runpy|importlib\.util)\b"
)


def calls_in(path):
    """Every call in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_no_code_comes_from_files():
    """No pickle, no evaluation, no shell, no remote code: whatever a file holds stays data."""
    root = Path(__file__).parent.parent
    sources = [path for folder in ("runtime", "export") for path in (root / folder).rglob("*.py")]
    assert len(sources) > 30
    processes = set()
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(import|from) (pickle|marshal|shelve|joblib|dill|runpy)", text, re.MULTILINE), path
        for call in calls_in(path):
            name = ast.unparse(call.func)
            keywords = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert not FORBIDDEN.match(name), f"{path}: {name}"
            assert not {"trust_remote_code", "shell"} & set(keywords), f"{path}: {name}"
            assert keywords.get("allow_pickle") != "True", path
            if name in ("np.load", "numpy.load"):
                assert keywords["allow_pickle"] == "False", path
            if name.startswith("subprocess."):
                processes.add((name, ast.unparse(call.args[0])))
    assert processes == PROCESSES
