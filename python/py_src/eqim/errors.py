"""The exceptions of eqim."""


class EqimError(Exception):
    """The base of all exceptions of eqim."""


class InputError(EqimError, ValueError):
    """An argument, a file or a model that cannot be used. The message names it, and what was expected."""


class NotFoundError(InputError, FileNotFoundError):
    """A file or folder that does not exist."""


class RunError(EqimError, RuntimeError):
    """A run that failed, though its input is valid: a full disk, a missing library, an engine that failed."""


class ClosedError(RunError):
    """An engine that was closed, or that another process has opened."""


class ChangedError(RunError):
    """A bundle whose files have changed since it was opened."""
