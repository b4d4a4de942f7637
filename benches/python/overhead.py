"""Measures what the Python package adds to the Rust library.

    cargo xtask demo
    python benches/python/overhead.py target/release demo/bundle

in an environment with the wheel, NumPy and ONNX Runtime, on a machine that does nothing else. Native programs run with the ONNX
Runtime of the package. Both sides of each comparison run in turn, and the medians are printed.

overhead    images of 2 tokens with 1 step, one after the other: `engine.generate` and `image.save` in a loop, next to
            `eqim-run --jobs --max-batch 1` on the same settings. Time per image is the difference between many images and few,
            so that loading the bundle and starting the program are in neither. Both write a PNG and a JSON file of its settings.
throughput  images of 4 to 64 tokens, half of them with guidance: 8 threads that submit all of their images to one engine and
            save them, next to one `eqim-run --jobs`, both with batches of 16, and with loading and files. The start of Python
            and of the import are not included.
main thread a loop in Python, alone and while another thread generates, with one thread of ONNX Runtime, so that a core is free:
            how much of its speed the loop keeps.
import      `import eqim` in a new process, and NumPy alone.
size        the wheel as installed, and as a file if --wheel names it.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import eqim

BATCH = 16
THREADS = 8
KEYWORDS = {"class": "class_", "cfg": "guidance_scale", "steps": "num_inference_steps"}


def environment():
    """The environment of native programs, in which they find the ONNX Runtime of the package."""
    package = importlib.util.find_spec("onnxruntime")
    if package is None or "ORT_DYLIB_PATH" in os.environ:
        return dict(os.environ)
    [library] = Path(package.submodule_search_locations[0], "capi").glob("libonnxruntime.so*")
    return {**os.environ, "ORT_DYLIB_PATH": str(library)}


def native(arguments, jobs, batch):
    """Seconds of one eqim-run for all jobs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
        command = [f"{arguments.programs}/eqim-run", "--engine", arguments.bundle, "--jobs", folder / "jobs.jsonl"]
        command += ["--max-batch", str(batch), "-o", folder / "images"]
        start = time.perf_counter()
        subprocess.run(command, env=environment(), check=True, capture_output=True)
        return time.perf_counter() - start


def keywords(job):
    """The keywords of a job."""
    return {KEYWORDS.get(name, name): value for name, value in job.items() if name != "id"}


def save(image, folder, job):
    """Writes the files that eqim-run writes."""
    image.save(folder / f"{job['id']}.png")
    (folder / f"{job['id']}.json").write_text(json.dumps(image.settings))


def one_by_one(arguments, jobs):
    """Seconds of Engine.generate for all jobs, after the first image."""
    with tempfile.TemporaryDirectory() as folder, eqim.Engine.from_bundle(arguments.bundle, max_batch=1) as engine:
        start = time.perf_counter()
        for job in jobs:
            save(engine.generate(**keywords(job)), Path(folder), job)
        return time.perf_counter() - start


