"""`samekit encode` and `samekit decode`."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING, Any

import click

from samekit.cli.group import UserPath, escape_control_characters, json_option, say, say_json
from samekit.cli.model_options import model_options, open_model
from samekit.errors import InputError
from samekit.files.atomic import remove_abandoned

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("audio", type=UserPath())
@click.argument("latents", type=UserPath())
@model_options
@json_option("path of the latents, and the fields of the .json file")
def encode(audio: Path, latents: Path, as_json: bool, **options: Any) -> None:
    """Encode an AUDIO file to a LATENTS.npy file and a .json beside it."""
    from samekit.dataset.progress import AudioDisplay
    from samekit.model import open_to_encode

    if os.path.isdir(audio):
        command = shlex.join(["samekit", "pre-encode", "--data_dir", str(audio)])
        raise InputError(f"{audio}: is a folder; pass one audio file, or encode a dataset with: {command}")
    # The files are checked before the model is opened, which may be downloaded.
    with open_to_encode(audio, latents) as reader:
        for name in (latents.name, f"{latents.stem}.json"):
            remove_abandoned(latents.parent, name)
        rate, frames = reader.info.sample_rate, reader.info.frames
        length = None if frames is None else frames / rate
        with (
            open_model(**options) as model,
            AudioDisplay(escape_control_characters(f"encoding {audio.name}"), length) as shown,
        ):
            done = model.encode_reader(reader, latents, lambda frames: shown.advance(frames / rate))
    if as_json:
        say_json({"path": str(latents), **done})
        return
    seconds = done["samples"] / done["sample_rate"]
    say(f"{latents}: {done['latents']} latents of {model.latent_dim} from {seconds:.2f} s")


@click.command()
@click.argument("latents", type=UserPath())
@click.argument("audio", type=UserPath())
@click.option("--bits", default="16", show_default=True, type=click.Choice(["16", "24", "32", "float"]))
@click.option(
    "--peak",
    type=click.Choice(["attenuate", "limit", "clip", "raw"]),
    help="Samples beyond full scale: scale the whole file, limit, clip, or keep them; by default raw for floats, else "
    "attenuate.",
)
@click.option("--force", is_flag=True, help="Replace AUDIO even if it may be the recording of these latents.")
@model_options
def decode(latents: Path, audio: Path, bits: str, peak: str | None, force: bool, **options: Any) -> None:
    """Decode a LATENTS.npy file to an AUDIO file, .wav or .flac."""
    from samekit.dataset.progress import AudioDisplay
    from samekit.model import open_to_decode

    subtype = "FLOAT" if bits == "float" else f"PCM_{bits}"
    # The files are checked before the model is opened, which may be downloaded.
    reader = open_to_decode(latents, audio, subtype, peak, force=force)
    remove_abandoned(audio.parent, audio.name)
    with open_model(**options) as model:
        each = model.downsampling_ratio / model.sample_rate
        with AudioDisplay(escape_control_characters(f"decoding {latents.name}"), reader.latents * each) as shown:
            samples = model.decode_reader(
                reader, latents, audio, subtype, peak, lambda count: shown.advance(count * each)
            )
    say(f"{audio}: {samples / model.sample_rate:.2f} s at {model.sample_rate} Hz")
