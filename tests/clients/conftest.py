"""A running eqim-serve, and what the tests of this folder share.

    cargo xtask clients

EQIM_PROGRAMS is the folder of the built programs, EQIM_BUNDLE the demo bundle.
"""

import json
import os
import shutil
import struct
import subprocess
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(os.environ.get("EQIM_PROGRAMS", ROOT / "target/release")).resolve()
BUNDLE = Path(os.environ.get("EQIM_BUNDLE", ROOT / "demo/bundle")).resolve()
PHOTO = ROOT / "assets/photos/mountain/fog.jpg"
# Seconds. Longer than anything takes here.
PATIENCE = 60


def until(condition, what):
    """Waits until a condition holds, and returns its value."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE} s"
        time.sleep(0.01)
    return value


def png_size(file):
    """Decodes a PNG file, and returns its size as the API writes it. Fails if the file is damaged."""
    assert file.startswith(b"\x89PNG\r\n\x1a\n"), file[:8]
    position, chunks = 8, {}
    while position < len(file):
        length, kind = struct.unpack_from(">I4s", file, position)
        data = file[position + 8 : position + 8 + length]
        assert struct.unpack_from(">I", file, position + 8 + length)[0] == zlib.crc32(kind + data), kind
        chunks[kind] = chunks.get(kind, b"") + data
        position += 12 + length
    width, height, bits, colours = struct.unpack_from(">IIBB", chunks[b"IHDR"])
    # 8 bits of red, green and blue. Each row begins with the number of its filter.
    assert (bits, colours) == (8, 2) and b"IEND" in chunks
    assert len(zlib.decompress(chunks[b"IDAT"])) == height * (1 + 3 * width)
    return f"{width}x{height}"


class Service:
    """A running eqim-serve with the demo bundle.

    The service gets the key in its environment. `runner` is the beginning of its command, for a program that starts it.
    """

    def __init__(self, folder, *flags, key=None, runner=()):
        command = [*runner, PROGRAMS / "eqim-serve", "--engine", f"bundle={BUNDLE}", "--port", "0", *flags]
        environment = {name: value for name, value in os.environ.items() if name != "EQIM_API_KEY"}
        if key is not None:
            environment["EQIM_API_KEY"] = key
        self.key, self.log = key, folder / "log.txt"
        output = folder / "output.txt"
        with open(output, "w") as out, open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=out, stderr=log, env=environment)
        self.pid = self.process.pid
        try:
            until(lambda: output.read_text().endswith("\n") or self.process.poll() is not None, "start of eqim-serve")
            assert self.process.poll() is None, self.log.read_text()
        except BaseException:
            self.end()
            raise
        self.url = output.read_text().splitlines()[0].rsplit(" at ", 1)[1]
        self.address = self.url.removeprefix("http://")
        self.port = int(self.address.rsplit(":", 1)[1])
        model = self.get("/v1/models")["data"][0]
        self.token_width, self.height = model["token_width"], model["height"]

    def send(self, path, body=None):
        """Status and body of an answer. A body is sent as JSON."""
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def get(self, path):
        """The JSON at a path."""
        status, body = self.send(path)
        assert status == 200, body
        return json.loads(body)

    def generate(self, **parameters):
        """The file of an image, in base64."""
        status, body = self.send("/v1/images/generations", parameters)
        assert status == 200, body
        return json.loads(body)["data"][0]["b64_json"]

    def size(self, tokens):
        """The size of an image of some tokens."""
        return f"{tokens * self.token_width}x{self.height}"

    def metric(self, name, **labels):
        """The value of a metric: the sum of those which have these labels, 0 if there are none."""
        status, text = self.send("/metrics")
        assert status == 200, text
        lines = [line.rsplit(" ", 1) for line in text.decode().splitlines() if line.split("{")[0].split(" ")[0] == name]
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(float(value) for metric, value in lines if all(label in metric for label in wanted))

    def cancelled(self):
        """The number of images that were cancelled."""
        return self.metric("eqim_images_total", outcome="cancelled")

    def wait_until_idle(self):
        """Waits until no image is pending, and no row of a batch is in use."""
        until(lambda: self.metric("eqim_pending_images") == self.metric("eqim_batch_images") == 0, "no pending images")

    def memory(self, kind="VmRSS"):
        """Resident memory in bytes. "VmHWM" is its maximum so far."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))

    def descriptors(self):
        """The number of open descriptors."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def end(self):
        """Sends SIGTERM, and returns the exit code. A service that does not end is killed."""
        self.process.terminate()
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts a service with other flags, which is ended when `end` is called or the tests of the file are over."""
    services = []

    def start(*flags, **options):
        services.append(Service(tmp_path_factory.mktemp("service"), *flags, **options))
        return services[-1]

    yield start
    for service in services:
        service.end()


@pytest.fixture(scope="module")
def service(start):
    """A service for the tests of a file."""
    return start()


@pytest.fixture(scope="module")
def service_with_key(start):
    """A service for the tests of a file, which needs a key."""
    return start(key="a-key-of-the-tests")


@pytest.fixture
def photo(tmp_path):
    """A photograph `photo.jpg` in a folder of its own."""
    return shutil.copy(PHOTO, tmp_path / "photo.jpg")
