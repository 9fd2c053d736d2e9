"""Every exception that Milepost raises, in one tree.

::

    MilepostError                                 kind
    ├── MisconfigurationException (ValueError)      misconfiguration    arguments that cannot work
    ├── MissingDependencyError (ModuleNotFoundError) missing_dependency  an optional package is missing
    ├── ResumeError (RuntimeError)                 resume              sound, but does not fit this run
    ├── RankFailedError (RuntimeError)             rank_failed         another rank failed, or did not take part
    └── CheckpointError                            checkpoint
        ├── CheckpointNotFoundError (FileNotFoundError)  not_found    nothing is there
        ├── CheckpointFormatError (ValueError)     format             no checkpoint, or a newer one
        ├── CheckpointCorruptError (ValueError)    corrupt            a digest does not hold
        ├── UnsafeCheckpointError (ValueError)     unsafe             loading it would run code
        ├── UnencodableValueError (TypeError)      unencodable        cannot be stored as data
        ├── CheckpointSaveError (OSError)          save_failed        did not become durable
        └── CheckpointRemoveError (OSError)        remove_failed      could not be removed

    SIGTERMException (SystemExit)                  a signal asked the run to stop

A caller tells cases apart by type or by the stable string ``kind``; each error is also the builtin that a caller would
catch for the same mishap elsewhere.
"""

from __future__ import annotations

from typing import ClassVar


class MilepostError(Exception):
    """Root of the tree."""

    kind: ClassVar[str] = "milepost"


class MisconfigurationException(MilepostError, ValueError):
    """Arguments that contradict each other or cannot work. The name is the one Lightning users catch."""

    kind = "misconfiguration"


class MissingDependencyError(MilepostError, ModuleNotFoundError):
    """An optional package is not installed. The message names the extra to install."""

    kind = "missing_dependency"


class ResumeError(MilepostError, RuntimeError):
    """The checkpoint is sound, but its contents do not fit this model, optimizer or loader."""

    kind = "resume"


class CheckpointError(MilepostError):
    """Something is wrong with a checkpoint, or with writing one."""

    kind = "checkpoint"


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """Nothing at that path."""

    kind = "not_found"


class CheckpointFormatError(CheckpointError, ValueError):
    """What is at the path is not a checkpoint this version can read."""

    kind = "format"


class CheckpointCorruptError(CheckpointError, ValueError):
    """A stored digest does not match the bytes.

    Attributes:
        path: the file.
        tensor: key path of the first damaged tensor, or None when the damage lies outside any tensor.
        byte_range: half-open ``(start, stop)`` of the first damaged piece in the file, in bytes, or None.
    """

    kind = "corrupt"

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        tensor: str | None = None,
        byte_range: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(message)
        self.path = path
        self.tensor = tensor
        self.byte_range = byte_range


class UnsafeCheckpointError(CheckpointError, ValueError):
    """Loading the file would run code that it names.

    Attributes:
        path: the file.
        key_path: where in the checkpoint the refused value stands, such as ``hyper_parameters.transform``.
    """

    kind = "unsafe"

    def __init__(self, message: str, *, path: str | None = None, key_path: str | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.key_path = key_path


class UnencodableValueError(CheckpointError, TypeError):
    """A value cannot be stored as data.

    Attributes:
        key_path: where in the checkpoint the value stands.
    """

    kind = "unencodable"

    def __init__(self, message: str, *, key_path: str | None = None) -> None:
        super().__init__(message)
        self.key_path = key_path


class CheckpointSaveError(CheckpointError, OSError):
    """A save did not become durable; there is no new checkpoint at the path and what was there before is intact.

    Attributes:
        path: the destination.
        step: ``global_step`` of the checkpoint, or None where it has none.
        rank: that failed, where several save together; None where one saves alone.
        others: further saves in the background that failed and are reported with this one.
    """

    kind = "save_failed"

    def __init__(
        self, message: str, *, path: str | None = None, step: int | None = None, rank: int | None = None
    ) -> None:
        super().__init__(message)
        self.path = path
        self.step = step
        self.rank = rank
        self.others: tuple[CheckpointSaveError, ...] = ()


class CheckpointRemoveError(CheckpointError, OSError):
    """A checkpoint could not be removed, or not all of it. The message says which.

    Attributes:
        path: the checkpoint.
    """

    kind = "remove_failed"

    def __init__(self, message: str, *, path: str | None = None) -> None:
        super().__init__(message)
        self.path = path


class RankFailedError(MilepostError, RuntimeError):
    """Another rank failed, or did not take part, in what all ranks do together.

    Attributes:
        rank: which.
    """

    kind = "rank_failed"

    def __init__(self, message: str, *, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class SIGTERMException(SystemExit):
    """A signal asked the run to stop. Raised by the loop at a step boundary, never inside a signal handler.

    Uncaught, it ends the process with status 128 + signal.
    """
