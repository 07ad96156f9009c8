"""Every error that samekit raises on purpose; each message names the cause and the cure.

    SamekitError
    ├── InputError             (ValueError)         an array or option that cannot be used: rank, dtype, NaN, range
    ├── AudioFileError         (ValueError)         a file that is no readable audio, or is empty or damaged
    ├── LatentsFileError       (ValueError)         a file that holds no latents, or those of another model
    ├── OutputError            (OSError)            the result cannot be written
    ├── CheckpointError        (ValueError)         a checkpoint that is missing, incomplete or not implemented
    ├── EngineError            (RuntimeError)       an engine folder that is damaged, half-written or stale
    │   ├── EngineNotFoundError  (FileNotFoundError)  there is no engine folder of that name
    │   └── StaleEngineError                        a TensorRT engine that is damaged or was built from something else
    ├── BuildError             (RuntimeError)       TensorRT cannot build an engine of a graph
    ├── BackendError           (RuntimeError)       a backend failed while it ran
    │   └── BackendUnavailableError (ImportError)   a backend cannot be used here: package, driver or graph missing
    ├── NonFiniteError         (ArithmeticError)    a model produced NaN or infinity
    └── VerificationError      (ArithmeticError)    an exported graph does not equal eager PyTorch

The command line prints the message of a SamekitError on one line and exits with code 2.
"""

from __future__ import annotations


def first_line(error: Exception) -> str:
    """The first line of another library's message, or the error's name, to be quoted in a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class SamekitError(Exception):
    """Base of every error raised on purpose; its message is `CAUSE; CURE`."""

    @property
    def cause(self) -> str:
        """The message without its cure, for whoever knows a better one."""
        cause, separator, cure = str(self).rpartition("; ")
        return cause if separator else cure


class InputError(SamekitError, ValueError):
    """An argument that cannot be used as given."""


class AudioFileError(SamekitError, ValueError):
    """A file from which no audio can be read."""


class LatentsFileError(SamekitError, ValueError):
    """A file from which no latents of this model can be read."""


class OutputError(SamekitError, OSError):
    """A result that cannot be written."""


class CheckpointError(SamekitError, ValueError):
    """A checkpoint that cannot be loaded exactly as it is meant."""


class EngineError(SamekitError, RuntimeError):
    """An engine folder that cannot be used."""


class EngineNotFoundError(EngineError, FileNotFoundError):
    """No engine folder where one was asked for."""


class StaleEngineError(EngineError):
    """A TensorRT engine that is damaged, or was built from or for something else than what it lies beside."""


class BuildError(SamekitError, RuntimeError):
    """A graph of which TensorRT cannot build an engine."""


class BackendError(SamekitError, RuntimeError):
    """A backend that failed while it ran."""


class BackendUnavailableError(BackendError, ImportError):
    """A backend that cannot be opened on this machine."""


class NonFiniteError(SamekitError, ArithmeticError):
    """NaN or infinity in the output of a model."""


class VerificationError(SamekitError, ArithmeticError):
    """An exported graph that does not compute what eager PyTorch computes."""