def in_threads(arguments, jobs):
    """Seconds of threads that submit all jobs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        with eqim.Engine.from_bundle(arguments.bundle, max_batch=BATCH) as engine:

            def work(own):
                futures = [(job, engine.submit(**keywords(job))) for job in own]
                for job, future in futures:
                    save(future.result(), folder, job)

            with ThreadPoolExecutor(THREADS) as threads:
                list(threads.map(work, [jobs[thread::THREADS] for thread in range(THREADS)]))
        return time.perf_counter() - start


def overhead(arguments):
    few, many = ([tiny(number) for number in range(count)] for count in (20, 20 + arguments.images))
    times = {"engine.generate": [], "eqim-run --jobs": []}
    for _ in range(arguments.rounds):
        for name, run in (
            ("engine.generate", lambda jobs: one_by_one(arguments, jobs)),
            ("eqim-run --jobs", lambda jobs: native(arguments, jobs, 1)),
        ):
            times[name].append((run(many) - run(few)) / arguments.images)
    for name, seconds in times.items():
        spread = f"{1000 * min(seconds):.2f} to {1000 * max(seconds):.2f}"
        print(f"{name:20} {1000 * statistics.median(seconds):8.2f} ms per image ({spread})", flush=True)
    ours, rust = (statistics.median(seconds) for seconds in times.values())
    print(f"{'overhead':20} {1000 * (ours - rust):8.2f} ms per image")


def tiny(number):
    return {"id": f"i{number}", "class": number % 5, "seed": number, "tokens": 2, "steps": 1}


def throughput(arguments):
    draw = random.Random(1)
    lengths = [draw.choice([4, 8, 16, 32, 64]) for _ in range(arguments.jobs)]
    jobs = [
        {"id": f"i{number}", "class": number % 5, "seed": number, "tokens": tokens, "cfg": 3 if number % 2 else 1}
        for number, tokens in enumerate(lengths)
    ]
    jobs = [{**job, "steps": arguments.steps} for job in jobs]
    ratios = []
    for _ in range(arguments.rounds):
        ours, rust = len(jobs) / in_threads(arguments, jobs), len(jobs) / native(arguments, jobs, BATCH)
        ratios.append(ours / rust)
        print(f"{THREADS} threads {ours:.2f} images/s, eqim-run --jobs {rust:.2f} images/s: {ratios[-1]:.3f}", flush=True)
    print(f"{'throughput':20} {statistics.median(ratios):8.3f} of eqim-run --jobs")


def loop(seconds):
    """How often a loop runs per second."""
    start, count = time.perf_counter(), 0
    while (now := time.perf_counter()) < start + seconds:
        count += 1
    return count / (now - start)


def main_thread(arguments):
    shares = []
    with eqim.Engine.from_bundle(arguments.bundle, threads=1) as engine:
        for _ in range(arguments.rounds):
            alone = loop(1)
            stop = threading.Event()

            def work(stop=stop):
                while not stop.is_set():
                    engine.generate(tokens=32)

            thread = threading.Thread(target=work)
            thread.start()
            shares.append(loop(3) / alone)
            stop.set()
            thread.join()
    spread = f"{min(shares):.2f} to {max(shares):.2f}"
    print(f"{'main thread':20} {statistics.median(shares):8.2f} of its speed ({spread})")


def imports(arguments):
    for name in ("eqim", "numpy"):
        script = f"import time; start = time.perf_counter(); import {name}; print(time.perf_counter() - start)"
        command = [sys.executable, "-c", script]
        seconds = [float(subprocess.check_output(command)) for _ in range(4 * arguments.rounds)]
        print(f"{'import ' + name:20} {1000 * statistics.median(seconds):8.1f} ms ({1000 * min(seconds):.1f} at least)")


def size(arguments):
    files = importlib.metadata.files("eqim") or []
    installed = sum(file.locate().stat().st_size for file in files if file.locate().exists())
    print(f"{'installed':20} {installed / 1e6:8.1f} MB")
    if arguments.wheel:
        print(f"{'wheel':20} {arguments.wheel.stat().st_size / 1e6:8.1f} MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", help="folder of the native programs")
    parser.add_argument("bundle", help="folder of the bundle")
    parser.add_argument("--wheel", type=Path, help="the file of the wheel")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds of each comparison [5]")
    parser.add_argument("--images", type=int, default=200, help="number of images per round, for the overhead [200]")
    parser.add_argument("--jobs", type=int, default=48, help="number of images per round, for the throughput [48]")
    parser.add_argument("--steps", type=int, default=100, help="steps of the solver, for the throughput [100]")
    parser.add_argument("--only", choices=["overhead", "throughput", "main", "import", "size"], help="measure only this")
    arguments = parser.parse_args()
    parts = {"overhead": overhead, "throughput": throughput, "main": main_thread, "import": imports, "size": size}
    for name, part in parts.items():
        if arguments.only in (None, name):
            part(arguments)


if __name__ == "__main__":
    main()
