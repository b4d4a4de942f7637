"""Generate the images of many jobs with Ray, on all nodes of a cluster.

JOBS is a file for `eqim-run --jobs`, or a Parquet file with the same keys as columns. OUTPUT is a folder that all nodes
share. A job becomes ID.png and its record ID.json, as with `eqim-run --jobs`. If the name of OUTPUT ends in .parquet, the
images and records are rows of Parquet files in it.

A repeated run generates only the images that are missing. A job is known by its id: a job that changes needs another one.
"""

import argparse
import hashlib
import io
import json
import math
import os
import re
import sys
import uuid
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from eqim.ray import Generator

Job = dict[str, Any]
# What is printed about a job.
Line = dict[str, str]
IMAGES = pa.schema([("id", pa.string()), ("image", pa.binary()), ("record", pa.string())])
REPORT = pa.schema([("id", pa.string()), ("file", pa.string()), ("error", pa.string())])


def main() -> int:
    """Run the program. Returns its exit code: 1 if jobs failed."""
    arguments = parse()
    output: Path = arguments.output
    jobs, refused = read_jobs(arguments.jobs)
    output.mkdir(parents=True, exist_ok=True)
    # Of processes that were killed.
    for part in output.glob(".*.part"):
        part.unlink()
    done = rows_done(output) if is_parquet(output) else images_done(output, jobs, arguments.bundle)
    left = [job for name, job in jobs.items() if name not in done]
    count = {"file": 0, "error": 0}
    # Ray prints messages until the process ends. Only the reports go to standard output.
    reports, sys.stdout = sys.stdout, sys.stderr
    for line in chain(refused, generated(left, arguments)):
        print(json.dumps(line), file=reports, flush=True)
        count["error" if "error" in line else "file"] += 1
    before = len(jobs) - len(left)
    print(f"{count['file']} jobs done, {before} done before, {count['error']} failed", file=sys.stderr)
    return 1 if count["error"] else 0


def parse() -> argparse.Namespace:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("bundle", type=place, metavar="BUNDLE", help="folder of the bundle, at the same place on every node")
    add("jobs", type=place, metavar="JOBS", help="file of jobs: .jsonl or .parquet")
    add("output", type=place, metavar="OUTPUT", help="folder for the images, shared by all nodes")
    add("--workers", type=int, default=1, metavar="N", help="processes, each with the model [default: %(default)s]")
    add("--cpus", type=int, default=1, metavar="N", help="CPUs of a worker, and threads of its model [default: %(default)s]")
    add("--gpus", type=float, metavar="N", help="GPUs of a worker")
    add("--backend", default="auto", help="library that runs the model: auto, trt, ort or candle [default: %(default)s]")
    add("--max-batch", type=int, default=1, metavar="N", help="most images in a batch of the model [default: %(default)s]")
    add("--task", type=int, default=64, metavar="N", help="jobs that a worker gets at a time [default: %(default)s]")
    return parser.parse_args()


def place(path: str) -> Path:
    """A path that is valid in workers, which have other working folders."""
    return Path(path).resolve()


def is_parquet(path: Path) -> bool:
    """Whether a file or folder is named as Parquet."""
    return path.suffix == ".parquet"


# Jobs.


def read_jobs(path: Path) -> tuple[dict[str, Job], list[Line]]:
    """Read the jobs of a file by their ids, and the reports of those that cannot be used."""
    jobs: dict[str, Job] = {}
    refused = []
    for number, row in rows_of(path):
        name = str(number)
        try:
            job = json.loads(row) if isinstance(row, str) else row
            name = id_of(job, name)
            if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}", name):
                raise ValueError(f"id: is {name!r}, expected letters, digits, '.', '_' and '-': it names the image")
            if name in jobs:
                raise ValueError("id: is the id of an earlier job")
            jobs[name] = {**job, "id": name}
        except ValueError as error:
            refused.append({"id": name, "error": f"{path} line {number}: {error}"})
    return jobs, refused


def rows_of(path: Path) -> Iterator[tuple[int, str | Job]]:
    """The rows of a Parquet file, or the lines of a text, with their numbers from 1."""
    if is_parquet(path):
        yield from enumerate(pq.read_table(path).to_pylist(), 1)
    else:
        with path.open(encoding="utf-8-sig") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def id_of(job: Any, default: str) -> str:
    """The id of a job."""
    if not isinstance(job, dict):
        raise ValueError("is not a JSON object")
    name = job.get("id")
    if name is None:
        return default
    if isinstance(name, bool) or not isinstance(name, int | str):
        raise ValueError(f"id: is {json.dumps(name)}, expected text or a whole number")
    return str(name)


