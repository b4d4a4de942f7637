"""Input that cannot be used raises the exceptions of the package, and never ends the interpreter."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import BUNDLE, PATIENCE, PHOTO, ROOT, printed, python
from PIL import Image as Pillow

import eqim

TINY = {"tokens": 2, "num_inference_steps": 1}
SIZES = json.loads((BUNDLE / "config.json").read_text())["model"]["generator"]
# Values of a token, and number of the classes.
WIDTH, CLASSES = SIZES["embed"], SIZES["class_num"]


def test_the_tree():
    for error in (eqim.InputError, eqim.NotFoundError, eqim.RunError, eqim.ClosedError, eqim.ChangedError):
        assert issubclass(error, eqim.EqimError)
        assert error.__module__ == "eqim.errors"
    assert not issubclass(eqim.EqimError, (ValueError, OSError, RuntimeError))
    assert issubclass(eqim.InputError, ValueError)
    assert issubclass(eqim.NotFoundError, (eqim.InputError, FileNotFoundError))
    assert issubclass(eqim.NotFoundError, FileNotFoundError)
    assert issubclass(eqim.RunError, RuntimeError)
    assert issubclass(eqim.ClosedError, eqim.RunError) and issubclass(eqim.ChangedError, eqim.RunError)


class Strange:
    """An object that says it is a number or a path, and is not."""

    def __init__(self, **methods):
        for name, result in methods.items():
            setattr(type(self), name, lambda _, result=result: result)


class Selfish(os.PathLike):
    """A path that is its own path."""

    def __fspath__(self):
        return self


def endless():
    """A list that contains itself."""
    items = []
    items.append(items)
    return items


def deep():
    """Lists in lists, more than a stack can hold."""
    items = []
    for _ in range(100_000):
        items = [items]
    return items


SETTINGS = [
    # The error names the keyword, and what was found.
    ({"class_": "cat"}, "class_ is cat"),
    ({"class_": CLASSES}, f"class_ is {CLASSES}"),
    ({"class_": -1}, "class_"),
    ({"class_": 1.0}, "class_"),
    ({"class_": True}, "class_"),
    ({"class_": [1, 2]}, "class_ is 2 classes"),
    ({"class_": "\ud800"}, "class_"),
    ({"class_": {"a": 1}}, "class_ is a dict"),
    ({"class_": b"forest"}, "class_ is a bytes"),
    ({"classes": "forest"}, "classes"),
    ({"classes": "forest:0-x"}, "classes"),
    ({"classes": "forest:1-"}, "classes"),
    ({"classes": "cat:0-"}, "classes"),
    ({"classes": "forest:0-", "class_": 1}, "classes"),
    ({"tokens": 0}, "tokens is 0"),
    ({"tokens": 1}, "tokens is 1"),
    ({"tokens": -1}, "tokens is -1"),
    ({"tokens": 2.5}, "tokens is 2.5"),
    ({"tokens": "2"}, "tokens"),
    ({"tokens": float("nan")}, "tokens is NaN"),
    ({"tokens": 1_000_001}, "tokens asks for"),
    ({"tokens": 2**62}, "tokens asks for"),
    ({"tokens": 2**64}, "tokens is outside"),
    ({"tokens": 2, "width": 32}, "tokens and width"),
    ({"width": 33}, "width is 33"),
    ({"width": 16}, "width is 16"),
    ({"width": 2**62}, "width asks for"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 2**64}, "seed is outside"),
    ({"seed": 1.5}, "seed is 1.5"),
    ({"guidance_scale": -1}, "guidance_scale is -1"),
    ({"guidance_scale": float("nan")}, "guidance_scale is NaN"),
    ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
    ({"guidance_scale": 1e300}, "guidance_scale"),
    ({"guidance_schedule": "cosine"}, "guidance_schedule"),
    ({"solver": "rk4"}, "solver"),
    ({"solver": 3}, "solver"),
    ({"num_inference_steps": 0}, "num_inference_steps is 0"),
    ({"num_inference_steps": 100_001}, "num_inference_steps is 100001"),
    ({"num_inference_steps": 2**63}, "num_inference_steps"),
    ({"tile": 3}, "tile"),
    ({"tile": "all"}, "tile"),
    ({"tile": 2**62}, "tile"),
    ({"tokens": 40, "tile": 8, "overlap": 5}, "overlap is 5"),
    ({"overlap": -1}, "overlap is -1"),
    ({"foo": 1}, "foo is not a keyword"),
    ({"cfg": 3}, "cfg is not a keyword"),
    ({"prefix": "photo.png"}, "prefix is not a keyword"),
    ({"direction": "left"}, "direction is left"),
    ({"keep_prefix_pixels": True}, "keep_prefix_pixels is true"),
    ({"class_": endless()}, "class_"),
    ({"class_": deep()}, "class_"),
]


@pytest.mark.parametrize(("settings", "text"), SETTINGS, ids=[str(index) for index in range(len(SETTINGS))])
def test_settings(engine, settings, text):
    if not {"tokens", "width"} & set(settings):
        settings = {"tokens": 2, **settings}
    settings = {"num_inference_steps": 1, **settings}
    for call in (engine.generate, engine.submit, engine.stream):
        # Streams are always in tiles.
        with pytest.raises(eqim.InputError) as caught:
            call(**settings)
        assert text in str(caught.value), caught.value


def test_a_path_that_is_its_own_path(engine):
    with pytest.raises((eqim.InputError, TypeError)):
        engine.generate(classes=Selfish())
    with pytest.raises((eqim.InputError, TypeError)):
        engine.encode(Selfish())


@pytest.mark.parametrize(
    "call",
    [
        lambda engine: engine.generate(5),
        lambda engine: engine.generate(callback=5, **TINY),
        lambda engine: engine.generate(progress=5, **TINY),
        lambda engine: engine.encode(),
        lambda engine: eqim.Engine(),
        lambda engine: eqim.Image(),
        lambda engine: eqim.Stream(),
        lambda engine: eqim.Engine.from_bundle(5),
        lambda engine: eqim.Engine.from_bundle(BUNDLE, "ort"),
        lambda engine: eqim.Engine.from_bundle(BUNDLE, threads="2"),
        lambda engine: eqim.Engine.from_bundle(BUNDLE, providers="cpu"),
        lambda engine: engine.generate(tokens=Strange(__index__="2"), num_inference_steps=1),
    ],
)
def test_wrong_types(engine, call):
    with pytest.raises((TypeError, eqim.InputError)):
        call(engine)


class Tensor:
    """A tensor of another library: it has DLPack only."""

    def __init__(self, array, device=(1, 0)):
        self.array, self.device = array, device

    def __dlpack__(self, **options):
        if self.device != (1, 0):
            raise BufferError("on another device")
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device


def truncated():
    """A picture of Pillow whose file ends too early."""
    return Pillow.open(io.BytesIO(PHOTO.read_bytes()[:5000]))


PICTURES = {
    "None": lambda: None,
    "number": lambda: 5,
    "object": lambda: object(),
    "dict": lambda: {},
    "ragged": lambda: [[1], [2, 3]],
    "bytes": lambda: b"photo.png",
    "no colours": lambda: np.zeros((256, 64), np.uint8),
    "four colours": lambda: np.zeros((256, 64, 4), np.uint8),
    "batch": lambda: np.zeros((1, 256, 64, 3), np.uint8),
    "channels first": lambda: np.zeros((3, 256, 64), np.uint8),
    "float": lambda: np.zeros((256, 64, 3)),
    "float with NaN": lambda: np.full((256, 64, 3), np.nan, np.float32),
    "signed": lambda: np.zeros((256, 64, 3), np.int8),
    "wide": lambda: np.zeros((256, 64, 3), np.uint16),
    "bool": lambda: np.zeros((256, 64, 3), bool),
    "objects": lambda: np.zeros((256, 64, 3), object),
    "text": lambda: np.zeros((256, 64, 3), "U1"),
    "record": lambda: np.zeros((256, 64, 3), [("r", "u1")]),
    "no rows": lambda: np.zeros((0, 64, 3), np.uint8),
    "no columns": lambda: np.zeros((256, 0, 3), np.uint8),
    "one token": lambda: np.zeros((256, 16, 3), np.uint8),
    "too narrow once scaled": lambda: np.zeros((1000, 20, 3), np.uint8),
    "too long": lambda: np.zeros((256, 65537, 3), np.uint8),
    "too flat": lambda: np.zeros((1, 1_000_000, 3), np.uint8),
    "huge": lambda: np.broadcast_to(np.uint8(0), (2**20, 2**20, 3)),
    "huge in one dimension": lambda: np.broadcast_to(np.uint8(0), (2**60, 1, 3)),
    "many dimensions": lambda: np.zeros((1,) * 32, np.uint8),
    "another device": lambda: Tensor(np.zeros((256, 64, 3), np.uint8), (2, 0)),
    "float tensor": lambda: Tensor(np.zeros((256, 64, 3))),
    "truncated": truncated,
    "folder": lambda: ROOT / "docs",
    "empty path": lambda: "",
    "zero byte": lambda: "a\0b.png",
    "text file": lambda: ROOT / "README.md",
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(engine, name):
    calls = [
        engine.encode,
        lambda photo: engine.outpaint(photo, tokens=300, num_inference_steps=1),
    ]
    # None is no photograph for a stream.
    if name != "None":
        calls.append(lambda photo: engine.stream(photo=photo, tokens=300, num_inference_steps=1))
    for call in calls:
        with pytest.raises(eqim.InputError) as caught:
            call(PICTURES[name]())
        assert str(caught.value)


def test_beginnings_that_leave_no_token(engine):
    for tokens in (2, 4):
        with pytest.raises(eqim.InputError, match="tokens"):
            engine.outpaint(np.zeros((256, 64, 3), np.uint8), tokens=tokens)


LATENTS = {
    "None": lambda: None,
    "text": lambda: "latents",
    "integers": lambda: np.zeros((2, WIDTH), int),
    "complex": lambda: np.zeros((2, WIDTH), complex),
    "objects": lambda: np.zeros((2, WIDTH), object),
    "bool": lambda: np.zeros((2, WIDTH), bool),
    "one token": lambda: np.zeros((1, WIDTH), np.float32),
    "no token": lambda: np.zeros((0, WIDTH), np.float32),
    "other length": lambda: np.zeros((2, WIDTH - 1), np.float32),
    "transposed": lambda: np.zeros((WIDTH, 2), np.float32),
    "flat": lambda: np.zeros(WIDTH, np.float32),
    "batch": lambda: np.zeros((1, 2, WIDTH), np.float32),
    "NaN": lambda: np.full((2, WIDTH), np.nan, np.float32),
    "one NaN": lambda: np.array([[0.0] * WIDTH, [0.0] * (WIDTH - 1) + [np.nan]]),
    "infinite": lambda: np.full((2, WIDTH), -np.inf),
    "huge": lambda: np.broadcast_to(np.float32(0), (2**40, WIDTH)),
    "another device": lambda: Tensor(np.zeros((2, WIDTH), np.float32), (2, 0)),
    "integer tensor": lambda: Tensor(np.zeros((2, WIDTH), int)),
}


@pytest.mark.parametrize("name", LATENTS)
def test_latents(engine, name):
    with pytest.raises(eqim.InputError, match="latents"):
        engine.decode(LATENTS[name]())


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_latents_that_are_infinite_as_float32(engine):
    with pytest.raises(eqim.InputError, match="finite"):
        engine.decode(np.full((2, WIDTH), 1e300))


def test_interrupts_of_other_libraries_stay(engine):
    class Interrupted(Tensor):
        def __dlpack__(self, **options):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.decode(Interrupted(None))


def test_files_that_do_not_exist(engine, tmp_path):
    calls = [
        lambda: eqim.Engine.from_bundle(tmp_path / "missing"),
        lambda: engine.encode(tmp_path / "missing.png"),
        lambda: engine.outpaint(str(tmp_path / "missing.png")),
        lambda: engine.stream(photo=tmp_path / "missing.png"),
        lambda: eqim.load_checkpoint(tmp_path / "missing.pth"),
        lambda: eqim.export(output=tmp_path / "out", generator=tmp_path / "a.pth", tokenizer=tmp_path / "b.pth"),
    ]
    for call in calls:
        with pytest.raises(FileNotFoundError) as caught:
            call()
        assert isinstance(caught.value, eqim.NotFoundError) and "missing" in str(caught.value) or ".pth" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "tpu"},
        {"backend": "trt"},
        {"backend": ""},
        {"threads": -1},
        {"threads": 2**70},
        {"threads": 1_000_000},
        {"max_batch": 0},
        {"max_batch": -1},
        {"max_batch": 100_000},
        {"max_batch": 2**70},
        {"providers": ["tpu"]},
        {"providers": [""]},
        {"providers": ["cuda:x"]},
        {"device": "cuda:0", "backend": "ort"},
        {"device": "tpu", "backend": "candle"},
        {"cuda_graph": True},
    ],
)
def test_options_of_an_engine(options):
    with pytest.raises(eqim.InputError):
        eqim.Engine.from_bundle(BUNDLE, **options)


def copy(folder):
    """A copy of the bundle, which a test may change."""
    return Path(shutil.copytree(BUNDLE, folder))


def test_folders_that_are_no_bundles(tmp_path):
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "empty").mkdir()
    bad = copy(tmp_path / "bad")
    (bad / "config.json").write_text("{")
    short = copy(tmp_path / "short")
    with open(short / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    for name in ("file", "empty", "bad", "short"):
        with pytest.raises(eqim.InputError, match=name):
            eqim.Engine.from_bundle(tmp_path / name)
    gone = copy(tmp_path / "gone")
    (gone / "decoder.onnx").unlink()
    with pytest.raises(eqim.NotFoundError, match="decoder.onnx"):
        eqim.Engine.from_bundle(gone)
    for name in ("a\0b", ""):
        with pytest.raises(eqim.InputError):
            eqim.Engine.from_bundle(name)


def append(folder):
    with open(folder / "decoder.onnx", "ab") as file:
        file.write(b"\0")


def touch(folder):
    os.utime(folder / "model.safetensors", (1, 1))


CHANGES = {
    "append": append,
    "touch": touch,
    "unlink": lambda folder: (folder / "prefill.onnx").unlink(),
    "remove": shutil.rmtree,
    "rename": lambda folder: folder.rename(folder.with_name("elsewhere")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_bundle_that_changes(tmp_path, change):
    folder = copy(tmp_path / "bundle")
    with eqim.Engine.from_bundle(folder) as engine:
        image = engine.generate(**TINY)
        latents = np.zeros((2, engine.embed_dim), np.float32)
        CHANGES[change](folder)
        calls = [
            lambda: engine.generate(**TINY),
            lambda: engine.outpaint(image),
            lambda: engine.stream(**TINY),
            lambda: engine.submit(**TINY),
            lambda: engine.encode(image),
            lambda: engine.decode(latents),
        ]
        for call in calls:
            with pytest.raises(eqim.ChangedError, match="bundle"):
                call()


def test_a_closed_engine(own):
    image = own.generate(**TINY)
    own.close()
    assert own.closed and "closed" in repr(own)
    calls = [
        lambda: own.generate(**TINY),
        lambda: own.outpaint(image),
        lambda: own.stream(**TINY),
        lambda: own.submit(**TINY),
        lambda: own.encode(image),
        lambda: own.decode(image.tokens),
    ]
    for call in calls:
        with pytest.raises(eqim.ClosedError):
            call()
    # What needs no engine stays.
    assert own.height == 256 and image._repr_png_()


def test_the_end_of_a_context(own):
    with own as engine:
        assert engine is own
    assert own.closed
    with pytest.raises(ZeroDivisionError), eqim.Engine.from_bundle(BUNDLE) as engine:
        1 / 0
    assert engine.closed


def test_streams_that_cannot_be_amended(engine):
    stream = engine.stream(tokens=300, num_inference_steps=1)
    next(stream)
    for classes in ({"class_": "cat"}, {"classes": "forest:0-1"}, {"class_": [1, 2]}, {"class_": endless()}):
        with pytest.raises(eqim.InputError):
            stream.amend(**classes)
    with pytest.raises((eqim.InputError, TypeError)):
        stream.amend(seed=3)
    # The image goes on.
    assert list(stream) and stream.image.width == 4800


def test_files_that_cannot_be_written(engine, tmp_path):
    image = engine.generate(**TINY)
    for name in ("image", "image.bmp", "image.tar.gz", ""):
        with pytest.raises(eqim.InputError):
            image.save(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "folder.png", tmp_path / "missing" / "image.png", "a\0.png"):
        with pytest.raises(eqim.EqimError):
            image.save(path)
    assert os.listdir(tmp_path) == ["folder.png"]


def test_checkpoints(tmp_path):
    tensors = eqim.load_checkpoint(ROOT / "assets/demo/model.safetensors")
    assert tensors and all(tensor.dtype == np.float32 and np.isfinite(tensor).all() for tensor in tensors.values())
    half = eqim.load_checkpoint(ROOT / "assets/demo/model.safetensors", part="generator")
    assert set(half) < set(tensors)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\xff" * 100)
    calls = [
        lambda: eqim.load_checkpoint(bad),
        lambda: eqim.load_checkpoint(bad, part="decoder"),
        lambda: eqim.load_checkpoint(bad, weights="all"),
        lambda: eqim.load_checkpoint(bad, heads=-1),
        lambda: eqim.load_checkpoint(tmp_path),
        lambda: eqim.export(output=tmp_path / "out"),
        lambda: eqim.export(output=tmp_path / "out", foo=1),
        lambda: eqim.export(output=tmp_path / "out", generator=bad, tokenizer=bad),
        lambda: eqim.export(output=tmp_path / "out", generator=endless(), tokenizer=bad),
        lambda: eqim.export(output=tmp_path / "out", random="enormous"),
    ]
    for call in calls:
        with pytest.raises(eqim.InputError):
            call()
    assert not (tmp_path / "out").exists()


def test_export(engine, tmp_path):
    model = ROOT / "assets/demo/model.safetensors"
    folder = eqim.export(output=tmp_path / "bundle", generator=model, tokenizer=model, no_validate=True)
    assert folder == tmp_path / "bundle"
    with eqim.Engine.from_bundle(folder) as exported:
        assert np.array_equal(exported.generate(**TINY).pixels, engine.generate(**TINY).pixels)


MEMORY = """
import resource, sys
import numpy as np
import eqim

