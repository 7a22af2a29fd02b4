"""The exceptions of meswitch, one class per cause.

Operating-system failures (a missing file, a full disk) stay Python's own `OSError` family.
"""

from __future__ import annotations


def fresh(error: BaseException) -> BaseException:
    """A copy of an error for another caller to raise: no two threads raise one object, and a copy keeps no frames
    alive, nor what is in them.

    >>> again = fresh(BudgetError("expected 2, found 3", hint="take one away"))
    >>> type(again).__name__, again.hint, again.__traceback__
    ('BudgetError', 'take one away', None)
    """
    import copy  # here, so that the command has its signals before it imports much

    try:
        other = copy.copy(error)
    except Exception:  # of a class that cannot be made from what it holds
        other = MeswitchError(f"{type(error).__name__}: {error}")
    other.__cause__ = None if error.__cause__ is None else fresh(error.__cause__)
    return other


class MeswitchError(Exception):
    """Anything meswitch refuses or finds broken.

    `hint` is the remedy, shown on a line of its own.

    >>> print(MeswitchError("expected 2, found 3", hint="take one away"))
    expected 2, found 3
    hint: take one away
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class FormatError(MeswitchError):
    """A delta directory that is not one: a missing or malformed file, tensor or field."""


class ChecksumError(FormatError):
    """Bytes of a delta directory that are not the bytes that were written."""


class CheckpointError(MeswitchError):
    """A folder that is not a whole Hugging Face checkpoint, or not a whole adapter."""


class ArchitectureError(MeswitchError):
    """A fine-tune, or an adapter, whose parameters do not match the base's."""


class BaseMismatchError(MeswitchError):
    """A delta that was made against another base."""


class NonFiniteError(MeswitchError):
    """A NaN or an infinity in a weight."""


class OutputError(MeswitchError):
    """A place where nothing can be written: something else is there, or another process writes to it."""


class BudgetError(MeswitchError):
    """Something that cannot fit the bytes it was given. `least`: the bytes that would do, where they are known."""

    def __init__(self, message: str, *, hint: str | None = None, least: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.least = least


class ExpertNotFoundError(MeswitchError, KeyError):
    """A request for an expert that is not there (or no longer)."""


class ExpertNameError(MeswitchError, ValueError):
    """An expert's name or folder that is not safe to use."""


class UnsupportedModelError(MeswitchError):
    """A model, a site of one or an adapter that cannot be served correctly."""


class TransformersVersionError(MeswitchError):
    """The installed transformers does not do what continuous batching relies on."""


class RequestError(MeswitchError, ValueError):
    """A request that cannot be run: an empty prompt, a bad number, a prompt too long."""


class RequestTimeoutError(MeswitchError, TimeoutError):
    """A request that had not ended when its `timeout` was over."""


class RequestCancelledError(MeswitchError):
    """A request that was cancelled before it had ended."""


class OverloadedError(MeswitchError):
    """More requests than may wait (`max_waiting`); later there may be room."""


class EngineClosedError(MeswitchError):
    """A call of an engine that was closed, or that belongs to the process which this one was forked from."""

    def __init__(
        self,
        message: str = "the engine is closed",
        *,
        hint: str | None = "make a new Engine; a forked process needs one of its own",
    ) -> None:
        super().__init__(message, hint=hint)


class DataError(MeswitchError, ValueError):
    """A data file that cannot be read as what it should be."""


class DataWarning(UserWarning):
    """Something of a data file that is not used."""


class RouterError(MeswitchError):
    """A router that is missing, malformed, or made for another base."""


class BackendError(MeswitchError, ValueError):
    """Kernels, an instruction set (`MESWITCH_BACKEND`) or a device that is unknown, or that this machine lacks."""


class MissingPackageError(MeswitchError, ImportError):
    """Something that needs a package which is optional and not installed."""


class CudaUnavailableError(MeswitchError):
    """`device="cuda"` where there is none."""
