"""Trains on many photographs, and measures the start, the memory and the time of decoding.

    python benches/training/images.py target/release FOLDER shards|folders

Needs numpy and Pillow, the programs and `cargo build --release --examples`. FOLDER gets 64 different JPEGs of 256 x 256 pixels.
`shards` has them as 100,000 members of ten tar files, and takes 2 GB. `folders` has them as 1,280,000 hard links in 1000 folders,
the layout of ImageNet. The model is that of the tests.
"""

import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

SHARDS, MEMBERS, BATCH = 10, 10_000, 64
FOLDERS, FILES = 1000, 1280
DECODED = 600  # batches
RECIPE = Path(__file__).resolve().parents[2] / "programs/tests/training/micro.toml"
MANY = 1_000_000


def jpeg(seed):
    """A photograph of 256 x 256 pixels: waves and noise."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0:256, 0:256] / 256
    waves = [np.sin(draw.uniform(2, 30) * x + draw.uniform(2, 30) * y) for _ in range(3)]
    pixels = 127 + 60 * np.stack(waves, -1) + draw.normal(0, 12, (256, 256, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def make_shards(folder, photographs):
    """Writes the shards that are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(SHARDS):
        path = folder / f"{shard:03}.tar"
        if path.exists():
            continue
        with tarfile.open(path.with_suffix(".partial"), "w") as tar:
            for member in range(MEMBERS):
                for suffix, contents in [("jpg", photographs[member % 64]), ("cls", str(member % 1000).encode())]:
                    info = tarfile.TarInfo(f"{member:06}.{suffix}")
                    info.size = len(contents)
                    tar.addfile(info, io.BytesIO(contents))
        os.rename(path.with_suffix(".partial"), path)


def make_folders(folder, photographs):
    """Writes the folders that are missing."""
    sources = folder.with_name("sources")
    sources.mkdir(parents=True, exist_ok=True)
    for number, contents in enumerate(photographs):
        (sources / f"{number}.jpg").write_bytes(contents)
    for number in range(FOLDERS):
        path, partial = folder / f"n{number:08}", folder.with_name("partial")
        if path.exists():
            continue
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for file in range(FILES):
            os.link(sources / f"{file % 64}.jpg", partial / f"n{number:08}_{file}.JPEG")
        folder.mkdir(exist_ok=True)
        os.rename(partial, path)


def processor_seconds(process, thread=None):
    """CPU time of a process, or of its threads whose name begins with `thread`."""
    tasks = [Path(f"/proc/{process}")] if thread is None else Path(f"/proc/{process}/task").iterdir()
    ticks = 0
    for task in tasks:
        name, fields = (task / "stat").read_text().split("(", 1)[1].rsplit(")", 1)
        if thread is None or name.startswith(thread):
            ticks += sum(map(int, fields.split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def memory(process):
    """Resident memory in MiB."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def steps(metrics):
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def forget(files):
    """Drops the contents of files from the memory of the system, so that they come from the disk again."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def decode(program, images):
    """Decoding and cropping alone."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    said = subprocess.run([program, images, str(DECODED)], stdout=subprocess.PIPE, text=True, check=True).stdout
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - start
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "images per second, decoding alone": int(said.split()[0]),
        "cores busy, decoding alone": round(used / seconds, 2),
    }


def train(program, folder, layout):
    """The first minute of a training."""
    every_step = RECIPE.read_text().replace("log_every = 2", "log_every = 1")
    (folder / "recipe.toml").write_text(re.sub(r"(checkpoint|sample)_every = \d+", rf"\1_every = {MANY}", every_step))
    shutil.rmtree(folder / "run", ignore_errors=True)
    line = [program, "tokenizer", "--images", layout, "--recipe", "recipe.toml", "-o", "run"]
    line += ["--steps", str(MANY), "--batch-size", str(BATCH)]
    start = time.monotonic()
    run = subprocess.Popen(line, cwd=folder, stderr=subprocess.DEVNULL)
    metrics, measured = folder / "run/metrics.jsonl", []
    try:
        while steps(metrics) < 1:
            assert run.poll() is None, "the training has ended"
            time.sleep(0.01)
        first = time.monotonic() - start
        for _ in range(6):
            seconds = [processor_seconds(run.pid), processor_seconds(run.pid, "decode")]
            measured.append((time.monotonic(), steps(metrics), *seconds, memory(run.pid)))
            time.sleep(10)
    finally:
        run.kill()
        run.wait()
    seconds, done, all_cores, decoding = (measured[-1][column] - measured[0][column] for column in range(4))
    return {
        "seconds until the first step": round(first, 2),
        "images per second": round(BATCH * done / seconds, 1),
        "cores busy": round(all_cores / seconds, 2),
        "ms of CPU time to decode an image": round(1000 * decoding / (BATCH * done), 2),
        "MiB every ten seconds": [round(row[4]) for row in measured],
    }


def main():
    programs, folder, layout = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), sys.argv[3]
    {"shards": make_shards, "folders": make_folders}[layout](folder / layout, [jpeg(seed) for seed in range(64)])
    forget((folder / layout).glob("*.tar"))
    report = {"layout": layout} | train(programs / "eqim-train", folder, layout)
    print(json.dumps(report | decode(programs / "examples/batches", folder / layout), indent=1))


main()
