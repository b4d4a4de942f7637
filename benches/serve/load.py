"""Measures eqim-serve under load, next to eqim-run --jobs on the same images.

    cargo xtask demo
    python3 benches/serve/load.py target/release demo/bundle
    python3 benches/serve/load.py target/release demo/bundle --soak 10000

Images have 4 to 64 tokens, half of them with guidance. First 1, 4, 16 and 64 clients ask for them, each for the next one
when it has one, with and without strips. Then requests arrive at random (Poisson), whatever the service does, at a half and
at four fifths of the rate of 16 clients with strips. With --soak, 8 clients ask for short images, and the memory is printed.
"""

import argparse
import http.client
import json
import os
import random
import re
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

BATCH = 16


class Service:
    """A running eqim-serve."""

    def __init__(self, programs, bundle, queue=10_000):
        command = [f"{programs}/eqim-serve", "--engine", bundle, "--port", "0", "--max-batch", str(BATCH)]
        command += ["--max-queue", str(queue)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.address = self.process.stdout.readline().strip().rsplit("//", 1)[1]
        connection = http.client.HTTPConnection(self.address)
        connection.request("GET", "/v1/models")
        model = json.load(connection.getresponse())["data"][0]
        self.token_width, self.height = model["token_width"], model["height"]

    def generate(self, job, stream=False):
        """Generates an image. Returns the seconds to the first strip, if strips are wanted, and to the image."""
        body = {"prompt": job["class"], "size": f"{job['tokens'] * self.token_width}x{self.height}", "seed": job["seed"]}
        body |= {"guidance_scale": job["cfg"], "num_inference_steps": job["steps"], "stream": stream}
        start, first = time.perf_counter(), None
        connection = http.client.HTTPConnection(self.address)
        connection.request("POST", "/v1/images/generations", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        for line in response:
            if first is None and line.startswith(b"data:"):
                first = time.perf_counter() - start
        connection.close()
        assert not stream or b"b64_json" in line or line == b"\n", line
        return first, time.perf_counter() - start

    def megabytes(self):
        with open(f"/proc/{self.process.pid}/status") as status:
            return int(re.search(r"VmRSS:\s+(\d+)", status.read()).group(1)) / 1024

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def end(self):
        self.process.terminate()
        assert self.process.wait() == 0


def work(count, steps):
    """Images of mixed lengths, half of them with guidance."""
    draw = random.Random(1)
    lengths = [draw.choice([4, 8, 16, 32, 64]) for _ in range(count)]
    return [
        {"id": f"i{i}", "class": i % 5, "seed": i, "tokens": tokens, "cfg": 3 if i % 2 else 1, "steps": steps}
        for i, tokens in enumerate(lengths)
    ]


def percentiles(seconds):
    """The median and the times that 5 % and 1 % exceed, in milliseconds."""
    ordered = sorted(seconds)
    places = [min(len(ordered) - 1, int(len(ordered) * share)) for share in (0.5, 0.95, 0.99)]
    return " ".join(f"{1000 * ordered[place]:6.0f}" for place in places)


def report(name, times, seconds):
    """Prints a line of the table, and returns the images per second."""
    first, whole = [first for first, _ in times if first is not None], [whole for _, whole in times]
    strips = percentiles(first) if first else " " * 20
    print(f"{name:34} {len(times) / seconds:6.2f}  {strips}  {percentiles(whole)}", flush=True)
    return len(times) / seconds


def by_clients(service, count, jobs, stream):
    """Clients that each ask for the next image when they have one."""
    start = time.perf_counter()
    with ThreadPoolExecutor(count) as clients:
        times = list(clients.map(lambda job: service.generate(job, stream), jobs))
    return times, time.perf_counter() - start


def at_random(service, rate, jobs):
    """Requests that arrive at random, `rate` per second. All of them are strips and images."""
    draw, times, clients = random.Random(2), [], []
    start = arrival = time.perf_counter()
    for job in jobs:
        arrival += draw.expovariate(rate)
        time.sleep(max(0, arrival - time.perf_counter()))
        clients.append(threading.Thread(target=lambda job=job: times.append(service.generate(job, True))))
        clients[-1].start()
    for client in clients:
        client.join()
    assert len(times) == len(jobs)
    return times, time.perf_counter() - start


def jobs_per_second(programs, bundle, jobs):
    """Generates the images with eqim-run --jobs, loading included."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "jobs.jsonl")
        with open(path, "w") as file:
            file.writelines(json.dumps(job) + "\n" for job in jobs)
        command = [f"{programs}/eqim-run", "--engine", bundle, "--jobs", path, "--max-batch", str(BATCH)]
        start = time.perf_counter()
        subprocess.run([*command, "-o", os.path.join(folder, "images")], check=True, capture_output=True)
        return len(jobs) / (time.perf_counter() - start)


def load(arguments):
    """Prints the table."""
    jobs = work(arguments.images, arguments.steps)
    service = Service(arguments.programs, arguments.bundle)
    print(f"{'':34} images/s  first strip, ms (p50 p95 p99)  image, ms (p50 p95 p99)")
    rates = []
    for clients in (1, 4, 16, 64):
        rates.append(report(f"{clients} clients", *by_clients(service, clients, jobs, False)))
        if clients == 16:
            alone = jobs_per_second(arguments.programs, arguments.bundle, jobs)
            print(f"{'eqim-run --jobs':34} {alone:6.2f}  the clients are {rates[-1] / alone:.2f} times as fast", flush=True)
    for clients in (1, 4, 16, 64):
        rate = report(f"{clients} clients, strips", *by_clients(service, clients, jobs, True))
        if clients == 16:
            shares = [(0.5, rate / 2), (0.8, rate * 0.8)]
    for share, rate in shares:
        report(f"at random, {rate:.2f}/s, strips", *at_random(service, rate, jobs))
    service.end()


def soak(arguments):
    """Prints the memory after many short images."""
    service = Service(arguments.programs, arguments.bundle)
    for thousand in range(arguments.soak // 1000):
        jobs = [
            {"class": number % 5, "seed": number, "tokens": 2, "cfg": 1 + number % 2, "steps": 1}
            for number in range(1000 * thousand, 1000 * (thousand + 1))
        ]
        _, seconds = by_clients(service, 8, jobs, False)
        state = f"{service.megabytes():.1f} MB, {service.descriptors()} descriptors"
        print(f"{1000 * (thousand + 1)} images: {state}, {1000 / seconds:.0f} images/s", flush=True)
    service.end()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", help="folder of the programs")
    parser.add_argument("bundle", help="folder of the bundle")
    parser.add_argument("--images", type=int, default=64, help="number of images per line of the table [64]")
    parser.add_argument("--steps", type=int, default=100, help="steps of the solver [100]")
    parser.add_argument("--soak", type=int, help="generate this number of short images instead")
    arguments = parser.parse_args()
    soak(arguments) if arguments.soak else load(arguments)


if __name__ == "__main__":
    main()
