"""What the tests of the Python package share.

    python -m pytest tests/python

in an environment that has the wheel. EQIM_PROGRAMS is the folder of the native programs, and `cargo xtask demo` writes the
bundle. Tests with the mark `newest` need packages that the other tests do not need: mypy, nbclient and ipykernel.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

import eqim

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "demo/bundle"
PHOTO = ROOT / "assets/photos/mountain/fog.jpg"
# Seconds. Longer than anything takes here.
PATIENCE = 120


def pytest_configure(config):
    config.addinivalue_line("markers", "newest: needs packages that are only installed for the newest Python")


def environment():
    """The environment of a program, in which native programs find the ONNX Runtime of the package."""
    variables = dict(os.environ)
    package = importlib.util.find_spec("onnxruntime")
    if package is not None and "ORT_DYLIB_PATH" not in variables:
        [library] = Path(package.submodule_search_locations[0], "capi").glob("libonnxruntime.so*")
        variables["ORT_DYLIB_PATH"] = str(library)
    return variables


def python(script, *arguments, folder=None):
    """Runs a script in another process. Returns the process, which has ended."""
    command = [sys.executable, "-X", "faulthandler", "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE)


def printed(script, *arguments, folder=None):
    """What a script prints. Fails if the script fails."""
    process = python(script, *arguments, folder=folder)
    assert process.returncode == 0, f"exit code {process.returncode}\n{process.stdout}\n{process.stderr}"
    return process.stdout


def levels(one, other):
    """The largest difference of two images of the same size."""
    one, other = np.asarray(one), np.asarray(other)
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def read(path):
    """The pixels of a file, as Pillow reads them."""
    with Pillow.open(path) as image:
        return np.array(image.convert("RGB"))


@pytest.fixture(scope="session")
def engine():
    """The demo bundle. Tests that close an engine open one of their own."""
    with eqim.Engine.from_bundle(BUNDLE) as engine:
        yield engine


@pytest.fixture
def own():
    """An engine that a test may close."""
    with eqim.Engine.from_bundle(BUNDLE) as engine:
        yield engine


@pytest.fixture(scope="session")
def programs():
    """Folder of the native programs."""
    return Path(os.environ.get("EQIM_PROGRAMS", ROOT / "target/release")).resolve()


@pytest.fixture
def eqim_run(programs, engine, tmp_path):
    """Runs the native eqim-run on the backend of the engine. Returns the file of the image."""
    backend = {"ONNX Runtime": "ort", "Candle": "candle"}[engine.backend]

    def run(*flags):
        path = tmp_path / "native.png"
        command = [programs / "eqim-run", "--engine", BUNDLE, "--backend", backend, "-o", path, *map(str, flags)]
        subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=PATIENCE)
        return path

    return run
