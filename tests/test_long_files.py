"""Memory while files of hours are encoded and decoded, with a model of the sizes of SAME-S that costs nothing."""

import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile as sf

RATE = 44_100

# Calls `encode_file` or `decode_file`, and prints the peak memory of the process in MiB.
RUN = """
import sys
from null_encoder import NullEncoder
from samekit import AutoencoderModel
getattr(AutoencoderModel(NullEncoder()), sys.argv[1])(*sys.argv[2:4])
print(*(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak(*arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=600)
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="/proc is Linux")
@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_three_hours_take_the_memory_of_two_minutes(tmp_path, suffix):
    minute = np.random.default_rng(0).normal(0, 0.1, (60 * RATE, 2)).astype(np.float32)
    peaks = {}
    for minutes in (2, 180):
        audio, latents = tmp_path / f"{minutes}.{suffix}", tmp_path / f"{minutes}.npy"
        with sf.SoundFile(audio, "w", RATE, 2) as file:
            for _ in range(minutes):
                file.write(minute)
        peaks[minutes] = [peak("encode_file", audio, latents)]
        assert np.load(latents, mmap_mode="r").shape == (256, -(-minutes * 60 * RATE // 4096))
        decoded = tmp_path / f"{minutes}-decoded.{suffix}"
        peaks[minutes].append(peak("decode_file", latents, decoded))
        assert sf.info(decoded).frames == minutes * 60 * RATE
        audio.unlink()
        decoded.unlink()
    for short, long in zip(peaks[2], peaks[180], strict=True):
        assert long < short + 100
    print(f"{suffix}: peak MiB of encode and decode, by minutes: {peaks}")
