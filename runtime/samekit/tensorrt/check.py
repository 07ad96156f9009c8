"""Compare the engines of a build with the ONNX graphs, on the GPU of this machine.

TensorRT can compile a graph to kernels that compute wrong values without an error. For example, TensorRT 10.16.1
computes wrong half-precision attention on GPUs of capability 12.0 (NVIDIA/TensorRT issue 4837). So engines run only
where they were compared with ONNX Runtime on the CPU.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from samekit.backends.base import BackendOptions
from samekit.backends.onnxruntime import OnnxRuntimeBackend
from samekit.engine.accuracy import FLOOR_DB, example_input, snr_db
from samekit.engine.fingerprint import NARROW, PROFILES, capability_name
from samekit.engine.records import Check
from samekit.engine.spec import DIRECTIONS, Direction
from samekit.errors import BackendUnavailableError, NonFiniteError
from samekit.tensorrt.backend import TensorRTBackend
from samekit.tensorrt.runner import split

if TYPE_CHECKING:
    from collections.abc import Iterator

    from samekit.backends.base import Backend
    from samekit.engine.builds import Build
    from samekit.engine.folder import Engine
    from samekit.tensorrt.gpu import Gpu

logger = logging.getLogger(__name__)

CASES: Final = ((1, 1), (2, 7), (4, 33), (NARROW.batch[2], 16), (1, NARROW.latents[2]), (1, 257), (1, 515))
"""Batch and latents of each case: odd and even lengths, batches, and both profiles."""


def check_build(engine: Engine, build: Build, module: Any, gpu: Gpu) -> Check:
    """Compare the engines of a build with the graphs that they were built from; write the result into its folder.

    The reference is the float32 graph if the folder has one, else that of the build's precision.

    Args:
        engine: the engine folder with the graphs.
        build: the engines; they need not be published yet.
        module: the flavour of TensorRT.
        gpu: where they run.

    Returns:
        The result; its `failure` describes the first case below the floor of the precision, if there is one.

    Raises:
        BackendUnavailableError: ONNX Runtime, which computes the reference, is not installed.
        BackendError: an engine or ONNX Runtime fails to run.
    """
    precision = build.fingerprint.precision
    reference = "fp32" if "fp32" in engine.spec.graphs else precision
    logger.info("checking %s once on %s", build.folder.name, gpu.name)
    try:
        expected = OnnxRuntimeBackend(engine, BackendOptions(precision=reference, device="cpu"))
    except BackendUnavailableError as error:
        raise BackendUnavailableError(
            f"{build.folder}: its engines were not checked on this kind of GPU, and that needs ONNX Runtime; {error}"
        ) from None
    options = BackendOptions(precision=precision, device_id=gpu.device_id)
    cases, failure = [], None
    with expected, TensorRTBackend(engine.spec, build, module, gpu, options) as tested:
        for direction, batch, latents in _cases():
            snr = _compare(tested, expected, direction, batch, latents)
            cases.append({"direction": direction, "batch": batch, "latents": latents, "snr_db": snr})
            if not snr >= FLOOR_DB[precision]:
                profile = "narrow" if PROFILES[split(batch, latents)[0].profile] == NARROW else "wide"
                failure = (
                    f"the {precision} {direction} computes wrong values on {gpu.name}: {snr} dB at {batch} x {latents} "
                    f"latents ({profile} profile), {FLOOR_DB[precision]} dB is the least"
                )
                break
    check = Check(capability_name(gpu.capability), gpu.name, build.digests, cases, reference, failure)
    check.write(build.folder)
    logger.info("checked %s: %s", build.folder.name, failure or f"at least {check.least_snr_db} dB")
    return check


def _cases() -> Iterator[tuple[Direction, int, int]]:
    for direction in DIRECTIONS:
        yield from ((direction, batch, latents) for batch, latents in CASES)


def _compare(tested: Backend, expected: Backend, direction: Direction, batch: int, latents: int) -> float:
    """Return the SNR of one case in dB; at least -999 and at most 999, which JSON can hold."""
    array = example_input(tested.spec, direction, batch, latents, seed=latents)
    try:
        output = tested.run(direction, array)
    except NonFiniteError:
        return -999.0
    return round(min(max(snr_db(expected.run(direction, array), output), -999.0), 999.0), 2)
