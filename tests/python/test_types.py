"""The stubs: mypy on programs of users, and stubtest on the package."""

import subprocess
import sys

import pytest
from conftest import PATIENCE, ROOT

import eqim

pytestmark = pytest.mark.newest


def mypy(folder, *arguments):
    """Runs mypy without its cache."""
    command = [sys.executable, "-m", "mypy", "--cache-dir", folder / "cache", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.parametrize("program", sorted((ROOT / "examples/python").glob("*.py")), ids=lambda path: path.name)
def test_examples(tmp_path, program):
    checked = mypy(tmp_path, "--strict", program)
    assert checked.returncode == 0, checked.stdout + checked.stderr


USER = """
import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import eqim
from eqim import EqimError
from eqim.errors import ClosedError

def show(known: int, total: int) -> None:
    print(known, total)

with eqim.Engine.from_bundle(Path("bundle"), backend="ort", threads=2, max_batch=4) as engine:
    image: eqim.Image = engine.generate(class_="forest", tokens=8, seed=1, guidance_scale=3, callback=show)
    pixels: npt.NDArray[np.uint8] = image.pixels
    tokens: npt.NDArray[np.float32] | None = image.tokens
    settings: dict[str, Any] | None = image.settings
    longer: eqim.Image = engine.outpaint(image, direction="left", keep_prefix_pixels=True, progress=True)
    future: Future[eqim.Image] = engine.submit(class_=3, num_inference_steps=4)
    longer.save("longer.png")
    future.result().save(Path("image.webp"))
    stream: eqim.Stream = engine.stream(tokens=200, tile=32, photo=pixels)
    for strip in stream:
        x: int = strip.x
        first: int | None = stream.amend(class_="water")
    latents: npt.NDArray[np.float32] = engine.encode("photo.jpg")
    decoded: eqim.Image = engine.decode(latents)
    folder: os.PathLike[str] = engine.bundle
    names: list[str] = engine.class_names
tensors: dict[str, npt.NDArray[np.float32]] = eqim.load_checkpoint("model.pth", part="generator")
eqim.export(output="bundle", generator="a.pth", tokenizer="b.ckpt", int8=True)
array = np.asarray(image)
try:
    engine.generate()
except ClosedError as error:
    base: EqimError = error
"""


def test_a_program_of_a_user(tmp_path):
    (tmp_path / "user.py").write_text(USER)
    checked = mypy(tmp_path, "--strict", "user.py")
    assert checked.returncode == 0, checked.stdout + checked.stderr


WRONG = [
    'engine.generate(tokens="8")',
    "engine.generate(guidance=3)",
    'engine.generate(direction="left")',
    "engine.generate(8)",
    'engine.outpaint("photo.png", direction="up")',
    'engine.submit(photo="photo.png")',
    "engine.submit(tokens=8).save('image.png')",
    'engine.stream(photo="photo.png").amend(seed=3)',
    "engine.stream().image.save('image.png')",
    'eqim.Engine.from_bundle("bundle", backend="tpu")',
    "engine.closed = True",
    "eqim.Image().width + 'pixels'",
    "class Mine(eqim.Engine): ...",
]


def test_mistakes_of_a_user(tmp_path):
    lines = ["import eqim", 'engine = eqim.Engine.from_bundle("bundle")', *WRONG]
    (tmp_path / "wrong.py").write_text("\n".join(lines))
    checked = mypy(tmp_path, "--strict", "wrong.py")
    found = {int(line.split(":")[1]) for line in checked.stdout.splitlines() if ": error:" in line}
    missed = [line for number, line in enumerate(lines, 1) if number > 2 and number not in found]
    assert not missed, checked.stdout


def test_stubs_are_those_of_the_module(tmp_path):
    command = [sys.executable, "-m", "mypy.stubtest", "eqim"]
    tested = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def sections(documentation):
    """The sections of a docstring in the style of NumPy."""
    lines = documentation.splitlines()
    return {line: number for number, line in enumerate(lines[:-1]) if line and set(lines[number + 1]) == {"-"}}


def test_docstrings():
    objects = [eqim, eqim.Engine, eqim.Image, eqim.Strip, eqim.Stream, eqim.load_checkpoint, eqim.export]
    for kind in (eqim.Engine, eqim.Image, eqim.Strip, eqim.Stream):
        objects += [value for name, value in vars(kind).items() if not name.startswith("_")]
    objects += [getattr(eqim, name) for name in eqim.__all__ if name.endswith("Error")]
    for one in objects:
        assert one.__doc__ and one.__doc__.strip().endswith("."), one
    parameters = sections(eqim.Engine.generate.__doc__)
    assert list(parameters) == ["Parameters", "Raises"]
    for keyword in ("class_", "tokens", "seed", "guidance_scale", "callback", "progress"):
        assert f"\n{keyword}\n" in eqim.Engine.generate.__doc__
