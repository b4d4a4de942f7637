"""Images with Ray: a class for ``ray.data.Dataset.map_batches``. It needs pyarrow, and does not import Ray itself."""

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from ._eqim import Engine, Image
from .errors import InputError, RunError

__all__ = ["Generator", "Result", "keywords", "message"]

Job: TypeAlias = Mapping[str, Any]

# The settings of a job, in the order of the records of eqim-run.
_SETTINGS = (
    "class",
    "classes",
    "tokens",
    "width",
    "seed",
    "cfg",
    "cfg_schedule",
    "solver",
    "steps",
    "prefix",
    "direction",
    "keep_prefix_pixels",
    "tile",
    "overlap",
)
# Settings whose keyword in Python has another name.
_KEYWORDS = {
    "class": "class_",
    "cfg": "guidance_scale",
    "cfg_schedule": "guidance_schedule",
    "steps": "num_inference_steps",
}
# Length of an image with a prefix, if the job gives none. eqim-run counts the prefix.
_TOKENS = 16

_COLUMNS = pa.schema(
    [("id", pa.string()), ("image", pa.binary()), ("record", pa.string()), ("error", pa.string())]
)


class Result(NamedTuple):
    """What became of a job: an image with its record, or an error."""

    id: str
    """Id of the job."""
    image: bytes | None
    """The image as a PNG."""
    record: dict[str, Any] | None
    """What ``eqim-run --jobs`` writes beside the image: all settings, and the hashes of the weights and of the image."""
    error: str | None
    """Why there is no image: the job names a setting that does not fit."""


class Generator:
    """Generates the images of jobs. Ray Data makes one object per actor, and each opens the bundle once.

    A job is a row whose columns are ``id`` and the keys of a line of ``eqim-run --jobs``: ``class``, ``classes``, ``tokens``,
    ``width``, ``seed``, ``cfg``, ``cfg_schedule``, ``solver``, ``steps``, ``prefix``, ``direction``, ``keep_prefix_pixels``,
    ``tile``, ``overlap``. A value that is missing takes its default.

    Parameters
    ----------
    bundle
        Folder of the bundle, on every node.
    **options
        Keywords of `Engine.from_bundle`. In an actor of Ray, ``threads`` is the number of its CPUs by default.

    Examples
    --------
    ::

        jobs = ray.data.read_parquet("jobs.parquet", override_num_blocks=100)
        images = jobs.map_batches(
            eqim.ray.Generator,
            fn_constructor_kwargs={"bundle": "/shared/bundle", "max_batch": 8},
            batch_format="pyarrow",
            batch_size=64,
            compute=ray.data.ActorPoolStrategy(size=4),
            num_cpus=2,
        )
        images.write_parquet("/shared/images")
    """

    def __init__(self, bundle: str | os.PathLike[str], **options: Any) -> None:
        options.setdefault("threads", _cpus_of_actor())
        self.engine = Engine.from_bundle(bundle, **options)
        manifest = json.loads((Path(bundle) / "config.json").read_text("utf-8"))
        self.weights: str = manifest["weights"]["sha256"]
        # Images with a prefix are not submitted: they wait here.
        self._threads = ThreadPoolExecutor(options.get("max_batch", 16))

    def __call__(self, batch: Any) -> pa.Table:
        """Generate the images of a batch of Ray Data, in the format ``"pyarrow"``, ``"numpy"`` or ``"pandas"``.

        Returns
        -------
        pyarrow.Table
            A row for each job, in the order of the batch: ``id``; ``image``, a PNG; ``record`` as JSON; ``error``. Image and
            record are null if the error is not.
        """
        jobs = _rows(batch)
        results = {result.id: result for result in self.generate(jobs)}
        ordered = (results[str(job["id"])] for job in jobs)
        rows = [{**result._asdict(), "record": result.record and json.dumps(result.record)} for result in ordered]
        return pa.Table.from_pylist(rows, schema=_COLUMNS)

    def generate(self, jobs: Iterable[Job]) -> Iterator[Result]:
        """Generate the images of jobs, and iterate over them as they are completed.

        All jobs are submitted at once and share batches. A job whose settings do not fit gives its error.

        Raises
        ------
        RunError
            If the engine fails. It is raised after the images that could be completed.
        """
        started: dict[Future[Image], tuple[Job, str | None]] = {}
        failure: RunError | None = None
        try:
            for job in jobs:
                try:
                    future, prefix = self._start(job)
                    started[future] = job, prefix
                except InputError as error:
                    yield _failed(job, error)
            for future in as_completed(started):
                job, prefix = started[future]
                try:
                    yield self._completed(job, prefix, future.result())
                except InputError as error:
                    yield _failed(job, error)
                except RunError as error:
                    failure = failure or error
        finally:
            for future in started:
                future.cancel()
        if failure:
            raise failure

    def _start(self, job: Job) -> tuple[Future[Image], str | None]:
        """Start a job. Returns its image to be, and the hash of its prefix."""
        settings = keywords(job)
        path = settings.pop("prefix", None)
        if path is None:
            return self.engine.submit(**settings), None
        if "tokens" not in settings and "width" not in settings:
            settings["tokens"] = _TOKENS
        prefix = _hash_of_prefix(path)
        return self._threads.submit(self.engine.outpaint, path, **settings), prefix

    def _completed(self, job: Job, prefix: str | None, image: Image) -> Result:
        """An image and its record."""
        png, name = image._repr_png_(), str(job["id"])
        settings = {key: (image.settings or {}).get(key) for key in _SETTINGS}
        record: dict[str, Any] = {**settings, "weights": self.weights}
        if prefix is not None:
            record |= {"prefix": os.fspath(job["prefix"]), "prefix_sha256": prefix}
        record["image"] = {"file": f"{name}.png", "bytes": len(png), "sha256": hashlib.sha256(png).hexdigest()}
        return Result(name, png, record, None)