engine = eqim.Engine.from_bundle(sys.argv[1], threads=1)
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
# Allocations fail from here on as on a machine with this much memory.
resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, used + 2**31))
for call in (
    lambda: engine.generate(tokens=1_000_000, num_inference_steps=1),
    lambda: engine.submit(tokens=1_000_000, num_inference_steps=1),
    lambda: engine.stream(tokens=1_000_000, num_inference_steps=1),
    lambda: engine.generate(tokens=200_000, tile="none", num_inference_steps=1),
    lambda: engine.decode(np.zeros((100_000, int(sys.argv[2])), np.float32)),
):
    try:
        call()
    except eqim.EqimError:
        print("raised")
engine.generate(tokens=2, num_inference_steps=1)
"""


def test_images_that_do_not_fit_in_memory():
    assert printed(MEMORY, BUNDLE, WIDTH).split() == ["raised"] * 5


@pytest.mark.parametrize("seed", [1])
def test_random_calls_in_one_process(seed):
    script = Path(__file__).with_name("random_calls.py")
    command = [sys.executable, "-X", "faulthandler", script, str(BUNDLE), str(seed), "10000"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=10 * PATIENCE)
    assert process.returncode == 0, f"exit code {process.returncode}\n{process.stdout[-3000:]}\n{process.stderr[-3000:]}"
    assert "panicked" not in process.stderr


def test_warnings_without_onnxruntime():
    # Without the package, and without a library of the system, Candle takes over with a warning.
    script = """
import importlib.util, sys, warnings
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "onnxruntime" else found(name, *rest)
import eqim
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    engine = eqim.Engine.from_bundle(sys.argv[1])
print(engine.backend, [one.category.__name__ for one in caught], [one.filename for one in caught])
warnings.simplefilter("error")
try:
    eqim.Engine.from_bundle(sys.argv[1])
except RuntimeWarning:
    print("raised")
try:
    eqim.Engine.from_bundle(sys.argv[1], backend="ort")
except eqim.EqimError as error:
    print(type(error).__name__)
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("ORT_DYLIB_PATH", "LD_LIBRARY_PATH")}
    command = [sys.executable, "-c", script, str(BUNDLE)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, cwd="/")
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == ["Candle ['RuntimeWarning'] ['<string>']", "raised", "RunError"]
