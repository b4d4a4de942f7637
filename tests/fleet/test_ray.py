"""Ray: eqim.ray and the programs of examples/ray on a cluster of this machine, with two nodes of Ray.

EQIM_PROGRAMS is the folder of the built programs, EQIM_BUNDLE the demo bundle. The package eqim is installed.
"""

import contextlib
import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

# Nothing is sent to Ray's authors. The nodes listen on the loopback device only, which this variable of Windows and macOS
# asks for. Without a token, Ray writes one to the home folder.
os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2,
}

import eqim
import eqim.ray
from ray.cluster_utils import Cluster

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(os.environ.get("EQIM_PROGRAMS", ROOT / "target/release")).resolve()
BUNDLE = Path(os.environ.get("EQIM_BUNDLE", ROOT / "demo/bundle")).resolve()
EXAMPLES = ROOT / "examples/ray"
# Seconds. Longer than anything takes here.
PATIENCE = 120
# The bytes of an image depend on the number of threads, and on the images that share its batch.
ALONE = ["--threads", "1", "--max-batch", "1"]


def until(condition, what):
    """Waits until a condition holds, and returns its value."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE} s"
        time.sleep(0.02)
    return value


def contents(folder):
    """The files of a folder, without those that are being written."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def write_jobs(path, jobs):
    path.write_text("".join(json.dumps(job) + "\n" for job in jobs))
    return path


def images_of(jobs, folder):
    """The images and records that eqim-run makes of jobs."""
    file, output = write_jobs(folder / "reference.jsonl", jobs), folder / "reference"
    command = [PROGRAMS / "eqim-run", "--engine", BUNDLE, "--jobs", file, "--output", output, *ALONE]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
    return contents(output)


