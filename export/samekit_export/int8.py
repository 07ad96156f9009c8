"""Graphs with int8 products, for CPUs: weights int8 per column, activations uint8 with the range of each call.

A product becomes ONNX's DynamicQuantizeLinear and MatMulInteger, which ONNX Runtime runs as one step. Everything else
stays float32. What keeps the error small:

* the inner activations of the feed-forward, products of two activations with rare large values, are rotated by an
  orthogonal matrix in blocks (QuaRot, arXiv 2404.00456): large values spread, and the range shrinks. So are the heads'
  outputs, for which the rotation is folded into the layers on either side;
* features that are large at every product's input are made smaller, and their weights larger (SmoothQuant, arXiv
  2211.10438): folded into the layer before, or a factor after a norm;
* weights are rounded so that their errors cancel over the rows of examples: see `rounding.py`;
* the decoder's own rows of latents are larger than its learned rows, so both feed forward apart, each with its range;
* products that cost a model too much accuracy stay float32: as few as reach a target, by measurement. See `quantize_`.

Ranges are those of everything in a call, so another window or batch rounds differently; the same call gives the same
numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from onnxscript import opset18
from torch import Tensor, nn

from samekit_export.graph import Branch, GraphDecoder, GraphEncoder, Linear
from samekit_export.rounding import Compensation, to_int8
from samekit_export.verify import snr_db

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from samekit_export.graph import GraphBlock
    from samekit_export.model import Same

TARGET_DB = 38.0
"""What an export aims at, on the inputs of `examples`; what every case must hold is `verify.FLOOR_DB`."""

SEEN = 24
"""Latents of each example that weights are rounded for; half as many lose less than 1 dB."""

TURNED = 16
"""Inner activations that are rotated together. Longer blocks take longer and gain little."""

READERS = {"norm": ("k.linear", "q.linear", "v"), "heads": ("out",), "ff_norm": ("value", "gate"), "inner": ("ff",)}
"""Where rows are rounded in a block, and the products that read them there; the first of them sees all rows."""

FAINTEST = 1e-3
"""How far below the others' mean a feature may lie and still be made larger for it."""

FLOAT = 1
"""ONNX's number for float32."""


@torch.library.custom_op("samekit::int8_product", mutates_args=())
def int8_product(rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`rows @ (weight * scale)` with rows `[rows, in]` rounded to 256 steps, weight int8 `[in, out]`, scale `[out]`.

    The arithmetic of DynamicQuantizeLinear and MatMulInteger; the sums are float32, where a runtime's are int32.
    """
    low, high = rows.amin().clamp(max=0), rows.amax().clamp(min=0)
    step = (high - low) / 255
    if step == 0:
        return rows.new_zeros(rows.shape[0], weight.shape[1])
    zero = torch.round(-low / step)
    steps = torch.clamp(torch.round(rows / step) + zero, 0, 255) - zero
    return (steps @ weight.float()) * (step * scale)


@int8_product.register_fake
def _(rows: Tensor, weight: Tensor, _scale: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


def _int8_product_onnx(rows: Any, weight: Any, scale: Any) -> Any:
    """The form that ONNX Runtime fuses, a bias added to it included."""
    # The exporter writes opset 18 first, and converts all of it to the graph's.
    steps, step, zero = opset18.DynamicQuantizeLinear(rows)
    total = opset18.Cast(opset18.MatMulInteger(steps, weight, zero), to=FLOAT)
    return opset18.Mul(total, opset18.Mul(step, scale))


ONNX_OPERATORS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.samekit.int8_product.default: _int8_product_onnx
}
"""How the operators of this module are written."""


class Int8Linear(nn.Module):
    """A `Linear` with an int8 product.

    Args:
        linear: what is replaced.
        compensation: of the rows that its weights meet; without, they are rounded to the nearest step.
        turn: an orthogonal matrix by which rows are rotated first, in blocks of its size.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: Linear, compensation: Compensation | None = None, turn: Tensor | None = None) -> None:
        super().__init__()
        self.turn = None if turn is None else nn.Parameter(turn.float(), requires_grad=False)
        weight = linear.weight if turn is None else turned(linear.weight.double().T, turn).T.float()
        weight, scale = to_int8(weight, compensation)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        # A vector: the fused step takes no other bias.
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias[0], requires_grad=False)
        self.dtype = linear.dtype

    def forward(self, rows: Tensor) -> Tensor:
        """`[rows, in]` to `[rows, out]`, float32."""
        if self.turn is not None:
            rows = turned(rows, self.turn)
        product: Tensor = int8_product(rows, self.weight, self.scale)
        return product if self.bias is None else product + self.bias


