"""A script in the manner of the reference's `scripts/pre_encode_dataset.py`, with only its import changed.

The facts are from the repository Stability-AI/stable-audio-3: that script, `stable_audio_3/data/dataset.py` (class
`SampleDataset`: order of files, clamping, captions), and `stable_audio_3/data/utils.py` (class `PadCrop_Normalized_T`:
padding, mask, times). The random parts are left out: offsets of crops, and the sign of the audio.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile as sf
from helpers import HOP, RATE, assert_close, noise

from samekit.dataset.options import PreEncodeOptions
from samekit.dataset.run import pre_encode

EXACT_DB = 100
SAMPLE_SIZE = 20 * HOP
IMPORT = "from stable_audio_3 import AutoencoderModel"

SCRIPT = '''
"""Pre-encode a folder: MODEL DATA OUTPUT SAMPLE_SIZE [half]."""
import json, math, os, sys
import numpy as np, soundfile as sf, torch
from torch.nn import functional as F

from stable_audio_3 import AutoencoderModel


def audio_files(folder):
    entries = list(os.scandir(folder))
    files = [entry.path for entry in entries if entry.is_file() and entry.name.endswith(".wav")]
    return files + [path for entry in entries if entry.is_dir() for path in audio_files(entry.path)]


class Clips(torch.utils.data.Dataset):
    def __init__(self, folder, sample_size, sample_rate):
        self.folder, self.size, self.rate = folder, sample_size, sample_rate
        self.files = audio_files(folder)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        path = self.files[index]
        samples, rate = sf.read(path, dtype="float32", always_2d=True)
        source = torch.from_numpy(samples.T)
        length = source.shape[1]
        audio, mask = torch.zeros(source.shape[0], self.size), torch.zeros(self.size)
        audio[:, :length], mask[:length] = source[:, : self.size], 1
        audio = audio.clamp(-1, 1).expand(2, -1)
        with open(os.path.splitext(path)[0] + ".txt") as caption:
            prompt = caption.read().strip()
        return audio, {
            "relpath": os.path.relpath(path, self.folder),
            "timestamps": (0.0, self.size / max(length, self.size)),
            "seconds_start": 0,
            "seconds_total": math.ceil(length / rate),
            "padding_mask": [mask],
            "sample_rate": self.rate,
            "prompt": prompt,
        }


def collate(items):
    audio, infos = zip(*items)
    return torch.stack(audio), infos


model, data, output, sample_size, *half = sys.argv[1:]
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ae = AutoencoderModel.from_pretrained(model, device=str(device))
if half:
    ae.autoencoder = ae.autoencoder.half()
loader = torch.utils.data.DataLoader(
    Clips(data, int(sample_size), ae.sample_rate),
    batch_size=1,
    shuffle=False,
    num_workers=2,
    drop_last=False,
    collate_fn=collate,
)
os.makedirs(output)
device = next(ae.autoencoder.parameters()).device
silence = torch.zeros(1, ae.autoencoder.io_channels, int(sample_size), device=device)
with torch.no_grad():
    np.save(f"{output}/silence.npy", ae.encode(silence.half() if half else silence, ae.sample_rate).cpu().numpy())
for number, (audio, infos) in enumerate(loader):
    audio = audio.to(device)
    latents = ae.encode(audio.half() if half else audio, ae.sample_rate)
    for index, latent in enumerate(latents):
        values, info = latent.cpu().numpy(), dict(infos[index])
        mask = F.interpolate(info["padding_mask"][0][None, None].float(), size=values.shape[-1], mode="nearest")[0, 0]
        valid = int(mask.nonzero()[-1]) + 1
        info["padding_mask"] = mask[:valid].int().cpu().numpy().tolist()
        np.save(f"{output}/{number:06d}{index:04d}.npy", values[:, :valid])
        with open(f"{output}/{number:06d}{index:04d}.json", "w") as file:
            json.dump(info, file)
'''

# The reference in eager PyTorch, as far as the script uses it.
EAGER = """
import torch
from samekit_export.checkpoint import load_folder
from samekit_export.model import Same

class Autoencoder:
    io_channels = 2

    def __init__(self, same):
        self.same = same

    def parameters(self):
        return self.same.parameters()

