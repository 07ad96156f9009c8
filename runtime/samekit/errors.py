"""The errors that samekit raises on purpose. Each message names the cause and the cure.

    SamekitError
    ├── InputError             (ValueError)         an array, path or option cannot be used: rank, dtype, NaN, range
    ├── AudioFileError         (ValueError)         a file is not readable audio, or is empty or damaged
    ├── LatentsFileError       (ValueError)         a file holds no latents, or those of another model
    ├── OutputError            (OSError)            a result cannot be written
    ├── CheckpointError        (ValueError)         a checkpoint is missing, incomplete or not supported
    ├── EngineError            (RuntimeError)       an engine folder is damaged, incomplete or stale
    │   ├── EngineNotFoundError  (FileNotFoundError)  there is no engine folder of this name
    │   └── StaleEngineError                        a TensorRT engine is damaged, wrong, or built from something else
    ├── HubError               (OSError)            the Hugging Face hub cannot be reached, or refuses
    ├── BuildError             (RuntimeError)       TensorRT cannot build an engine of a graph
    ├── BackendError           (RuntimeError)       a backend failed while it ran
    │   └── BackendUnavailableError (ImportError)   a backend cannot be used here: package, driver or graph missing
    ├── NonFiniteError         (ArithmeticError)    a model produced NaN or infinity
    └── VerificationError      (ArithmeticError)    a graph or engine does not compute what it was made from

The command line prints the message of a SamekitError on one line and exits with code 2.
"""

from __future__ import annotations


def first_line(error: Exception) -> str:
    """Return the first line of another library's message, or the error's class name if it has no message."""
    return _lines(error)[0]


def last_line(error: Exception) -> str:
    """Return the last line of a message, as `first_line`; lines before it may name lines of the library's sources."""
    return _lines(error)[-1]


def _lines(error: Exception) -> list[str]:
    return str(error).strip().splitlines() or [type(error).__name__]


class SamekitError(Exception):
    """Base of every error that samekit raises on purpose; its message is `CAUSE; CURE`."""

    @property
    def cause(self) -> str:
        """The message without its cure, for callers that know a better one."""
        cause, separator, cure = str(self).rpartition("; ")
        return cause if separator else cure


class InputError(SamekitError, ValueError):
    """An argument cannot be used."""


class AudioFileError(SamekitError, ValueError):
    """No audio can be read from a file."""


class LatentsFileError(SamekitError, ValueError):
    """No latents of this model can be read from a file."""


class OutputError(SamekitError, OSError):
    """A result cannot be written."""


class CheckpointError(SamekitError, ValueError):
    """A checkpoint cannot be loaded exactly."""


class EngineError(SamekitError, RuntimeError):
    """An engine folder cannot be used."""


class EngineNotFoundError(EngineError, FileNotFoundError):
    """There is no engine folder of this name."""


class StaleEngineError(EngineError):
    """A TensorRT engine is damaged, computes wrong values, or was built from another graph or for another machine."""


class HubError(SamekitError, OSError):
    """The Hugging Face hub cannot be reached, lacks what was asked for, or refuses."""


class BuildError(SamekitError, RuntimeError):
    """TensorRT cannot build an engine of a graph."""


class BackendError(SamekitError, RuntimeError):
    """A backend failed while it ran."""


class BackendUnavailableError(BackendError, ImportError):
    """A backend cannot be opened on this machine."""


class NonFiniteError(SamekitError, ArithmeticError):
    """A model produced NaN or infinity."""


class VerificationError(SamekitError, ArithmeticError):
    """A graph does not compute what eager PyTorch computes, or an engine not what its graph computes."""