class Int8Branch(Int8Linear):
    """A `Branch` with an int8 product."""

    def __init__(self, branch: Branch, compensation: Compensation | None = None, turn: Tensor | None = None) -> None:
        super().__init__(branch, compensation, turn)
        self.residual_scale = branch.scale

    def forward(self, rows: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        """`[rows, in]` and `[rows, out]` to `[rows, out]`, float32."""
        return super().forward(rows) + residual * self.residual_scale


def rotation(size: int) -> Tensor:
    """A Hadamard matrix, orthogonal, float64 `[size, size]`; the size is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix / math.sqrt(size)


def turned(rows: Tensor, turn: Tensor) -> Tensor:
    """Rows `[rows, features]` times an orthogonal matrix, in blocks of its size."""
    return (rows.reshape(-1, len(turn)) @ turn).reshape(rows.shape)


def rotate_heads_(graph: GraphEncoder | GraphDecoder) -> None:
    """Rotate every head's output, and undo it in the layer that reads it: the same function; in place."""
    block: GraphBlock
    for block in graph.trunk.blocks:  # type: ignore[assignment]
        # The largest power of two that divides a head.
        size = block.head_width & -block.head_width
        turn = rotation(size)
        v, out = block.v.weight.double(), block.out.weight.double()
        block.v.weight.copy_(turned(v, turn))
        block.out.weight.copy_(turned(out.T, turn).T)


def moments_of(graph: GraphEncoder | GraphDecoder, inputs: Iterable[Tensor]) -> dict[str, Tensor]:
    """Second moments `[in, in]` of the rows at each of `READERS`, by block and name such as `11.inner`.

    Every input counts alike, however quiet it is.
    """
    moments: dict[str, Tensor] = {}
    hooks = []

    def listen(key: str, copies: int) -> Callable[..., None]:
        def hook(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
            rows = given[0]
            moment = rows.T @ rows
            if copies:
                moment += copies * (len(rows) - 1) * rows[-1:].T @ rows[-1:]
            moments[key] = moments.get(key, 0.0) + moment / moment.trace().clamp(min=torch.finfo(torch.float32).tiny)

        return hook

    for i, block in enumerate(graph.trunk.blocks):
        for place, readers in READERS.items():
            # The decoder's first block is given its learned row once, in place of a copy for each patch.
            once = isinstance(graph, GraphDecoder) and (i, place) == (0, "norm")
            copies = graph.config.decoder.stride if once else 0
            reader = block.get_submodule(readers[0])
            hooks.append(reader.register_forward_pre_hook(listen(f"{i}.{place}", copies)))
    for x in inputs:
        graph(x)
    for hook in hooks:
        hook.remove()
    return moments


def migrate_(graph: GraphEncoder | GraphDecoder, moments: dict[str, Tensor]) -> None:
    """Scale features by the root of their size at each of `READERS`, and weights the other way; in place.

    The factors are powers of two, so that float32 products stay the same to the bit.

    Args:
        graph: float32.
        moments: of `moments_of`; become those of the scaled rows.
    """
    block: GraphBlock
    for i, block in enumerate(graph.trunk.blocks):  # type: ignore[assignment]
        for place, readers in READERS.items():
            moment = moments[f"{i}.{place}"]
            size = moment.diagonal().sqrt()
            factor = torch.exp2((size / size.mean()).clamp(min=FAINTEST).log2().mul(-0.5).round())
            moments[f"{i}.{place}"] = moment * factor * factor[:, None]
            for reader in readers:
                weight: Tensor = block.get_submodule(reader).weight  # type: ignore[assignment]
                weight /= factor[:, None]
            if (factor == 1).all():
                continue
            if place in ("norm", "ff_norm"):
                block.get_submodule(place).scale = nn.Parameter(factor[None], requires_grad=False)
            else:
                before = block.v if place == "heads" else block.value
                before.weight.mul_(factor)
                if before.bias is not None:
                    before.bias.mul_(factor)


@dataclass(frozen=True, eq=False)
class Product:
    """One product of a graph, and both of its forms."""

    name: str
    """Of the module in the graph."""
    parent: nn.Module
    """The module that holds it."""
    float32: Linear
    """As it was."""
    int8: Int8Linear
    """What may take its place."""

    def use(self, form: nn.Module) -> None:
        """Put one of the forms into the graph."""
        setattr(self.parent, self.name.rpartition(".")[2], form)


def products(
    graph: GraphEncoder | GraphDecoder, moments: dict[str, Tensor] | None = None, *, turn_inner: bool = True
) -> Iterator[Product]:
    """The products of the blocks; the ends are a hundredth of the work and stay float32.

    Args:
        graph: float32.
        moments: of `moments_of`, to round weights for such rows; without, each to the nearest step.
        turn_inner: rotate the inner activations where they become int8.
    """
    for i, block in enumerate(graph.trunk.blocks):
        for place, readers in READERS.items():
            turn = rotation(TURNED) if turn_inner and place == "inner" else None
            moment = moments[f"{i}.{place}"] if moments else None
            if moment is not None and turn is not None:
                moment = turned(turned(moment, turn.float()).T, turn.float())
            compensation = None if moment is None else Compensation(moment)
            for reader in readers:
                linear: Linear = block.get_submodule(reader)  # type: ignore[assignment]
                form = Int8Branch if isinstance(linear, Branch) else Int8Linear
                parent = block.get_submodule(reader.rpartition(".")[0])
                yield Product(f"{i}.{reader}", parent, linear, form(linear, compensation, turn))  # type: ignore[arg-type]


def examples(graph: GraphEncoder | GraphDecoder, model: Same, latents: int) -> Iterator[Tensor]:
    """Inputs of several kinds and levels, seeded: the first is noise of a usual level, those that take a model last."""
    noise = np.random.default_rng(0)
    config = graph.config
    hiss = noise.standard_normal((1, config.channels, latents * config.hop), np.float32)
    seconds = np.arange(hiss.shape[-1]) / config.sample_rate
    chord = sum(np.sin(2 * np.pi * pitch * seconds) for pitch in (110, 277.2, 659.3, 2637))
    audio = [_tensor(array) for array in (0.2 * hiss, 0.01 * hiss, 0.3 * hiss, 0.2 * chord + 0.002 * hiss)]
    if isinstance(graph, GraphEncoder):
        yield from audio
        return
    z = noise.standard_normal((1, config.latent_width, latents), np.float32)
    # Latents of real audio move slowly.
    slow = np.cumsum(z, axis=2) / np.sqrt(np.arange(1, latents + 1))
    yield from map(_tensor, (z, 0.5 * z, slow))
    for clip in audio:
        with torch.no_grad():
            encoded = model.encode(clip)
        yield encoded


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.asarray(array, np.float32))


def prepare_(graph: GraphEncoder | GraphDecoder, model: Same) -> list[Product]:
    """Make a graph bear int8 products, with the same function still, and give both forms of each; in place."""
    with torch.no_grad():
        rotate_heads_(graph)
        moments = moments_of(graph, examples(graph, model, SEEN))
        migrate_(graph, moments)
        return list(products(graph, moments))


def quantize_(
    graph: GraphEncoder | GraphDecoder, model: Same, target_db: float = TARGET_DB, latents: int = 8
) -> list[str]:
    """Turn the products of the blocks into int8, but for those that keep the graph from `target_db`; in place.

    Where not all can be int8, each is tried alone, and those that add most noise for their size stay float32.

    Args:
        graph: as it was made, float32.
        model: what it was made of, for examples of latents.
        target_db: against the float32 graph, on the worst of `examples`.
        latents: in an example.

    Returns:
        Names of the products that stay float32, such as `11.ff`.
    """
    given = list(examples(graph, model, latents))
    # Each product alone is tried on a little only: there are dozens of them, of ten megabytes each.
    little = [next(examples(graph, model, max(1, latents // 4)))]
    with torch.no_grad():
        wanted, wanted_of_little = ([graph(x).numpy() for x in inputs] for inputs in (given, little))
        found = prepare_(graph, model)

        def use(int8: Sequence[Product]) -> None:
            for product in found:
                product.use(product.int8 if product in int8 else product.float32)
            feed_apart(graph)

        def suffices(int8: Sequence[Product]) -> bool:
            use(int8)
            return all(snr_db(y, graph(x).numpy()) >= target_db for x, y in zip(given, wanted, strict=True))

        def harm(product: Product) -> float:
            """Noise for each weight that becomes int8."""
            use([product])
            return 10 ** (-snr_db(wanted_of_little[0], graph(little[0]).numpy()) / 10) / product.int8.weight.numel()

        if suffices(found):
            return []
        harmless = sorted(found, key=harm)
        # The most that reach the target, by halving.
        enough, too_many = 0, len(harmless)
        while too_many - enough > 1:
            middle = (enough + too_many) // 2
            if suffices(harmless[:middle]):
                enough = middle
            else:
                too_many = middle
        use(harmless[:enough])
    return [product.name for product in found if product in harmless[enough:]]


def feed_apart(graph: GraphEncoder | GraphDecoder) -> None:
    """Let the rows of the decoder's latents feed forward apart where the inner activations are int8."""
    if isinstance(graph, GraphDecoder):
        block: GraphBlock
        for block in graph.trunk.blocks:  # type: ignore[assignment]
            block.apart = isinstance(block.ff, Int8Linear)
