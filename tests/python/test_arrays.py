"""Arrays, tensors and pictures of other libraries."""

import array
import ctypes

import numpy as np
import pytest
from conftest import levels
from PIL import Image as Pillow

SEED = 5


@pytest.fixture(scope="module")
def pixels(engine):
    """A photograph as wide as three tokens, with noise in it: mistakes of order and stride change its latents."""
    generator = np.random.default_rng(SEED)
    return generator.integers(0, 256, (engine.height, 3 * engine.token_width, 3), np.uint8)


@pytest.fixture(scope="module")
def latents(engine):
    generator = np.random.default_rng(SEED)
    return generator.standard_normal((3, engine.embed_dim)).astype(np.float32)


class Tensor:
    """A tensor of another library: it has DLPack, and neither the buffer protocol nor __array__."""

    def __init__(self, values):
        self.values, self.calls = values, 0

    def __dlpack__(self, **options):
        self.calls += 1
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()


class OldTensor(Tensor):
    """A tensor of a library that has the first version of DLPack."""

    def __dlpack__(self, *, stream=None):
        self.calls += 1
        return self.values.__dlpack__()


class Lazy:
    """An object with __array__ only."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)


def strided(values):
    """Views with the same values, in other orders in memory."""
    wide = np.zeros((values.shape[0], 2 * values.shape[1], *values.shape[2:]), values.dtype)
    wide[:, ::2] = values
    padded = np.zeros([size + 3 for size in values.shape], values.dtype)
    inner = padded[tuple(slice(1, 1 + size) for size in values.shape)]
    inner[...] = values
    reverse = (slice(None, None, -1),) * values.ndim
    raw = bytearray(b"\0" + values.tobytes())
    unaligned = np.frombuffer(raw, values.dtype, offset=1).reshape(values.shape)
    fixed = values.copy()
    fixed.flags.writeable = False
    return {
        "fortran": np.asfortranarray(values),
        "every second": wide[:, ::2],
        "slice": inner,
        "negative": np.ascontiguousarray(values[reverse])[reverse],
        "transposed": np.ascontiguousarray(values.T).T,
        "unaligned": unaligned,
        "read-only": fixed,
        "bytes": np.frombuffer(values.tobytes(), values.dtype).reshape(values.shape),
        "subclass": values.view(type("Special", (np.ndarray,), {})),
    }


NAMES = list(strided(np.zeros((2, 2, 3), np.uint8)))


@pytest.mark.parametrize("name", NAMES)
def test_pictures_of_any_stride(engine, pixels, name):
    view = strided(pixels)[name]
    assert np.array_equal(view, pixels)
    assert np.array_equal(engine.encode(view), engine.encode(pixels))


@pytest.mark.parametrize("name", NAMES)
def test_latents_of_any_stride(engine, latents, name):
    view = strided(latents)[name]
    assert np.array_equal(view, latents)
    assert np.array_equal(engine.decode(view).pixels, engine.decode(latents).pixels)


def test_one_row_many_times(engine, latents):
    row = np.broadcast_to(latents[0], (4, engine.embed_dim))
    assert np.array_equal(engine.decode(row).pixels, engine.decode(row.copy()).pixels)
    column = np.broadcast_to(np.array([[[9, 80, 200]]], np.uint8), (engine.height, 48, 3))
    assert np.array_equal(engine.encode(column), engine.encode(column.copy()))


@pytest.mark.parametrize("dtype", ["f8", ">f4", ">f8", "f2", "g"])
def test_floating_point_types(engine, latents, dtype):
    converted = latents.astype(dtype)
    expected = engine.decode(converted.astype(np.float32))
    assert np.array_equal(engine.decode(converted).pixels, expected.pixels)


def test_arrays_are_not_changed(engine, pixels, latents):
    before = pixels.tobytes(), latents.tobytes()
    engine.encode(pixels)
    engine.outpaint(pixels, tokens=5, direction="left", num_inference_steps=1)
    engine.decode(latents)
    assert (pixels.tobytes(), latents.tobytes()) == before


@pytest.mark.parametrize("kind", [Tensor, OldTensor])
def test_dlpack(engine, pixels, latents, kind):
    tensor = kind(pixels)
    assert np.array_equal(engine.encode(tensor), engine.encode(pixels))
    assert tensor.calls == 1
    assert np.array_equal(engine.encode(kind(np.asfortranarray(pixels))), engine.encode(pixels))
    expected = engine.decode(latents).pixels
    for values in (latents, latents.astype(np.float64), np.asfortranarray(latents)):
        assert np.array_equal(engine.decode(kind(values)).pixels, expected)


def test_the_buffer_protocol(engine, pixels, latents):
    expected = engine.encode(pixels)
    flat = array.array("B", pixels.tobytes())
    memory = (ctypes.c_uint8 * pixels.size).from_buffer_copy(pixels.tobytes())
    for view in (memoryview(flat), memoryview(pixels.tobytes()), memoryview(memory)):
        assert np.array_equal(engine.encode(view.cast("B").cast("B", pixels.shape)), expected)
    floats = memoryview(latents.tobytes()).cast("f", latents.shape)
    assert np.array_equal(engine.decode(floats).pixels, engine.decode(latents).pixels)


def test_what_numpy_converts(engine, pixels, latents):
    assert np.array_equal(engine.encode(Lazy(pixels)), engine.encode(pixels))
    assert np.array_equal(engine.decode(latents.tolist()).pixels, engine.decode(latents).pixels)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_modes_of_pillow(engine, pixels, mode):
    picture = Pillow.fromarray(pixels).convert("RGBA" if mode == "PA" else "RGB")
    if mode == "RGBA":
        picture.putalpha(Pillow.fromarray(pixels[:, :, 0]))
    picture = picture.convert(mode)
    assert picture.mode == mode
    expected = np.array(picture.convert("RGB"))
    assert np.array_equal(engine.encode(picture), engine.encode(expected))


def test_a_palette_with_transparency(engine, pixels, tmp_path):
    picture = Pillow.fromarray(pixels).quantize(16)
    picture.info["transparency"] = 0
    picture.save(tmp_path / "palette.png", transparency=0)
    with Pillow.open(tmp_path / "palette.png") as opened:
        assert opened.mode == "P"
        assert np.array_equal(engine.encode(opened), engine.encode(np.array(opened.convert("RGB"))))


def test_an_image_as_an_array(engine, pixels):
    image = engine.decode(engine.encode(pixels))
    assert np.asarray(image).shape == (image.height, image.width, 3)
    assert image.__dlpack_device__() == (1, 0)
    assert np.shares_memory(np.from_dlpack(image), image.pixels)
    assert np.shares_memory(image.__array__(), image.pixels)
    assert np.shares_memory(image.__array__(np.dtype("u1")), image.pixels)
    assert not np.shares_memory(image.__array__(copy=True), image.pixels)
    assert not np.shares_memory(image.__array__(np.dtype("u1"), copy=True), image.pixels)
    assert np.array_equal(np.asarray(image, np.float64), image.pixels)
    with pytest.raises(ValueError):
        image.__array__(np.dtype("f4"), copy=False)
    # Arrays can be changed, and the image shows it.
    np.asarray(image)[:] = 7
    assert np.array(image.to_pil()).max() == 7
    assert (np.asarray(image) == 7).all() and levels(engine.encode(image), engine.encode(np.full_like(image.pixels, 7))) == 0


@pytest.mark.filterwarnings("ignore:Setting the shape")
def test_an_image_keeps_its_shape(engine, pixels):
    # Arrays can be given another shape in place.
    image = engine.decode(engine.encode(pixels))
    size = (image.width, image.height)
    for flat in (image.pixels, image.__array__()):
        flat.shape = (-1,)
    assert (image.width, image.height) == size and image.to_pil().size == size
    assert image._repr_png_() and repr(image) and image.pixels.ndim == 3
