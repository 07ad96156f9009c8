"""Build TensorRT engines from ONNX graphs, with TensorRT or TensorRT-RTX.

TensorRT builds for the GPU of this machine. TensorRT-RTX needs no GPU and builds for several GPU architectures.
Networks are strongly typed: the graph decides the precision of every step. Each engine holds both profiles of
`samekit.engine.fingerprint`. Where a GPU can run the engines, they are compared with the graphs before they are valid.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import sys
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from samekit.backends.base import has_driver
from samekit.engine.builds import (
    BUILDS_FOLDER,
    FAILED_LOG_SUFFIX,
    LOG_FILE,
    Build,
    BuiltEngine,
    is_whole,
    new_build,
    unfinished_builds,
    write_document,
)
from samekit.engine.fingerprint import (
    PORTABLE,
    TENSORRT,
    TENSORRT_RTX,
    capability_name,
    fingerprint_of,
    profiles_of,
    runs_on,
)
from samekit.engine.folder import Engine, engine_roots
from samekit.engine.spec import DIRECTIONS, GPU_PRECISIONS, Direction
from samekit.errors import BackendUnavailableError, BuildError, InputError, VerificationError
from samekit.files.atomic import atomic_path, output_errors
from samekit.files.locks import folder_lock
from samekit.files.paths import utf8_path
from samekit.tensorrt.check import check_build
from samekit.tensorrt.flavours import import_flavour, make_logger
from samekit.tensorrt.gpu import Gpu

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import TextIO

    from samekit.engine.fingerprint import Fingerprint

logger = logging.getLogger(__name__)

AUTO, RTX, OFF = MODES = ("auto", "rtx", "off")
"""auto: TensorRT if it and a GPU are available, else TensorRT-RTX if installed, else nothing. rtx: TensorRT-RTX."""


def add_engines(engine: Engine, precisions: Sequence[str], mode: str) -> list[Build]:
    """Build the TensorRT engines that a finished engine folder lacks; log each step, and what is left out and why.

    `mode` is one of `MODES`. Return the builds of these precisions, including current ones.

    Raises:
        InputError: unknown mode.
        BackendUnavailableError: TensorRT-RTX was asked for and cannot be imported.
        BuildError: TensorRT cannot build a graph.
        OutputError: the folder cannot be written.
    """
    gpu = _gpu()
    flavour, target = _choose_flavour(mode, gpu)
    if flavour is None:
        return []
    if gpu and not runs_on(target, gpu.capability):
        gpu = None
    builds = []
    for precision in precisions:
        if precision in GPU_PRECISIONS:
            builds.append(build_engines(engine, precision, flavour, target, gpu))
        else:
            logger.info("no TensorRT engine of %s, which is for ONNX Runtime on the CPU", precision)
    return builds


def _gpu() -> Gpu | None:
    """Return the GPU for which TensorRT builds, the first one; None if there is none."""
    with suppress(BackendUnavailableError):
        return Gpu(0)
    return None


def _choose_flavour(mode: str, gpu: Gpu | None) -> tuple[Any, str]:
    """Return the module that builds and the target that it builds for; None if nothing can be built."""
    if mode not in MODES:
        raise InputError(f"unknown TensorRT mode {mode!r}; choose one of {', '.join(MODES)}")
    if mode == OFF:
        return None, ""
    if mode == RTX:
        return import_flavour(TENSORRT_RTX), PORTABLE
    reasons = []
    try:
        module = import_flavour(TENSORRT)
        if gpu:
            return module, capability_name(gpu.capability)
        reasons.append("tensorrt builds on a GPU, and PyTorch finds none; use tensorrt-rtx")
    except BackendUnavailableError as error:
        reasons.append(str(error))
    try:
        return import_flavour(TENSORRT_RTX), PORTABLE
    except BackendUnavailableError as error:
        reasons.append(str(error))
    why = "; ".join(reasons) if has_driver() else "no NVIDIA driver; for GPUs of other machines pass --tensorrt rtx"
    logger.info("left out: TensorRT engines (%s)", why)
    return None, ""


def build_engines(engine: Engine, precision: str, module: Any, target: str, gpu: Gpu | None = None) -> Build:
    """Build the engines of both directions of one precision, or leave them if they are complete and current.

    Wait while another process writes to the engine folder.

    Args:
        engine: a finished engine folder.
        precision: of its graphs, one of `GPU_PRECISIONS`.
        module: `tensorrt` or `tensorrt_rtx`, see `samekit.tensorrt.flavours.import_flavour`.
        target: the compute capability of this machine's GPU, or `PORTABLE`.
        gpu: where the engines are checked before they are valid; None leaves that to the first machine that opens them.

    Raises:
        BuildError: TensorRT cannot build a graph; its log stays beside the builds.
        VerificationError: the engines compute wrong values on the GPU; the log stays too.
        OutputError: the folder cannot be written.
    """
    if current := _current_build(engine, precision, module, target):
        return current
    with folder_lock(engine.folder):
        # Checked again: the process that held the lock may have built this, or exported other graphs.
        engine = Engine.load(engine.folder)
        engine.check(precision)
        if current := _current_build(engine, precision, module, target):
            return current
        for unfinished in unfinished_builds(engine):
            shutil.rmtree(unfinished, ignore_errors=True)
        fingerprint = fingerprint_of(engine.spec, precision, module.__name__, module.__version__, target)
        folder = engine.folder / BUILDS_FOLDER / fingerprint.name
        with new_build(folder), output_errors(folder):
            logger.info("building %s", folder)
            _failed_log(folder).unlink(missing_ok=True)
            try:
                build = Build(folder, fingerprint, _build_engines(engine, fingerprint, module, folder))
                if gpu is None:
                    logger.info(
                        "not checked: no GPU here runs these engines; the first machine that opens them does it"
                    )
                elif failure := check_build(engine, build, module, gpu).failure:
                    raise VerificationError(
                        f"{module.__name__} {module.__version__}: {failure}; these engines were deleted, use backend "
                        "onnxruntime, and please report this"
                    )
            except (BuildError, VerificationError):
                with suppress(OSError):
                    shutil.copyfile(folder / LOG_FILE, _failed_log(folder))
                raise
            write_document(build)
    return Build.load(folder)


def _current_build(engine: Engine, precision: str, module: Any, target: str) -> Build | None:
    """Return the build, if it exists and is complete and current."""
    fingerprint = fingerprint_of(engine.spec, precision, module.__name__, module.__version__, target)
    folder = engine.folder / BUILDS_FOLDER / fingerprint.name
    if not is_whole(folder):
        return None
    logger.info("%s is current", folder)
    return Build.load(folder)


def _failed_log(folder: Path) -> Path:
    """Return where the log of a build that failed stays."""
    return folder.with_name(f"{folder.name}{FAILED_LOG_SUFFIX}")


def _build_engines(engine: Engine, fingerprint: Fingerprint, module: Any, folder: Path) -> dict[Direction, BuiltEngine]:
    """Write the engines of both directions and the build log into a folder."""
    engines = {}
    with (folder / LOG_FILE).open("w", encoding="utf-8") as log:
        for direction in DIRECTIONS:
            builder = _EngineBuilder(engine, direction, fingerprint, module, log)
            engines[direction] = builder.build(folder / f"{direction}.engine")
    return engines


class _EngineBuilder:
    """Builds the engine of one graph."""

    def __init__(
        self, engine: Engine, direction: Direction, fingerprint: Fingerprint, module: Any, log: TextIO
    ) -> None:
        self._engine = engine
        self._direction = direction
        self._fingerprint = fingerprint
        self._module = module
        self._log = log
        self._graph = engine.graph(direction, fingerprint.precision)
        self._errors: list[str] = []
        self._logger = make_logger(module, self._note)

    def _note(self, severity: str, message: str) -> None:
        """Write one line of the build log."""
        line = " ".join(message.split())
        # TensorRT calls this from C++, so it must not raise. A full disk raises an error when the engine is written. A
        # closed file raises ValueError: TensorRT's objects can outlive a failed build, and log when they are deleted.
        with suppress(OSError, ValueError):
            self._log.write(f"[{severity}] {line}\n")
        if severity.endswith("ERROR"):
            self._errors.append(line)

    def build(self, path: Path) -> BuiltEngine:
        """Parse, compile and write the engine to `path`."""
        start = time.perf_counter()
        self._note("INFO", f"building {self._graph.name} for {self._fingerprint.name}")
        builder = self._module.Builder(self._logger)
        # TensorRT 10 needs this flag; later versions are always strongly typed.
        strongly_typed = 1 << int(self._module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(strongly_typed)
        self._parse(network)
        config = self._configure(builder, network)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise self._failure(self._errors or ["no reason given"])
        data = memoryview(plan)
        path.write_bytes(data)
        self._keep_timing_cache(config)
        built = BuiltEngine(
            file=path.name,
            size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            layers=network.num_layers,
            seconds=round(time.perf_counter() - start, 2),
            peak_memory=peak_memory(),
        )
        logger.info(
            "%s: %s layers after parsing, %.0f MB, %.1f s", path.name, built.layers, built.size / 1e6, built.seconds
        )
        return built

    def _parse(self, network: Any) -> None:
        """Read the graph; log every error of the parser with the name of its node."""
        parser = self._module.OnnxParser(network, self._logger)
        # The parser gets the path, so that it finds weights beside the graph.
        if not parser.parse_from_file(utf8_path(self._graph)):
            lines = [_parser_line(parser.get_error(index)) for index in range(parser.num_errors)]
            for line in lines:
                self._note("ERROR", line)
                logger.info("%s: %s", self._graph.name, line)
            raise self._failure(lines or ["the parser gave no reason"])
        kinds = Counter(network.get_layer(index).type.name for index in range(network.num_layers))
        self._note(
            "INFO",
            f"{network.num_layers} layers after parsing: "
            + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()),
        )

    def _failure(self, reasons: list[str]) -> BuildError:
        more = f" and {len(reasons) - 1} more" if len(reasons) > 1 else ""
        name = self._fingerprint.name
        log = _failed_log(self._engine.folder / BUILDS_FOLDER / name)
        return BuildError(
            f"{self._graph}: {self._module.__name__} {self._module.__version__} cannot build it ({reasons[0]}{more}); "
            f"see {log}, or choose --tensorrt off"
        )

    def _configure(self, builder: Any, network: Any) -> Any:
        """Return the settings, with profiles and timing cache."""
        module, spec = self._module, self._engine.spec
        config = builder.create_builder_config()
        # TF32 is on by default and has 10 bits of mantissa. Products of a float32 graph must be float32.
        config.clear_flag(module.BuilderFlag.TF32)
        # With this, a context needs only the memory of the current shape.
        config.set_preview_feature(module.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True)
        # For `samekit info --layers`.
        config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
        name = network.get_input(0).name
        for profile in profiles_of(spec, self._direction):
            shapes = zip(profile.batch, profile.latents, strict=True)
            optimisation = builder.create_optimization_profile()
            optimisation.set_shape(name, *(spec.input_shape(self._direction, *shape) for shape in shapes))
            if config.add_optimization_profile(optimisation) < 0:
                raise self._failure([f"profile {profile} refused"])
        self._attach_timing_cache(config)
        return config

    @property
    def _timing_path(self) -> Path | None:
        """The user's timing cache for this version and GPU; None for TensorRT-RTX, which measures nothing."""
        fingerprint = self._fingerprint
        if fingerprint.flavour != TENSORRT:
            return None
        return engine_roots()[-1] / ".timing" / f"{TENSORRT}-{fingerprint.version}-{fingerprint.target}.cache"

    def _attach_timing_cache(self, config: Any) -> None:
        """Reuse the times that were measured for other models; start an empty cache if that is not possible."""
        path = self._timing_path
        if path is None:
            return
        known = b""
        try:
            if path.is_file():
                known = path.read_bytes()
        except OSError as error:
            self._note("WARNING", f"the timing cache cannot be read ({error})")
        for data in (known, b""):
            cache = config.create_timing_cache(data)
            if cache is not None and config.set_timing_cache(cache, False):
                return
        self._note("WARNING", f"no timing cache could be attached ({path})")

    def _keep_timing_cache(self, config: Any) -> None:
        """Save the measured times; if they cannot be written, the engine is valid without them."""
        path = self._timing_path
        cache = config.get_timing_cache() if path else None
        if path is None or cache is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                temporary.write_bytes(memoryview(cache.serialize()))
        except OSError as error:
            self._note("WARNING", f"the timing cache is not kept ({error})")


def _parser_line(error: Any) -> str:
    """Describe an error of the parser in one line: operator, node, reason."""
    return " ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}".split())


def peak_memory() -> int | None:
    """Return the most bytes of memory that this process has held, or None if the system does not report it."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
