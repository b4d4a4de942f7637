"""Equivariant Image Modeling: images of any length, column by column, from one seed."""

from . import _open as _open
from ._eqim import Engine, Image, Stream, Strip, __version__, export, load_checkpoint
from .errors import ChangedError, ClosedError, EqimError, InputError, NotFoundError, RunError

__all__ = [
    "ChangedError",
    "ClosedError",
    "Engine",
    "EqimError",
    "Image",
    "InputError",
    "NotFoundError",
    "RunError",
    "Stream",
    "Strip",
    "__version__",
    "export",
    "load_checkpoint",
]
