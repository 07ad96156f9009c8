"""Every golden output of the reference implementation, on every backend."""

from __future__ import annotations

import pytest
from helpers import EACH_BACKEND, HOP, KINDS, RATE, assert_close, golden_cases, noise

LEAST_DB = 100


def describe(case):
    """Return an id such as `encode-21-chunked`."""
    words = [case["op"], case.get("latents"), f"batch{case['batch']}" if "batch" in case else None]
    return "-".join(str(word) for word in [*words, "chunked" if case.get("chunked") else None] if word)


def of(*operations):
    """Parametrise over the cases of some operations."""
    return pytest.mark.parametrize(
        ("name", "case"),
        [
            pytest.param(name, case, id=f"{name}-{describe(case)}")
            for name in KINDS
            for case in golden_cases(name)
            if case["op"] in operations
        ],
    )


@of("encode", "decode")
@pytest.mark.parametrize("backend_name", EACH_BACKEND)
def test_encode_and_decode(model_of, backend_name, name, case):
    model = model_of(name, backend_name)
    batch, latents = case.get("batch", 1), case["latents"]
    chunks = {key: case[key] for key in ("chunked", "chunk_size", "overlap") if key in case}
    if case["op"] == "encode":
        output, length = model.encode(noise((batch, 2, latents * HOP), case["seed"]), RATE, **chunks), latents
    else:
        output = model.decode(noise((batch, model.latent_dim, latents), case["seed"], level=1), **chunks)
        length = latents * HOP
    # The reference returns one more latent if its chunks do not fit.
    assert_close(case["output"][..., :length], output, LEAST_DB)


@of("preprocess")
@pytest.mark.parametrize("backend_name", EACH_BACKEND)
def test_preprocessing(model_of, backend_name, name, case):
    clips = [noise(clip["shape"], case["seed"] + 100 * number) for number, clip in enumerate(case["clips"])]
    rates = [clip["rate"] for clip in case["clips"]]
    output = model_of(name, backend_name).autoencoder.preprocess_audio_list_for_encoder(clips, rates)
    for reference, row in zip(case["output"], output, strict=True):
        assert_close(reference, row, LEAST_DB)


@pytest.mark.parametrize("name", KINDS)
def test_no_case_is_left_out(name):
    cases = golden_cases(name)
    assert {case["op"] for case in cases} == {"encode", "decode", "preprocess"}
    assert {(bool(case.get("chunked")), case["latents"] % 2) for case in cases if "latents" in case} == {
        (False, 0),
        (False, 1),
        (True, 0),
        (True, 1),
    }
    assert any(case.get("batch", 1) > 1 for case in cases)