@pytest.fixture(scope="module")
def cluster():
    """A cluster of one node, for all tests. Programs find it by its address in the environment."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder, pytest.MonkeyPatch.context() as patch:
        # The path of a socket has at most 107 bytes.
        patch.setenv("RAY_TMPDIR", folder)
        cluster = Cluster()
        try:
            # Two CPUs for workers. One stays free, for what Ray itself runs.
            cluster.add_node(num_cpus=3, include_dashboard=False)
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield cluster
        finally:
            cluster.shutdown()


@contextlib.contextmanager
def running(*command):
    """A program that ends with the block."""
    pipe = subprocess.PIPE
    program = subprocess.Popen([sys.executable, *command], stdout=pipe, stderr=pipe, text=True)
    try:
        yield program
    finally:
        program.terminate()
        try:
            program.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait()


def generate(*arguments):
    """Runs the program for jobs. Returns its exit code, the objects that it prints, and the summary in its log."""
    command = [sys.executable, EXAMPLES / "generate.py", BUNDLE, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode in (0, 1), ended.stderr
    return ended.returncode, [json.loads(line) for line in ended.stdout.splitlines()], summary(ended.stderr)


def summary(log):
    """The line with the numbers of jobs. Messages of Ray can follow it."""
    (line,) = [line for line in log.splitlines() if " jobs done, " in line]
    return line


def workers(node):
    """The processes of a node that generate images."""
    raylet = node.all_processes["raylet"][0].process.pid
    children = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
    return [int(pid) for pid in children if b"ray::MapWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


class Watch(threading.Thread):
    """Counts how often each file of a folder is written. Each time, it is another file that gets the name."""

    def __init__(self, folder):
        super().__init__(daemon=True)
        self.folder, self.seen, self.ended = folder, {}, threading.Event()
        self.start()

    def look(self):
        for entry in os.scandir(self.folder) if self.folder.exists() else ():
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(entry.path)
                self.seen.setdefault(entry.name, set()).add((status.st_ino, status.st_mtime_ns))

    def run(self):
        while not self.ended.wait(0.02):
            self.look()

    def counts(self, suffix):
        """How often each file with a suffix was written."""
        self.ended.set()
        self.join()
        self.look()
        return {name: len(files) for name, files in self.seen.items() if name.endswith(suffix) and name[0] != "."}


def test_a_killed_worker_and_a_lost_node_lose_nothing(cluster, tmp_path):
    classes = ["field", 1, "mountain", "none", None]
    jobs = [{"id": f"job-{n}", "class": classes[n % 5], "tokens": 4 + n % 4, "seed": n, "steps": 3} for n in range(200)]
    jobs = [job | {"cfg": 2.5} if n % 3 == 0 else job for n, job in enumerate(jobs)]
    file, output = write_jobs(tmp_path / "jobs.jsonl", jobs), tmp_path / "images"
    watch = Watch(output)
    done = lambda: len(list(output.glob("*.json")))
    second = cluster.add_node(num_cpus=2)
    with running(EXAMPLES / "generate.py", BUNDLE, file, output, "--workers", "4", "--task", "10") as program:
        all_work = lambda: done() >= 20 and len(workers(cluster.head_node)) == len(workers(second)) == 2
        until(lambda: all_work() or program.poll() is not None, "images of four workers")
        ours, others = workers(cluster.head_node), workers(second)
        os.kill(ours[0], signal.SIGKILL)
        until(lambda: done() >= 60 or program.poll() is not None, "more images")
        cluster.remove_node(second, allow_graceful=False)
        assert program.poll() is None and done() < 150
        printed, log = program.communicate(timeout=PATIENCE)
    assert program.returncode == 0, log
    assert not any(Path(f"/proc/{pid}").exists() for pid in [ours[0], *others])
    assert sorted(json.loads(line)["id"] for line in printed.splitlines()) == sorted(job["id"] for job in jobs)
    assert summary(log) == "200 jobs done, 0 done before, 0 failed"

    assert contents(output) == images_of(jobs, tmp_path)
    records, images = watch.counts(".json"), watch.counts(".png")
    assert len(records) == len(images) == 200
    assert set(records.values()) == {1}
    # A process that ends between an image and its record leaves an image that is written again: three processes ended.
    assert sum(images.values()) <= 203

    before = {path: path.stat().st_mtime_ns for path in output.iterdir() if path.name[0] != "."}
    assert generate(file, output) == (0, [], "0 jobs done, 200 done before, 0 failed")
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_parquet_holds_the_images_and_records(cluster, tmp_path):
    jobs = [{"id": f"{n}", "class": "forest", "tokens": 4 if n % 2 else None, "steps": 2} for n in range(12)]
    file, output = tmp_path / "jobs.parquet", tmp_path / "images.parquet"
    pq.write_table(pa.Table.from_pylist([*jobs, {"id": "short", "tokens": 1}, {"id": "3"}, {"id": "a/b"}]), file)
    code, printed, counts = generate(file, output, "--workers", "2", "--task", "5")
    assert (code, counts) == (1, "12 jobs done, 0 done before, 3 failed")
    errors = [line for line in printed if "error" in line]
    assert [line["id"] for line in errors] == ["3", "a/b", "short"]
    for line, expected in zip(errors, ["id: is the id of", "id: is 'a/b', expected", "tokens is 1, expected"], strict=True):
        assert expected in line["error"]
    assert {line["file"] for line in printed if "file" in line} == {str(path) for path in output.iterdir()}
    rows = [row for path in output.glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    found = {f"{row['id']}.png": row["image"] for row in rows}
    records = {f"{row['id']}.json": json.loads(row["record"]) for row in rows}
    expected = images_of([{key: value for key, value in job.items() if value is not None} for job in jobs], tmp_path)
    assert len(rows) == 12 and found == {name: file for name, file in expected.items() if name.endswith(".png")}
    assert records == {name: json.loads(file) for name, file in expected.items() if name.endswith(".json")}

    before = contents(output)
    code, printed, counts = generate(file, output)
    assert (code, len(printed), counts) == (1, 3, "0 jobs done, 12 done before, 3 failed")
    assert contents(output) == before


def test_what_is_damaged_or_of_another_bundle_is_done_again(cluster, tmp_path):
    jobs = [{"id": name, "tokens": 4, "steps": 2} for name in ["kept", "damaged", "older", "half"]]
    output, file = tmp_path / "reference", write_jobs(tmp_path / "jobs.jsonl", jobs)
    expected = images_of(jobs, tmp_path)
    (output / "damaged.png").write_bytes(expected["damaged.png"][:-1])
    (output / "older.json").write_bytes(expected["older.json"].replace(b'"weights": "', b'"weights": "0'))
    (output / "half.json").unlink()
    (output / ".half.json.0.part").write_text("{")
    kept = (output / "kept.png").stat()
    code, printed, counts = generate(file, output)
    assert (code, counts) == (0, "3 jobs done, 1 done before, 0 failed")
    assert {line["id"] for line in printed} == {"damaged", "older", "half"}
    assert {path.name: path.read_bytes() for path in output.iterdir()} == expected
    assert (output / "kept.png").stat() == kept


@pytest.mark.parametrize("name", ["ToFolder", "ToParquet"])
def test_a_batch_that_comes_twice_is_written_once(name, tmp_path):
    program = runpy.run_path(str(EXAMPLES / "generate.py"))
    jobs = [{"id": "a", "tokens": 4, "steps": 2}, {"id": "b", "tokens": 1}, {"id": "c", "tokens": 5, "steps": 2}]
    batch = pa.table({"job": [json.dumps(job) for job in jobs]})
    worker = program[name](tmp_path, BUNDLE, threads=1, max_batch=1)
    first, before = worker(batch), {path: path.stat() for path in tmp_path.iterdir()}
    assert [row["id"] for row in first.to_pylist() if row["file"]] == ["a", "c"]
    # Only the job that failed is tried again.
    generate, tried = worker.generator.generate, []
    worker.generator.generate = lambda jobs: generate(tried.append(job["id"]) or job for job in jobs)
    assert worker(batch) == first and tried == ["b"]
    assert {path: path.stat() for path in tmp_path.iterdir()} == before


def test_lines_that_are_not_jobs_are_reported(tmp_path):
    file = tmp_path / "jobs.jsonl"
    file.write_text('\ufeff\n[1]\n{"id": 1.5}\n{"id": ".x"}\n{"a\n')
    code, printed, counts = generate(file, tmp_path / "images")
    assert (code, counts) == (1, "0 jobs done, 0 done before, 4 failed")
    errors = ["line 2: is not a JSON object", "line 3: id: is 1.5, expected", "line 4: id: is '.x', expected", "line 5: "]
    assert [line["id"] for line in printed] == ["2", "3", ".x", "5"]
    for line, error in zip(printed, errors, strict=True):
        assert f"{file} {error}" in line["error"]


def test_batches_of_all_formats_give_images_records_and_errors(tmp_path):
    generator, photo = eqim.ray.Generator(BUNDLE, threads=1, max_batch=1), tmp_path / "photo.png"
    generator.engine.generate(tokens=4, num_inference_steps=1).save(photo)
    jobs = [
        {"id": "a", "class": "forest", "tokens": 4, "steps": 2, "cfg": 2.0},
        {"id": "b", "steps": 2, "prefix": str(photo), "direction": "left"},
        {"id": "c", "tokens": 5, "steps": 2, "seed": 3},
    ]
    expected = images_of(jobs, tmp_path)
    bad = [{"id": "d", "class": "sea"}, {"id": "e", "cfg": -1.0}, {"id": "f", "prefix": "missing.png"}, {"id": "g", "size": 3}]
    frame = pd.DataFrame([*jobs, *bad])
    batches = [pa.Table.from_pylist(frame.astype(object).where(frame.notna(), None).to_dict("records")), frame]
    for batch in [*batches, {name: frame[name].to_numpy() for name in frame}]:
        table = generator(batch)
        rows = table.to_pylist()
        assert [row["id"] for row in rows] == list("abcdefg")
        for row in rows[:3]:
            assert row["image"] == expected[f"{row['id']}.png"]
            assert json.loads(row["record"]) == json.loads(expected[f"{row['id']}.json"])
            assert row["error"] is None
        errors = ["class is sea, expected", "cfg is -1, expected", "prefix missing.png: No such file", "size: is not a setting"]
        for row, error in zip(rows[3:], errors, strict=True):
            assert row["error"].startswith(error) and row["image"] is row["record"] is None
    with pytest.raises(eqim.InputError, match="a job has no id"):
        generator({"tokens": np.array([4])})


def test_an_engine_that_fails_raises_after_the_images_that_are_complete():
    generator = eqim.ray.Generator(BUNDLE, threads=1, max_batch=1)
    made, failed, waiting = generator.engine.submit(tokens=4, num_inference_steps=1), Future(), Future()
    failed.set_exception(eqim.RunError("the decoder fails"))
    given = iter([failed, made, waiting])
    generator.engine = SimpleNamespace(submit_job=lambda job: (json.loads(job)["id"], next(given)))
    results = generator.generate([{"id": "a"}, {"id": "b"}, {"id": "c"}])
    assert next(results).id == "b"
    waiting.set_exception(eqim.ClosedError("the engine is closed"))
    with pytest.raises(eqim.RunError, match="the decoder fails"):
        next(results)


def test_images_that_nobody_waits_for_are_cancelled():
    generator = eqim.ray.Generator(BUNDLE, threads=1, max_batch=1)
    waiting = Future()
    given = iter([generator.engine.submit(tokens=4, num_inference_steps=1), waiting])
    generator.engine = SimpleNamespace(submit_job=lambda job: (json.loads(job)["id"], next(given)))
    results = generator.generate([{"id": "a"}, {"id": "b"}])
    next(results)
    results.close()
    assert waiting.cancelled()


def test_eqim_does_not_import_ray():
    code = "import sys, eqim, eqim.ray; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ask(port, body):
    """Sends a request. Returns the status and the body of the response."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", data, timeout=PATIENCE) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except urllib.error.URLError:
        return None, None