def images_done(output: Path, names: Iterable[str], bundle: Path) -> set[str]:
    """The jobs whose image is in a folder, complete and from these weights. Records of other images are removed."""
    weights = json.loads((bundle / "config.json").read_text("utf-8"))["weights"]["sha256"]
    done = set()
    for name in names:
        record = output / f"{name}.json"
        try:
            known = json.loads(record.read_text("utf-8"))
            image = hashlib.sha256((output / f"{name}.png").read_bytes()).hexdigest()
            is_done = (known["weights"], known["image"]["sha256"]) == (weights, image)
        except (OSError, ValueError, KeyError):
            is_done = False
        if is_done:
            done.add(name)
        else:
            record.unlink(missing_ok=True)
    return done


def rows_done(output: Path) -> set[str]:
    """The jobs whose image is in the Parquet files of a folder."""
    return {name for path in output.glob("*.parquet") for name in ids_in(path)}


def ids_in(path: Path) -> list[str]:
    """The ids in a Parquet file."""
    ids: list[str] = pq.read_table(path, columns=["id"])["id"].to_pylist()
    return ids


# Images.


def generated(jobs: list[Job], arguments: argparse.Namespace) -> Iterator[Line]:
    """Generate images on the cluster, and report each."""
    if not jobs:
        return
    # The address of a cluster is taken from RAY_ADDRESS.
    ray.init()
    # Columns of Arrow have one type, but a class is a number or a name: a job stays text.
    texts = [{"job": json.dumps(job)} for job in jobs]
    tasks = ray.data.from_items(texts, override_num_blocks=math.ceil(len(texts) / arguments.task))
    reports = tasks.map_batches(
        ToParquet if is_parquet(arguments.output) else ToFolder,
        fn_constructor_args=(arguments.output, arguments.bundle),
        fn_constructor_kwargs={"backend": arguments.backend, "max_batch": arguments.max_batch},
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=arguments.workers),
        num_cpus=arguments.cpus,
        num_gpus=arguments.gpus,
    )
    for row in reports.iter_rows():
        yield {key: value for key, value in row.items() if value is not None}


class ToFolder:
    """Generates batches of jobs. Each image is written with its record as soon as it is complete."""

    def __init__(self, output: Path, bundle: Path, **options: Any) -> None:
        self.output, self.generator = output, Generator(bundle, **options)

    def __call__(self, batch: pa.Table) -> pa.Table:
        jobs = jobs_in(batch)
        # A batch comes a second time if its worker was killed.
        left = [job for name, job in jobs.items() if not (self.output / f"{name}.json").exists()]
        errors = {}
        for result in self.generator.generate(left):
            if result.image is None:
                errors[result.id] = result.error
            else:
                write(self.output / f"{result.id}.png", result.image)
                write(self.output / f"{result.id}.json", result.record.encode(), is_new=True)
        return report({name: self.output / f"{name}.png" for name in jobs}, errors)


class ToParquet(ToFolder):
    """Generates batches of jobs. The images of a batch and their records become a Parquet file."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        jobs = jobs_in(batch)
        path = self.output / f"{hashlib.sha256(' '.join(jobs).encode()).hexdigest()}.parquet"
        done = ids_in(path) if path.exists() else []
        results = list(self.generator.generate(job for name, job in jobs.items() if name not in done))
        images = [result for result in results if result.image is not None]
        if images:
            rows = [{"id": it.id, "image": it.image, "record": it.record} for it in images]
            file = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(rows, schema=IMAGES), file)
            write(path, file.getvalue(), is_new=True)
        return report(dict.fromkeys(jobs, path), {it.id: it.error for it in results if it.image is None})


def jobs_in(batch: pa.Table) -> dict[str, Job]:
    """The jobs of a batch by their ids."""
    return {job["id"]: job for job in map(json.loads, batch["job"].to_pylist())}


def report(files: dict[str, Path], errors: dict[str, str | None]) -> pa.Table:
    """The file of each job, or its error."""
    rows = [{"id": name, "file": None if name in errors else str(file)} for name, file in files.items()]
    rows = [{**row, "error": errors.get(str(row["id"]))} for row in rows]
    return pa.Table.from_pylist(rows, schema=REPORT)


def write(path: Path, content: bytes, is_new: bool = False) -> None:
    """Write a file beside its place, then move it there. With `is_new`, a file that is already there stays."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if not is_new:
        part.replace(path)
        return
    try:
        os.link(part, path)
    except FileExistsError:
        pass
    part.unlink()


if __name__ == "__main__":
    sys.exit(main())
