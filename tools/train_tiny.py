"""Train a small model from a seed: `python tools/train_tiny.py`, at most 90 minutes on two cores.

    synthesis.py ── a pool of clips ── random crops, mixed ── Same (model.py) ── squared error ── AdamW, moving average
                                                                                                        │
                 folder/model_config.json, model.safetensors, curve.jsonl  ── every few minutes ────────┘

The initial weights matter more than the training time. A latent is computed from its learned token, which receives
audio only through attention. With random weights it takes hours until attention selects useful tokens. So the heads of
the first block start as position selectors: a constant feature, turned by the rotary embedding, makes a head attend to
a fixed distance. The layers at both ends start as least-squares fits to the outputs of these heads. So step 0 is a
linear transform codec, and training makes it adaptive.

`tiny_recipes.py` lists the models that can be trained.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import synthesis
import torch
from tiny_recipes import RECIPES, Recipe
from torch import Tensor, nn

from samekit.backends.cpu import available_cpus
from samekit_export.checkpoint import save_folder
from samekit_export.config import parse_config, rotary_frequencies
from samekit_export.model import Same, Trunk, WeightNormConv
from samekit_export.tensors import tensor_shapes

if TYPE_CHECKING:
    from collections.abc import Callable

SEED = 0
NOISE_SEED = 2**32
PEAK_RATE, WARM_UP = 1e-3, 200
AVERAGE = 0.998
LATENT_NOISE = 1e-3
"""Noise on latents, relative to their size, if a configuration has `noise_regularize`; as in the reference."""
STATE_FILE, CURVE_FILE = "training.pt", "curve.jsonl"

SELECTING = 6
"""Features of a head that select positions, at the highest frequencies of the rotary embedding."""


def make_clip(seed: tuple[int, ...], length: float) -> np.ndarray:
    """Return a clip `[2, samples]` of 16-bit numbers."""
    audio = synthesis.clip(np.random.default_rng(seed), length)
    return np.round(audio.T * 32767).astype(np.int16)


def make_clips(stream: int, count: int, length: float, workers: int) -> Tensor:
    """Return clips `[count, 2, samples]` of 16-bit numbers. Even streams are for training, odd ones for tests."""
    seeds = [(SEED, stream, i) for i in range(count)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return torch.from_numpy(np.stack(list(pool.map(make_clip, seeds, [length] * count, chunksize=8))))


def make_pool(recipe: Recipe, step: int, workers: int) -> Tensor:
    """Return the clips that training uses from `step` on."""
    print("making clips", flush=True)
    return make_clips(2 * (step // recipe.pool_steps), recipe.pool_clips, recipe.pool_seconds, workers)


def held_out(recipe: Recipe, workers: int, hop: int) -> Tensor:
    """Return the clips on which the published accuracy was measured, in whole latents."""
    clips = make_clips(1, recipe.held_out_clips, recipe.held_out_seconds, workers).float() / 32767
    return clips[..., : clips.shape[-1] // hop * hop]


def make_batch(pool: Tensor, batch: int, samples: int, number: int) -> Tensor:
    """Return crops `[batch, 2, samples]` with random gain, polarity and channel order; a third are mixed in pairs."""
    random = torch.Generator().manual_seed(SEED + number)

    def draw() -> Tensor:
        return torch.rand((batch, 1, 1), generator=random)

    def crops() -> Tensor:
        which = torch.randint(len(pool), (batch,), generator=random)
        start = torch.randint(pool.shape[-1] - samples, (batch,), generator=random)
        audio = torch.stack([pool[i, :, j : j + samples] for i, j in zip(which, start, strict=True)]).float() / 32767
        return torch.where(draw() < 0.5, audio.flip(1), audio)

    audio = crops() + (draw() < 0.33) * 10 ** (1.5 * draw() - 1) * crops()
    audio = audio * 10 ** (0.9 * draw() - 0.6) * torch.where(draw() < 0.5, -1, 1)
    return audio / audio.abs().amax((1, 2), keepdim=True).clamp(min=1)


def relative_error(audio: Tensor, back: Tensor) -> Tensor:
    """Return squared error over energy for each example; the energy is at least that of -80 dBFS."""
    return (back - audio).square().mean((1, 2)) / (audio.square().mean((1, 2)) + 1e-8)


class Noise:
    """The noise that a configuration describes: on latents (`noise_regularize`) and learned tokens (`mask_noise`).

    The reference adds the same. Here it grows over the first half of the training, because the linear codec at the
    start does not tolerate it.

    Args:
        model: gets hooks, which add the noise.
        config: its `model_config.json`.
    """

    def __init__(self, model: Same, config: dict[str, Any]) -> None:
        self.strength = 0.0
        self.random = torch.Generator()
        (encoder, _), (from_latent, decoder) = model.encoder_parts, model.decoder_parts
        if config["model"]["bottleneck"]["config"]["noise_regularize"]:
            self._add(from_latent, self._on_latents)
        for direction, trunk, learned in (("encoder", encoder, slice(-1, None)), ("decoder", decoder, slice(1, None))):
            if level := config["model"][direction]["config"]["mask_noise"]:
                tokens = trunk.config.latent_tokens
                self._add(trunk.blocks[0], partial(self._on_tokens, level=level, learned=learned, tokens=tokens))

    def start_step(self, step: int, steps: int) -> None:
        """Set the strength and the random numbers of a step."""
        self.strength = min(1.0, 2 * step / steps)
        self.random.manual_seed(NOISE_SEED + step)

    def _add(self, module: nn.Module, noise_for: Callable[[Tensor], Tensor]) -> None:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *others = inputs
            return (x + self.strength * noise_for(x) if torch.is_grad_enabled() else x, *others)

        module.register_forward_pre_hook(hook)

    def _on_latents(self, x: Tensor) -> Tensor:
        return LATENT_NOISE * x.detach().std((0, 1)) * torch.randn(x.shape, generator=self.random)

    def _on_tokens(self, x: Tensor, level: float, learned: slice, tokens: int) -> Tensor:
        noise = torch.zeros_like(x)
        of_latents = noise.view(-1, tokens, x.shape[-1])[:, learned]
        of_latents.copy_(level * torch.randn(of_latents.shape, generator=self.random))
        return noise


def initialise(model: Same, recipe: Recipe, pool: Tensor) -> None:
    """Set the weights to those of a linear codec, see the module's docstring; `pool` is from `make_clips`."""
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    model.bottleneck["scaling_factor"].fill_(1)
    model.bottleneck["running_std"].fill_(1)
    (encoder, to_latent), (from_latent, decoder) = model.encoder_parts, model.decoder_parts
    tokens = encoder.config.latent_tokens
    # Distances, in tokens, that each head attends to and that it subtracts. In the encoder a learned token follows its
    # patches, in the decoder patches follow their latent.
    patches = range(1, tokens)
    around = [(-1, tokens + 1), (tokens, -tokens)]
    _start_trunk(encoder, [(d, 0) for d in reversed(patches)] + around, gain=8)
    _start_trunk(decoder, [(d, 0) for d in patches] + around, gain=12)

    samples = recipe.crop_latents * model.config.hop
    audio = torch.cat([make_batch(pool, recipe.batch, samples, -number) for number in range(1, 49)])
    audio = audio[audio.std((1, 2)) > 1e-3]
    # Rows are weighted by the inverse level of their example, so that all examples count the same.
    weight = 1 / audio.std((1, 2))
    patch, width = model.config.patch, encoder.config.width
    rows = (audio * weight[:, None, None]).unflatten(2, (-1, patch)).transpose(1, 2).flatten(2)
    basis, std = _principal(rows.flatten(0, 1), width - 2)
    _set_mapping(encoder.mapping, (0.25 * basis / std).T[:, :, None])
    encoder.mapping.bias[-2] = -1
    encoder.new_tokens[..., -2] = 1

    learned = _stream(encoder, lambda: model.encode(audio))[:, :, -1]
    hops = audio.unflatten(2, (-1, model.config.hop)).transpose(1, 2).flatten(2)
    fit = _least_squares(learned, hops, weight)
    seen = torch.cat([learned, torch.ones_like(learned[..., :1])], dim=-1) @ fit
    basis, std = _principal((seen * weight[:, None, None]).flatten(0, 1), model.config.latent_width)
    typical = 0.1 * std
    to_latent.weight.copy_((fit[:-1] @ basis / typical).T)
    to_latent.bias.copy_(fit[-1] @ basis / typical)

    # Each latent enters three times, with different gains, so that loud and quiet can be distinguished.
    for copy_number, gain in enumerate((0.03, 0.15, 0.6)):
        for channel in range(model.config.latent_width):
            feature = copy_number * model.config.latent_width + channel
            if feature < width - 2:
                from_latent.weight[feature, channel] = gain
    from_latent.bias[-2] = 1
    decoder.new_tokens[..., -2] = -1
    latents = model.encode(audio)
    _set_mapping(decoder.mapping, torch.randn(decoder.mapping.weight_v.shape))
    copies = _stream(decoder, lambda: model.decode(latents))[:, :, 1:].flatten(1, 2)
    kernel = decoder.config.mapping_kernel
    taps = range(-(kernel // 2), kernel // 2 + 1)
    seen = torch.cat([nn.functional.pad(copies, (0, 0, -tap, tap)) for tap in taps], dim=-1)
    rows = audio.unflatten(2, (-1, patch)).transpose(1, 2).flatten(2)
    fit = _least_squares(seen, rows, weight)
    _set_mapping(decoder.mapping, fit[:-1].unflatten(0, (kernel, width)).permute(2, 1, 0))
    decoder.mapping.bias.copy_(fit[-1])


def _start_trunk(trunk: Trunk, distances: list[tuple[int, int]], gain: float) -> None:
    """Set norms and position selectors. The first block copies the selected tokens; the others add nearly zero."""
    config = trunk.config
    width, head = config.width, config.head_width
    angles = torch.as_tensor(rotary_frequencies(config.rotated)[:SELECTING])
    half = config.rotated // 2
    for number, block in enumerate(trunk.blocks):
        attention = block.self_attn
        for norm, gamma in ((block.pre_norm, 1), (block.ff_norm, 1), (attention.q_norm, 6), (attention.k_norm, 6)):
            norm.alpha.fill_(1)
            norm.gamma.fill_(gamma)
        # The last feature is the constant by which heads select positions.
        block.pre_norm.gamma[-1] = 0
        block.pre_norm.beta[-1] = 1
        parts = attention.to_qkv.weight.view(5, config.heads, head, width)
        parts.copy_(torch.randn(parts.shape) * 0.5 * width**-0.5)
        for h in range(config.heads):
            for query, key, distance in zip((0, 3), (1, 4), distances[(h + number) % len(distances)], strict=True):
                parts[query, h, :SELECTING, -1] = torch.atanh(0.9 * torch.cos(distance * angles)).float()
                parts[query, h, half : half + SELECTING, -1] = torch.atanh(-0.9 * torch.sin(distance * angles)).float()
                parts[key, h, :SELECTING, -1] = math.atanh(0.9)
                parts[key, h, half : half + SELECTING, -1] = 0
        if number == 0:
            parts[2] = gain * torch.eye(head, width)
            attention.to_out.weight.copy_(torch.eye(width))
            attention.to_out.weight[-2:] = 0
        else:
            parts[2] *= 2
            nn.init.normal_(attention.to_out.weight, std=0.03 * width**-0.5)
        project, back = block.ff.linears
        nn.init.normal_(project.weight, std=2 * width**-0.5)
        if block.ff.sine:
            # Within one period of sin(pi x).
            project.weight[config.inner :] *= 0.25
        nn.init.normal_(back.weight, std=0.03 * config.inner**-0.5)


def _principal(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the first principal directions `[features, count]` and the standard deviation along each."""
    values, vectors = torch.linalg.eigh((rows.T @ rows / len(rows)).double())
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    return vectors.float(), (values.clamp(min=values[0] * 1e-5) ** 0.5).float()


def _least_squares(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Fit `[examples, rows, out]` to `[examples, rows, in]`; return the weights with the bias as the last row."""
    x = (torch.cat([x, torch.ones_like(x[..., :1])], dim=-1) * weight[:, None, None]).flatten(0, 1).double()
    y = (y * weight[:, None, None]).flatten(0, 1).double()
    square = x.T @ x
    square += 1e-6 * square.trace() / len(square) * torch.eye(len(square))
    return torch.linalg.solve(square, x.T @ y).float()


def _set_mapping(mapping: WeightNormConv, weight: Tensor) -> None:
    """Set the effective weight, `[n_out or fewer, n_in, kernel]`, of a layer with weight norm; other rows are zero."""
    mapping.weight_v.copy_(torch.randn(mapping.weight_v.shape))
    mapping.weight_v[: len(weight)] = weight
    mapping.weight_g[: len(weight)] = weight.norm(dim=(1, 2), keepdim=True)


def _stream(trunk: Trunk, run: Callable[[], object]) -> Tensor:
    """Return the output of a trunk's blocks during `run`: `[batch, latents, tokens, width]`."""
    kept = []
    original = trunk.run

    def keeping(x: Tensor) -> Tensor:
        kept.append(original(x))
        return kept[-1]

    trunk.run = keeping  # type: ignore[method-assign]
    try:
        run()
    finally:
        del trunk.run
    return kept[0]


@torch.inference_mode()
def quality(model: Same, clips: Tensor) -> dict[str, float]:
    """Return mean and quartiles of the clips' round-trip SNR in dB."""
    errors = torch.cat([relative_error(clip[None], model.decode(model.encode(clip[None]))) for clip in clips])
    snr = -10 * errors.log10()
    quartiles = torch.quantile(snr, torch.tensor([0.25, 0.5, 0.75]))
    return {"mean_db": snr.mean().item()} | {
        name: value.item() for name, value in zip(("low_db", "median_db", "high_db"), quartiles, strict=True)
    }


def calibrate(model: Same, pool: Tensor) -> None:
    """Scale every latent channel to mean 0 and standard deviation 1 over the pool; decoded audio does not change."""
    _, to_latent = model.encoder_parts
    from_latent, _ = model.decoder_parts
    samples = pool.shape[-1] // model.config.hop * model.config.hop
    latents = torch.cat([model.encode(clip[None, :, :samples].float() / 32767) for clip in pool[:32]], dim=2)
    std, mean = torch.std_mean(latents, dim=(0, 2))
    to_latent.weight.div_(std[:, None])
    to_latent.bias.copy_((to_latent.bias - mean) / std)
    from_latent.bias.add_(from_latent.weight @ mean)
    from_latent.weight.mul_(std)


def save(model: Same, config: dict[str, Any], pool: Tensor, folder: Path) -> Same:
    """Write a calibrated copy in float16, like the published file; return the model with the rounded weights."""
    copied = copy.deepcopy(model)
    calibrate(copied, pool)
    tensors = {key: copied.state_dict()[key].half() for key in tensor_shapes(copied.config)}
    save_folder(config, tensors, folder)
    copied.load_state_dict(tensors)
    return copied


def improve_(model: Same, optimizer: torch.optim.Optimizer, audio: Tensor) -> float:
    """Do one step of training; return the loss in dB."""
    with torch.enable_grad():
        # The logarithm makes loud and quiet examples count the same, and hard and easy ones too.
        loss = (relative_error(audio, model.decode(model.encode(audio))) + 1e-3).log10().mean()
        loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return 10 * loss.item()


def train(recipe: Recipe, folder: Path, threads: int) -> None:
    """Train, or continue an interrupted run; write the checkpoint and its curve to `folder`."""
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    torch.set_num_threads(threads)
    config, _ = parse_config(recipe.config)
    model, steps = Same(config), recipe.steps
    judged = held_out(recipe, threads, config.hop)
    torch.set_grad_enabled(False)
    weights = [p for name, p in model.named_parameters() if not name.startswith("bottleneck")]
    optimizer = torch.optim.AdamW(weights, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    first, spent = 0, 0.0
    state = torch.load(folder / STATE_FILE) if (folder / STATE_FILE).exists() else None
    if state:
        first, spent = state["step"], state["seconds"]
    pool = make_pool(recipe, first, threads)
    if not state:
        initialise(model, recipe, pool)
    average = copy.deepcopy(model)
    if state:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
    noise = Noise(model, recipe.config)
    losses: list[float] = []
    for step in range(first, steps + 1):
        if (step % recipe.every == 0 or step == steps) and (step > first or step == 0):
            seconds = spent + time.monotonic() - started
            row = {"step": step, "seconds": round(seconds), "loss": float(np.mean(losses)) if losses else None}
            row |= quality(save(average, recipe.config, pool, folder), judged)
            losses.clear()
            print(json.dumps(row), flush=True)
            with (folder / CURVE_FILE).open("a") as file:
                file.write(json.dumps(row) + "\n")
            state = {"model": model, "average": average, "optimizer": optimizer}
            state = {key: value.state_dict() for key, value in state.items()} | {"step": step, "seconds": seconds}
            torch.save(state, folder / STATE_FILE)
        if step == steps:
            break
        if step % recipe.pool_steps == 0 and step > first:
            pool = make_pool(recipe, step, threads)
        optimizer.param_groups[0]["lr"] = PEAK_RATE * min(
            (step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps)
        )
        audio = make_batch(pool, recipe.batch, recipe.crop_latents * config.hop, step)
        noise.start_step(step, steps)
        losses.append(improve_(model, optimizer, audio))
        rate = min(AVERAGE, (step + 1) / (step + 10))
        for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
            slow.lerp_(fast, 1 - rate)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", choices=RECIPES, default="same-tiny")
    parser.add_argument("--out", type=Path, help="folder of the checkpoint; build/MODEL unless given")
    parser.add_argument("--steps", type=int, help="instead of those of the recipe")
    parser.add_argument("--threads", type=int, default=available_cpus())
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.model]
    recipe = replace(recipe, steps=arguments.steps or recipe.steps)
    train(recipe, arguments.out or Path("build", arguments.model), arguments.threads)


if __name__ == "__main__":
    main()