def test_serve_gives_images_of_one_engine(cluster, tmp_path):
    jobs = [{"id": "a", "class": "water", "tokens": 5, "steps": 3, "cfg": 2}, {"id": "b", "class": 1, "tokens": 4, "steps": 2}]
    expected, port = images_of(jobs, tmp_path), free_port()
    with running(EXAMPLES / "serve.py", BUNDLE, "--port", str(port), "--max-batch", "2") as program:
        until(lambda: ask(port, jobs[0])[0] == 200 or program.poll() is not None, "start of the service")
        for job in jobs:
            assert ask(port, job) == (200, expected[f"{job['id']}.png"])
        for body, error in [
            ({"tokens": 1}, "tokens is 1, expected"),
            ({"cfg": -1}, "cfg is -1, expected"),
            ({"prefix": "/etc/passwd"}, "prefix is not a setting of this service"),
            ([], "a job: invalid type: sequence, expected a map"),
            (b"{", "the body is not JSON"),
        ]:
            status, message = ask(port, body)
            assert status == 400 and json.loads(message)["error"].startswith(error), message
        # A short image joins the batch of a long one, and is done first.
        with ThreadPoolExecutor() as threads:
            long = threads.submit(ask, port, {"tokens": 200})
            time.sleep(0.5)
            status, short = ask(port, jobs[1])
            assert status == 200 and not long.done()
            assert [width_of(file) for file in (short, long.result()[1])] == [64, 3200]
    assert ask(port, jobs[0]) == (None, None)


def width_of(png):
    return struct.unpack_from(">I", png, 16)[0]
