import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypedDict, final

import numpy as np
import numpy.typing as npt
from typing_extensions import Self, Unpack

__all__ = [
    "Engine",
    "Image",
    "Stream",
    "Strip",
    "__version__",
    "export",
    "load_checkpoint",
    "main",
]

__version__: str

_Path: TypeAlias = str | os.PathLike[str]
_Class: TypeAlias = int | str | None

class _Settings(TypedDict, total=False):
    class_: _Class
    classes: str | None
    tokens: int | None
    width: int | None
    seed: int | None
    guidance_scale: float | None
    guidance_schedule: Literal["linear", "constant"] | None
    solver: str | None
    num_inference_steps: int | None
    tile: int | str | None
    overlap: int | None

class _Outpainting(_Settings, total=False):
    direction: Literal["left", "right"] | None
    keep_prefix_pixels: bool | None

@final
class Engine:

    @classmethod
    def from_bundle(
        cls,
        bundle: _Path,
        *,
        backend: Literal["auto", "trt", "ort", "candle"] = "auto",
        threads: int | None = None,
        providers: Sequence[str] | None = None,
        provider_library: _Path | None = None,
        device: str | None = None,
        cuda_graph: bool = False,
        max_batch: int = 16,
    ) -> Engine: ...
    def generate(
        self,
        *,
        callback: Callable[[int, int], object] | None = None,
        progress: bool = False,
        **settings: Unpack[_Settings],
    ) -> Image: ...
    def outpaint(
        self,
        photo: Any,
        *,
        callback: Callable[[int, int], object] | None = None,
        progress: bool = False,
        **settings: Unpack[_Outpainting],
    ) -> Image: ...
    def stream(self, *, photo: Any = None, **settings: Unpack[_Outpainting]) -> Stream: ...
    def submit(self, **settings: Unpack[_Settings]) -> Future[Image]: ...
    def submit_job(self, job: str) -> tuple[str, Future[Image]]: ...
    def encode(self, photo: Any) -> npt.NDArray[np.float32]: ...
    def decode(self, latents: Any) -> Image: ...
    def close(self) -> None: ...
    @property
    def bundle(self) -> os.PathLike[str]: ...
    @property
    def backend(self) -> str: ...
    @property
    def closed(self) -> bool: ...
    @property
    def class_names(self) -> list[str]: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def token_width(self) -> int: ...
    @property
    def embed_dim(self) -> int: ...
    @property
    def precision(self) -> str: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        *exception: type[BaseException] | BaseException | TracebackType | None,
    ) -> None: ...
    def __reduce__(self) -> tuple[Any, tuple[Any]]: ...

@final
class Image:
    @property
    def pixels(self) -> npt.NDArray[np.uint8]: ...
    @property
    def tokens(self) -> npt.NDArray[np.float32] | None: ...
    @property
    def settings(self) -> dict[str, Any] | None: ...
    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    def files(self, name: str) -> tuple[bytes, str]: ...
    def to_pil(self) -> Any: ...
    def save(self, path: _Path) -> None: ...
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]: ...
    def __dlpack__(self, **options: Any) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def _repr_png_(self) -> bytes: ...

@final
class Strip:
    @property
    def x(self) -> int: ...
    @property
    def pixels(self) -> npt.NDArray[np.uint8]: ...
    def to_pil(self) -> Any: ...
    def _repr_png_(self) -> bytes: ...

@final
class Stream(Iterator[Strip]):
    @property
    def total(self) -> int: ...
    @property
    def image(self) -> Image | None: ...
    def amend(self, *, class_: _Class = None, classes: str | None = None) -> int | None: ...
    def close(self) -> None: ...
    def __iter__(self) -> Self: ...
    def __next__(self) -> Strip: ...

def load_checkpoint(
    path: _Path,
    *,
    part: Literal["generator", "tokenizer"] | None = None,
    weights: Literal["ema", "raw"] | None = None,
    heads: int | None = None,
) -> dict[str, npt.NDArray[np.float32]]: ...

def export(*, output: _Path, **options: Any) -> os.PathLike[str]: ...

def main(arguments: Sequence[str]) -> int: ...
