"""Compares eqim-serve with eqim-run --jobs on the same images, and watches its memory.

    cargo xtask demo
    python3 benches/serve/load.py target/release demo/bundle

16 clients ask for 48 images of 4 to 32 tokens, three times. Then 8 clients ask for 10,000 short images.
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

PROGRAMS, BUNDLE = sys.argv[1:]
JOBS = [{"id": f"j{i}", "class": i % 5, "seed": i, "tokens": random.Random(i).choice([4, 8, 16, 32])} for i in range(48)]


class Service:
    """A running eqim-serve."""

    def __init__(self, batch):
        command = [f"{PROGRAMS}/eqim-serve", "--engine", BUNDLE, "--port", "0", "--max-batch", str(batch)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.url = self.process.stdout.readline().strip().rsplit(" at ", 1)[1]
        with urllib.request.urlopen(f"{self.url}/v1/models") as answer:
            model = json.load(answer)["data"][0]
        self.token_width, self.height = model["token_width"], model["height"]

    def generate(self, tokens, **parameters):
        body = dict(parameters, size=f"{tokens * self.token_width}x{self.height}")
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/images/generations", json.dumps(body).encode(), headers)
        return urllib.request.urlopen(request).read()

    def job(self, job):
        self.generate(job["tokens"], prompt=job["class"], seed=job["seed"], guidance_scale=3)

    def short(self, number):
        self.generate(2, prompt=number % 5, seed=number, num_inference_steps=1, guidance_scale=1 + number % 2)

    def megabytes(self):
        with open(f"/proc/{self.process.pid}/status") as status:
            return int(re.search(r"VmRSS:\s+(\d+)", status.read()).group(1)) / 1024

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def end(self):
        self.process.terminate()
        return self.process.wait()


def by_clients(count, items, work):
    """Works on all items with a number of threads, and returns the seconds that it took."""
    items, lock = iter(items), threading.Lock()

    def client():
        while True:
            with lock:
                item = next(items, None)
            if item is None:
                return
            work(item)

    start = time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


def jobs(folder):
    """Generates the images with eqim-run, and returns the seconds that it took."""
    path = os.path.join(folder, "jobs.jsonl")
    with open(path, "w") as file:
        file.writelines(json.dumps(job) + "\n" for job in JOBS)
    command = [f"{PROGRAMS}/eqim-run", "--engine", BUNDLE, "--cfg", "3", "--jobs", path, "--max-batch", "16"]
    start = time.perf_counter()
    subprocess.run([*command, "-o", os.path.join(folder, "images")], check=True, capture_output=True)
    return time.perf_counter() - start


def main():
    service = Service(16)
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            alone = jobs(folder)
        served = by_clients(16, JOBS, service.job)
        print(f"eqim-run --jobs {alone:.2f} s, eqim-serve with 16 clients {served:.2f} s: {alone / served:.2f} times as fast")
    print(f"exit code {service.end()}")
    service = Service(8)
    for thousand in range(10):
        seconds = by_clients(8, range(1000), service.short)
        state = f"{service.megabytes():.1f} MB, {service.descriptors()} descriptors"
        print(f"{1000 * (thousand + 1)} images: {state}, {1000 / seconds:.0f} images/s", flush=True)
    print(f"exit code {service.end()}")


if __name__ == "__main__":
    main()