def keywords(job: Job) -> dict[str, Any]:
    """Keywords of `Engine.submit` for the settings of a job. Missing values and the id are left out.

    Raises
    ------
    InputError
        If the job is not a mapping, or a key is not a setting.
    """
    if not isinstance(job, Mapping):
        raise InputError(f"a job is {job!r}, expected an object with settings")
    given = {key: value for key, value in job.items() if key != "id" and value is not None}
    for key in given.keys() - set(_SETTINGS):
        raise InputError(f"{key}: is not a setting, expected one of {', '.join(sorted(_SETTINGS))}")
    return {_KEYWORDS.get(key, key): value for key, value in given.items()}


def message(error: InputError) -> str:
    """Message of an error about a job. It names settings as the job does."""
    text = str(error)
    for key, keyword in _KEYWORDS.items():
        if text.startswith(f"{keyword} "):
            return key + text.removeprefix(keyword)
    return text


def _failed(job: Job, error: InputError) -> Result:
    """The error of a job."""
    return Result(str(job["id"]), None, None, message(error))


def _rows(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch."""
    if isinstance(batch, pa.Table):
        rows = batch.to_pylist()
    else:
        names = list(batch)
        rows = [dict(zip(names, values, strict=True)) for values in zip(*(batch[name] for name in names), strict=True)]
    rows = [{key: _plain(value) for key, value in row.items()} for row in rows]
    if any(row.get("id") is None for row in rows):
        raise InputError("a job has no id: expected a column id without nulls")
    return rows


def _plain(value: Any) -> Any:
    """A value of NumPy or Pandas as one of JSON. They have no integers that can be missing: these are floats, or NaN."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def _hash_of_prefix(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file."""
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError as error:
        raise InputError(f"prefix {error.filename}: {error.strerror}") from error


def _cpus_of_actor() -> int | None:
    """Number of CPUs of the actor of Ray that calls this."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 0)
    return max(1, math.ceil(cpus)) if cpus else None
