"""Compile one ONNX graph to a TensorRT engine: parser, settings of the builder, profiles and timing cache."""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from samekit.engine.builds import BuiltEngine
from samekit.engine.fingerprint import FROM_AMPERE, SAME_CAPABILITY, TENSORRT, THIS_GPU, profiles_of
from samekit.engine.folder import engine_roots
from samekit.errors import BuildError
from samekit.files.atomic import atomic_path
from samekit.files.paths import utf8_path
from samekit.tensorrt.flavours import make_logger

if TYPE_CHECKING:
    from pathlib import Path
    from typing import TextIO

    from samekit.engine.fingerprint import Fingerprint
    from samekit.engine.folder import Engine
    from samekit.engine.spec import Direction

logger = logging.getLogger(__name__)


class EngineBuilder:
    """Builds the engine of one graph.

    Args:
        engine: the engine folder with the graph.
        direction: the graph's.
        fingerprint: what to build; its flavour is that of `module`.
        module: `tensorrt` or `tensorrt_rtx`.
        log: takes what TensorRT says, a line for each message.
        failed_log: where the log will be if the build fails, for the error.
    """

    def __init__(
        self,
        engine: Engine,
        direction: Direction,
        fingerprint: Fingerprint,
        module: Any,
        log: TextIO,
        failed_log: Path,
    ) -> None:
        self._engine = engine
        self._direction = direction
        self._fingerprint = fingerprint
        self._module = module
        self._log = log
        self._failed_log = failed_log
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
        """Parse, compile and write the engine to `path`.

        Raises:
            BuildError: TensorRT cannot parse or compile the graph.
            OSError: the engine cannot be written.
        """
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
        return BuildError(
            f"{self._graph}: {self._module.__name__} {self._module.__version__} cannot build it ({reasons[0]}{more}); "
            f"see {self._failed_log}, or choose --tensorrt off"
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
        options = self._fingerprint.options
        if options.level is not None:
            config.builder_optimization_level = options.level
        if options.hardware != THIS_GPU:
            levels = module.HardwareCompatibilityLevel
            wanted = {SAME_CAPABILITY: levels.SAME_COMPUTE_CAPABILITY, FROM_AMPERE: levels.AMPERE_PLUS}
            config.hardware_compatibility_level = wanted[options.hardware]
        if options.later_versions:
            config.set_flag(module.BuilderFlag.VERSION_COMPATIBLE)
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
