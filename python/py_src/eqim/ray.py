"""Images with Ray: a class for ``ray.data.Dataset.map_batches``. It needs pyarrow, and does not import Ray itself."""

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, as_completed
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from ._eqim import Engine, Image
from .errors import InputError, RunError

__all__ = ["Generator", "Result"]

Job: TypeAlias = Mapping[str, Any]

_COLUMNS = pa.schema(
    [("id", pa.string()), ("image", pa.binary()), ("record", pa.string()), ("error", pa.string())]
)


class Result(NamedTuple):
    """What became of a job: an image with its record, or an error."""

    id: str
    """Id of the job."""
    image: bytes | None
    """The image as a PNG."""
    record: str | None
    """What ``eqim-run --jobs`` writes beside the image, as JSON: all settings, and the hashes of the weights and of the image."""
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
        return pa.Table.from_pylist([result._asdict() for result in ordered], schema=_COLUMNS)

    def generate(self, jobs: Iterable[Job]) -> Iterator[Result]:
        """Generate the images of jobs, and iterate over them as they are completed.

        All jobs are submitted at once and share batches. A job whose settings do not fit gives its error.

        Raises
        ------
        RunError
            If the engine fails. It is raised after the images that could be completed.
        """
        started: dict[Future[Image], str] = {}
        failure: RunError | None = None
        try:
            for job in jobs:
                try:
                    name, future = self.engine.submit_job(_text(job))
                    started[future] = name
                except InputError as error:
                    yield Result(str(job["id"]), None, None, str(error))
            for future in as_completed(started):
                try:
                    image, record = future.result().files(started[future])
                    yield Result(started[future], image, record, None)
                except InputError as error:
                    yield Result(started[future], None, None, str(error))
                except RunError as error:
                    failure = failure or error
        finally:
            for future in started:
                future.cancel()
        if failure:
            raise failure


def _text(job: Job) -> str:
    """A job as a line of ``eqim-run --jobs``."""
    if not isinstance(job, Mapping):
        raise InputError(f"a job is {job!r}, expected an object with settings")
    return json.dumps({key: value for key, value in job.items() if value is not None}, default=os.fspath)


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


def _cpus_of_actor() -> int | None:
    """Number of CPUs of the actor of Ray that calls this."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 0)
    return max(1, math.ceil(cpus)) if cpus else None