class AutoencoderModel:
    sample_rate = 44100

    @classmethod
    def from_pretrained(cls, model, device):
        self = cls()
        self.autoencoder = Autoencoder(Same.from_checkpoint(load_folder(model)))
        return self

    @torch.inference_mode()
    def encode(self, audio, sr):
        return self.autoencoder.same.encode(audio)
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Write clips in folders: shorter than the sample size, of it, and longer; mono; above full scale."""
    folder = tmp_path_factory.mktemp("clips")
    lengths = {
        "b.wav": 30_000,
        "a.wav": HOP,
        "deep/c.wav": SAMPLE_SIZE,
        "deep/er/d.wav": SAMPLE_SIZE + 9000,
        "e.wav": 1,
    }
    for index, (name, length) in enumerate(lengths.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, noise((length, 1 + index % 2), index, level=0.6), RATE, subtype="FLOAT")
        path.with_suffix(".txt").write_text(f" a caption of {name}\n", encoding="utf-8")
    assert np.abs(sf.read(folder / "b.wav")[0]).max() > 1
    return folder


def run_script(folder, text, *arguments):
    """Run a script as a program, as its users do."""
    script = folder / "script.py"
    script.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def read_folder(folder):
    """Return relpath -> latents and metadata of a folder of latents, and its silence."""
    read = {}
    for path in folder.glob("0*.json"):
        metadata = json.loads(path.read_text())
        read[metadata["relpath"]] = np.load(path.with_suffix(".npy"), allow_pickle=False), metadata
    return read, np.load(folder / "silence.npy", allow_pickle=False)


@pytest.fixture(scope="module")
def written(half_engine, checkpoint_of, clips, tmp_path_factory):
    """Return the folders that the script writes with our engine, in fp16 too, and in eager PyTorch."""
    assert SCRIPT.count(IMPORT) == 1
    root = tmp_path_factory.mktemp("scripts")
    (root / "stable_audio_3").mkdir()
    (root / "stable_audio_3" / "__init__.py").write_text(EAGER)
    swapped = SCRIPT.replace(IMPORT, "from samekit import AutoencoderModel")
    run_script(root, SCRIPT, checkpoint_of("tiny-s"), clips, root / "eager", SAMPLE_SIZE)
    run_script(root, swapped, half_engine, clips, root / "ours", SAMPLE_SIZE)
    run_script(root, swapped, half_engine, clips, root / "half", SAMPLE_SIZE, "half")
    return {name: root / name for name in ("eager", "ours", "half")}


def test_files_are_those_of_eager_pytorch(written, clips):
    eager, silence = read_folder(written["eager"])
    ours, our_silence = read_folder(written["ours"])
    assert sorted(os.listdir(written["eager"])) == sorted(os.listdir(written["ours"]))
    assert len(eager) == len(ours) == sum(1 for _ in clips.rglob("*.wav"))
    for relpath, (latents, metadata) in eager.items():
        assert_close(latents, ours[relpath][0], EXACT_DB)
        assert ours[relpath][1] == metadata
    assert_close(silence, our_silence, EXACT_DB)
    # The same clips have the same numbers.
    for path in written["eager"].glob("*.json"):
        assert path.read_bytes() == (written["ours"] / path.name).read_bytes()


def test_files_are_those_of_our_command(written, clips, model_of, tmp_path):
    report = pre_encode(
        model_of("tiny-s", "onnxruntime"), clips, tmp_path / "out", PreEncodeOptions(sample_size=SAMPLE_SIZE)
    )
    assert report.encoded == 5
    commands, silence = read_folder(tmp_path / "out")
    scripts, script_silence = read_folder(written["ours"])
    assert commands.keys() == scripts.keys()
    for relpath, (latents, metadata) in scripts.items():
        assert_close(latents, commands[relpath][0], EXACT_DB)
        assert {field: commands[relpath][1][field] for field in metadata} == metadata
    assert_close(script_silence, silence, EXACT_DB)


def test_half_a_model_writes_half_precision(written):
    single, silence = read_folder(written["ours"])
    half, half_silence = read_folder(written["half"])
    assert half.keys() == single.keys()
    for relpath, (latents, metadata) in half.items():
        assert latents.dtype == np.float16
        assert_close(single[relpath][0], latents.astype(np.float32), 40)
        assert metadata == single[relpath][1]
    assert half_silence.dtype == np.float16
    assert_close(silence, half_silence.astype(np.float32), 40)
