"""How much memory does a file take, by length? Each file is encoded and decoded in a new process.

python benchmarks/memory.py engines/same-s --latents 64,1024,4096
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import soundfile as sf
from common import backend_option, child, counts, engine_argument, finish, plot_lines, plot_option, question

from samekit.engine.spec import DECODER, ENCODER, graph_precision

if TYPE_CHECKING:
    from samekit.engine.folder import Engine
    from samekit.engine.spec import EngineSpec

# Prints the peak memory of this process in KiB. The value of `getrusage` starts at the parent's peak.
PEAK = """
import sys
from samekit.cli.main import main
main(sys.argv[1:], standalone_mode=False)
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak(*arguments: str | Path) -> float:
    """Run a command of samekit and return its peak memory in MiB."""
    return int(child(sys.executable, "-c", PEAK, *arguments).split()[-1]) / 1024


def write_noise(path: Path, spec: EngineSpec, latents: int) -> None:
    """Write an audio file that is encoded to this many latents."""
    noise = np.random.default_rng(0)
    with sf.SoundFile(path, "w", spec.sample_rate, spec.channels) as file:
        for _ in range(latents):
            file.write(0.1 * noise.standard_normal((spec.hop, spec.channels)))


@question
@engine_argument
@click.option("--latents", default="64,256,1024,4096", show_default=True, callback=counts)
@backend_option
@click.option("--precision", default="fp32", show_default=True)
@plot_option
def main(engine: Engine, latents: list[int], backend: str, precision: str, plot_path: Path | None) -> None:
    """Print the table for one ENGINE folder; the last line is JSON."""
    engine.check(graph_precision(precision))
    spec = engine.spec
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        audio, encoded, decoded = (Path(folder) / file for file in ("in.wav", "in.npy", "out.wav"))
        options = ("--model", engine.folder, "--precision", precision, "--backend", backend, "--device", "cpu")
        for length in latents:
            write_noise(audio, spec, length)
            row = {
                ENCODER: peak("encode", audio, encoded, *options),
                DECODER: peak("decode", encoded, decoded, *options),
            }
            rows.append({"latents": length, "peak_mib": row})
            for path in (encoded, decoded):
                path.unlink()
            print(f"{length:>6} latents  encode {row[ENCODER]:7.0f} MiB  decode {row[DECODER]:7.0f} MiB", flush=True)
    if plot_path:
        points = [(spec.name, name, row["latents"], mib) for row in rows for name, mib in row["peak_mib"].items()]
        plot_lines(plot_path, points, x="latents", y="MiB at the peak")
    finish("memory", rows)


if __name__ == "__main__":
    main()
