"""Makes random calls in one process, most of them with bad input.

    python tests/python/random_calls.py BUNDLE SEED COUNT

Fails if anything but EqimError or TypeError comes out, or if memory grows.
"""

import collections
import io
import os
import random
import sys
import tempfile
from pathlib import Path

import numpy as np

import eqim

draw = random.Random()


class Evil:
    """An object whose methods return the wrong thing or raise."""

    def __init__(self):
        self.choice = draw.randrange(4)

    def _result(self):
        if self.choice == 0:
            raise TypeError("evil")
        return [None, "text", -1, self][self.choice]

    __index__ = __float__ = __fspath__ = __array__ = __dlpack_device__ = lambda self, *a, **k: self._result()

    def __dlpack__(self, **options):
        return self._result()

    def convert(self, mode):
        return self._result()


def endless():
    items = []
    items.append(items)
    return items


def anything():
    """A value that fits nearly nowhere."""
    values = [
        None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**70), 10**400,
        0.0, -0.0, 1.5, 1e-300, 1e300, float("nan"), float("inf"), float("-inf"), 1j,
        "", "x", "1", "-1", "none", "None", "forest", "forest:0-", "forest:0-1,water:1-", "0:0-,1:1-", "::", "left", "right", "linear",
        "constant", "euler", "ab2", "dpm2", "a\0b", "\ud800", "é" * 50, "x" * 100_000, ":" * 1000, "1:0-" * 500,
        b"", b"x", bytearray(3), memoryview(b"abc"), (), [], [1], [1, 2], ["forest"], [[1]], {}, {1}, {"a": 1}, range(3), object(), type, len,
        Ellipsis, NotImplemented, endless(), Evil(), Path("x"), np.int8(2), np.uint64(2**63), np.float16(1.5), np.bool_(True),
        np.str_("forest"), np.array(2), np.array([2]), np.array(None), np.datetime64("2020"),
    ]  # fmt: skip
    return draw.choice(values)


def shape(*fitting):
    """A shape that is nearly right, or small and random."""
    if draw.random() < 0.3:
        return [draw.choice([0, 1, 2, 3, 5]) for _ in range(draw.randrange(6))]
    changed = list(fitting)
    if draw.random() < 0.5:
        place = draw.randrange(len(changed))
        # Not 1: a picture with one row is long at the height of the model.
        changed[place] = draw.choice([0, changed[place] - 1, changed[place] + 1, 2 * changed[place]])
    if draw.random() < 0.1:
        draw.shuffle(changed)
    return changed


DTYPES = ["u1", "i1", "u2", "i8", "f2", "f4", "f8", ">f4", ">u2", "g", "c8", "?", "O", "S1", "U1", "M8[s]", [("a", "u1"), ("b", "f4")]]


def array(dtype, *fitting):
    """An array that is nearly right."""
    dtype = dtype if draw.random() < 0.5 else draw.choice(DTYPES)
    made = np.zeros(shape(*fitting), dtype)
    if made.dtype.kind == "f" and made.size and draw.random() < 0.3:
        made.flat[draw.randrange(made.size)] = draw.choice([np.nan, np.inf, -np.inf, 1e4])
    change = draw.randrange(8)
    if change == 0:
        made = np.asfortranarray(made)
    elif change == 1 and made.ndim:
        made = made[::-1]
    elif change == 2 and made.ndim > 1:
        made = made[:, ::2]
    elif change == 3:
        made.flags.writeable = False
    elif change == 4:
        made = np.broadcast_to(made, (2, *made.shape))
    elif change == 5:
        made = made.T
    elif change == 6 and made.dtype.kind in "uif" and made.dtype.isnative:
        made = Tensor(made)
    return made


