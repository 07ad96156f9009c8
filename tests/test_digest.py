"""The digest of a model depends on its configuration and its tensors only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from samekit_export.checkpoint import load
from samekit_export.config import BandSpan, ChunkSpan, SameConfig, TrunkConfig
from samekit_export.digest import checkpoint_digest


def trunk(**changes):
    fields = {
        "width": 8,
        "depth": 2,
        "head_width": 4,
        "ff_mult": 3,
        "stride": 2,
        "span": ChunkSpan(latents=2, shifted=True),
        "sine_blocks": 0,
        "mapping_kernel": 1,
    }
    return TrunkConfig(**fields | changes)


def config(**changes):
    fields = {
        "sample_rate": 44_100,
        "channels": 2,
        "patch": 4,
        "latent_width": 3,
        "encoder": trunk(),
        "decoder": trunk(span=BandSpan(latents=1), mapping_kernel=3),
        "soft_clip": False,
    }
    return SameConfig(**fields | changes)


def tensors():
    return {"b.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3) / 4, "a.bias": torch.tensor([1.5, -2.0])}


# If one of these values changes, existing engines, manifests and latents no longer belong to their model.
SMALL = "23e388abd47a283543c6b43acbddd10a546e8c74460bc7091cfee9809f83a382"
SAME_TINY = "f49fe4c7bc4b098e46feca231f24be6219c2ac14ad85423a6281f96fb5cddf16"


def test_digest_does_not_change():
    assert checkpoint_digest(config(), tensors()) == SMALL


def test_digest_of_the_bundled_model_does_not_change():
    assert load("same-tiny").sha256 == SAME_TINY


def renamed(value, **more):
    """Return the same configuration in other classes, each with one more field at its default value."""
    if not dataclasses.is_dataclass(value):
        return value
    fields = {field.name: renamed(getattr(value, field.name)) for field in dataclasses.fields(value)}
    namespace = {"kind": value.kind} if hasattr(value, "kind") else {}
    added = [("added", bool, dataclasses.field(default=False, kw_only=True))]
    cls = dataclasses.make_dataclass("Renamed", [*((name, object) for name in fields), *added], namespace=namespace)
    return cls(**fields, **more)


def test_names_of_classes_and_new_fields_at_their_default_change_nothing():
    assert checkpoint_digest(renamed(config()), tensors()) == checkpoint_digest(config(), tensors())
    assert checkpoint_digest(renamed(config(), added=True), tensors()) != checkpoint_digest(config(), tensors())


def test_order_and_layout_in_memory_change_nothing():
    given = tensors()
    turned = {"a.bias": given["a.bias"], "b.weight": given["b.weight"].T.contiguous().T}
    assert not turned["b.weight"].is_contiguous()
    assert checkpoint_digest(config(), turned) == checkpoint_digest(config(), given)


@dataclass(frozen=True)
class Chunks:
    """A span of another kind with the same fields."""

    latents: int
    kind = "other"


DIFFERENT = {
    "a number": (config(latent_width=4), tensors()),
    "a nested number": (config(encoder=trunk(depth=3)), tensors()),
    "a switch": (config(soft_clip=True), tensors()),
    "a kind of span": (config(decoder=trunk(span=Chunks(1), mapping_kernel=3)), tensors()),
    "encoder and decoder swapped": (config(encoder=config().decoder, decoder=config().encoder), tensors()),
    "a value": (config(), tensors() | {"a.bias": torch.tensor([1.5, 2.0])}),
    "the sign of a zero": (config(), tensors() | {"b.weight": tensors()["b.weight"] * torch.tensor([-1.0, 1, 1])}),
    "a name": (config(), {"a.bias": tensors()["a.bias"], "c.weight": tensors()["b.weight"]}),
    "a shape": (config(), tensors() | {"b.weight": tensors()["b.weight"].reshape(3, 2)}),
    "a kind of number": (config(), tensors() | {"a.bias": tensors()["a.bias"].double()}),
    "a tensor more": (config(), tensors() | {"d": torch.zeros(0)}),
    "values of another tensor": (
        config(),
        {"a.bias": torch.tensor([1.5, -2.0, 0.0]), "b.weight": torch.arange(1, 6, dtype=torch.float32) / 4},
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_everything_that_changes_the_model_changes_the_digest(what):
    assert checkpoint_digest(*DIFFERENT[what]) != checkpoint_digest(config(), tensors())


def test_large_tensors_are_not_copied():
    """The tensors of SAME-L have 3.4 GB, so they are read without a copy."""
    import tracemalloc

    large = {"weight": torch.zeros(8 << 20)}
    tracemalloc.start()
    try:
        checkpoint_digest(config(), large)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