class Tensor:
    """A tensor of another library: it has DLPack only."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return draw.choice([(1, 0), (1, 0), (1, 0), (2, 0), (99, -1)])


def settings(valid):
    """Keywords of a tiny image, some of which do not fit."""
    made = {"tokens": 2, "num_inference_steps": 1}
    if draw.random() < 0.5:
        made["class_"] = draw.choice([0, 4, "forest", "none", None])
    if draw.random() < 0.3:
        made["seed"] = draw.getrandbits(64)
    if draw.random() < 0.2:
        made["guidance_scale"] = draw.choice([0, 1, 1.5, 3])
    names = [
        "class_", "classes", "tokens", "width", "seed", "guidance_scale", "guidance_schedule", "solver", "num_inference_steps", "tile",
        "overlap", "direction", "keep_prefix_pixels", "prefix", "callback", "progress", "photo", "cfg", "x", "__class__",
    ]  # fmt: skip
    for _ in range(0 if valid else draw.randrange(1, 4)):
        name = draw.choice(names)
        value = anything()
        # These are valid, and take long.
        is_long = isinstance(value, (int, np.integer)) and value > 1000
        if name in ("tokens", "width", "num_inference_steps") and is_long and value <= 2**31:
            continue
        # A bar that is shown is no error.
        if name == "progress" and value is True:
            continue
        made[name] = value
    return made


def picture():
    """A photograph that is nearly right."""
    choice = draw.randrange(10)
    if choice < 6:
        return array("u1", 256, 48, 3)
    if choice < 7:
        return draw.choice([Path("README.md"), "missing.png", "", ".", "/dev/null", "a\0b"])
    return anything()


def consume(stream):
    """Uses a stream in some way."""
    for _ in range(draw.randrange(4)):
        action = draw.randrange(5)
        if action == 0:
            next(stream, None)
        elif action == 1:
            list(stream)
        elif action == 2:
            stream.amend(class_=anything())
        elif action == 3:
            stream.amend(**{draw.choice(["class_", "classes", "seed", "x"]): anything()})
        else:
            stream.close()


def call(engine, folder, bundle):
    """Makes a random call."""
    valid = draw.random() < 0.1
    choice = draw.randrange(100)
    if choice < 25:
        engine.generate(**settings(valid))
    elif choice < 40:
        future = engine.submit(**settings(valid))
        if draw.random() < 0.3:
            future.cancel()
        else:
            future.result(60)
    elif choice < 55:
        consume(engine.stream(**settings(valid)))
    elif choice < 65:
        engine.encode(picture())
    elif choice < 75:
        engine.decode(array("f4", 2, engine.embed_dim) if draw.random() < 0.8 else anything())
    elif choice < 82:
        keywords = settings(valid)
        keywords.pop("photo", None)
        engine.outpaint(picture(), **{**keywords, "tokens": 5})
    elif choice < 88:
        image = engine.decode(np.zeros((2, engine.embed_dim), np.float32))
        name = draw.choice(["a.png", "a.bmp", "a", "b/a.png", "a\0.png", "a.webp", "."])
        image.save(folder / name if draw.random() < 0.9 else Path("x") / "y" / name)
    elif choice < 92:
        eqim.load_checkpoint(
            draw.choice([folder / "bad.pth", folder / "bad.safetensors", folder, "missing", anything()]),
            **{draw.choice(["part", "weights", "heads", "x"]): anything()},
        )
    elif choice < 95:
        eqim.export(output=folder / "out", **{draw.choice(["generator", "tokenizer", "dtype", "x", "int8"]): anything()})
    elif choice < 99:
        options = ["backend", "threads", "providers", "provider_library", "device", "cuda_graph", "max_batch", "x"]
        where = draw.choice([folder, "missing", folder / "bad.pth", anything(), bundle])
        # An option that fits opens the bundle, which is a valid call too.
        eqim.Engine.from_bundle(where, **{draw.choice(options): anything()}).close()
    else:
        closed = eqim.Engine.from_bundle(bundle, backend="candle")
        closed.close()
        draw.choice([closed.generate, closed.submit, closed.stream])(**settings(False))


def resident():
    """Resident memory in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main():
    bundle, seed, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    draw.seed(seed)
    outcomes = collections.Counter()
    before = None
    with tempfile.TemporaryDirectory() as name, eqim.Engine.from_bundle(bundle) as engine:
        folder = Path(name)
        os.chdir(folder)
        for suffix in ("pth", "safetensors"):
            (folder / f"bad.{suffix}").write_bytes(io.BytesIO(b"\x80\x02" * 300).getvalue())
        for number in range(count):
            # The state of the calls so far does not matter for this one.
            draw.seed(seed * 1_000_003 + number)
            try:
                call(engine, folder, bundle)
                outcomes["made"] += 1
            except (eqim.EqimError, TypeError) as error:
                assert str(error), repr(error)
                outcomes[type(error).__name__] += 1
            except BaseException:
                print(f"call {number}", flush=True)
                raise
            if number == count // 5:
                before = resident()
        engine.generate(tokens=2, num_inference_steps=1)
        grown = resident() - before
        print(dict(outcomes), f"{grown / 1e6:.1f} MB", flush=True)
        assert outcomes["made"] > count / 100 and outcomes["InputError"] > count / 4, outcomes
        # 54 to 222 MB with 3,000 to 20,000 calls, without a trend: engines that are open take about 100 MB.
        assert grown < 400e6, grown


if __name__ == "__main__":
    main()
