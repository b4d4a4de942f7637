"""Images from Python are those of eqim-run, byte for byte."""

import json
import re

import numpy as np
import pytest
from conftest import BUNDLE, PHOTO, levels, read
from PIL import Image as Pillow

import eqim

# Keywords, and the flags of eqim-run for the same image.
SAME = [
    ({}, []),
    (
        {"class_": "forest", "seed": 7, "tokens": 8, "guidance_scale": 3.0},
        ["--class", "forest", "--seed", 7, "--tokens", 8, "--cfg", 3],
    ),
    (
        {"class_": 2, "width": 96, "solver": "ab2", "num_inference_steps": 9},
        ["--class", 2, "--width", 96, "--solver", "ab2", "--steps", 9],
    ),
    (
        {"classes": "forest:0-8,water:5-", "tokens": 12, "guidance_scale": 4, "guidance_schedule": "constant"},
        ["--classes", "forest:0-8,water:5-", "--tokens", 12, "--cfg", 4, "--cfg-schedule", "constant"],
    ),
    (
        {"class_": "sky", "tokens": 40, "tile": 16, "overlap": 3, "num_inference_steps": 8},
        ["--class", "sky", "--tokens", 40, "--tile", 16, "--overlap", 3, "--steps", 8],
    ),
    (
        {"class_": "none", "tokens": 20, "tile": "none", "num_inference_steps": 8},
        ["--class", "none", "--tokens", 20, "--tile", "none", "--steps", 8],
    ),
    ({"seed": 2**64 - 1, "tokens": 4}, ["--seed", 2**64 - 1, "--tokens", 4]),
]


@pytest.mark.parametrize(("keywords", "flags"), SAME)
def test_generate(engine, eqim_run, keywords, flags):
    image = engine.generate(**keywords)
    assert isinstance(image, eqim.Image)
    expected = eqim_run(*flags)
    assert np.array_equal(image.pixels, read(expected))
    # eqim-run writes the tiles of a PNG row by row, with other filters.
    if not isinstance(keywords.get("tile"), int):
        assert image._repr_png_() == expected.read_bytes()


@pytest.mark.parametrize("direction", ["left", "right"])
@pytest.mark.parametrize("keep", [False, True])
def test_outpaint(engine, eqim_run, direction, keep):
    settings = {"class_": "mountain", "tokens": 26, "seed": 5, "guidance_scale": 2.5, "num_inference_steps": 12}
    image = engine.outpaint(PHOTO, direction=direction, keep_prefix_pixels=keep, **settings)
    flags = ["--class", "mountain", "--tokens", 26, "--seed", 5, "--cfg", 2.5, "--steps", 12]
    flags += ["--prefix", PHOTO, "--direction", direction, *(["--keep-prefix-pixels"] if keep else [])]
    assert np.array_equal(image.pixels, read(eqim_run(*flags)))


def test_all_kinds_of_photographs_give_the_same_image(engine, tmp_path):
    # A PNG, because decoders of JPEG differ.
    path = tmp_path / "photo.png"
    picture = Pillow.open(PHOTO).convert("RGB")
    picture.save(path)
    pixels = np.array(picture)
    expected = engine.outpaint(path, num_inference_steps=2).pixels
    for photo in (str(path), picture, pixels, memoryview(pixels)):
        assert np.array_equal(engine.outpaint(photo, num_inference_steps=2).pixels, expected)


def test_an_image_can_be_continued(engine):
    image = engine.generate(class_="water", tokens=8, num_inference_steps=2)
    longer = engine.outpaint(image, class_="water", num_inference_steps=2)
    # By default 16 tokens are added.
    assert longer.width == image.width + 16 * engine.token_width
    assert np.array_equal(longer.pixels, engine.outpaint(image.pixels, class_="water", num_inference_steps=2).pixels)


@pytest.mark.parametrize(
    "settings",
    [
        {"tokens": 150, "class_": "field"},
        {"tokens": 30, "tile": 8, "overlap": 2},
        {"photo": PHOTO, "tokens": 40, "tile": 12, "keep_prefix_pixels": True},
        {"photo": PHOTO, "tokens": 40, "tile": 12, "direction": "left"},
    ],
)
def test_strips_assemble_to_the_image(engine, settings):
    stream = engine.stream(num_inference_steps=2, **settings)
    assert isinstance(stream, eqim.Stream)
    assert stream.total == settings["tokens"]
    assert stream.image is None
    width = settings["tokens"] * engine.token_width
    whole = np.zeros((engine.height, width, 3), np.uint8)
    is_written = np.zeros(width, bool)
    strips = 0
    for strip in stream:
        assert isinstance(strip, eqim.Strip)
        columns = slice(strip.x, strip.x + strip.pixels.shape[1])
        assert not is_written[columns].any(), "a column is final when it comes"
        is_written[columns] = True
        whole[:, columns] = strip.pixels
        assert strip.to_pil().size == (strip.pixels.shape[1], engine.height)
        strips += 1
    assert strips > 1 and is_written.all()
    assert np.array_equal(stream.image.pixels, whole)
    assert list(stream) == []
    # The same settings without a stream, in tiles of the same size.
    settings = {"tile": 64, **settings}
    photo = settings.pop("photo", None)
    if photo is None:
        image = engine.generate(num_inference_steps=2, **settings)
    else:
        image = engine.outpaint(photo, num_inference_steps=2, **settings)
    assert np.array_equal(image.pixels, whole)
    assert np.array_equal(image.tokens, stream.image.tokens)


def test_a_stream_that_is_closed_ends(engine):
    stream = engine.stream(tokens=100_000, num_inference_steps=1)
    next(stream)
    stream.close()
    assert list(stream) == [] and stream.image is None
    stream.close()


def test_amended_classes(engine):
    settings = {"tokens": 200, "seed": 3, "guidance_scale": 3, "num_inference_steps": 2}
    stream = engine.stream(class_="forest", **settings)
    strips = [next(stream)]
    first = stream.amend(class_="water")
    strips += stream
    # The first strip is of the tile of tokens 0 to 63.
    assert 64 <= first <= 200
    again = engine.stream(classes=f"forest:0-{first},water:{first}-", **settings)
    assert [strip.x for strip in again] == [strip.x for strip in strips]
    assert levels(stream.image, again.image) <= 1
    assert stream.amend(class_="sky") is None
    other = engine.stream(class_="forest", **settings)
    list(other)
    assert not np.array_equal(stream.image.tokens, other.image.tokens)


def test_futures(engine):
    settings = [{"class_": index % 5, "seed": index, "tokens": 4 + index, "num_inference_steps": 4} for index in range(6)]
    alone = [engine.submit(**one).result() for one in settings]
    for image, one in zip(alone, settings):
        assert np.array_equal(image.pixels, engine.generate(**one).pixels)
    futures = [engine.submit(**one) for one in settings]
    for future, image in zip(futures, alone):
        assert levels(future.result(), image) <= 1


def test_latents(engine):
    scale = json.loads((BUNDLE / "config.json").read_text())["model"]["generator"]["vae_norm"]
    image = engine.generate(class_="forest", tokens=6)
    assert image.tokens.dtype == np.float32 and image.tokens.shape == (6, engine.embed_dim)
    decoded = engine.decode(image.tokens / np.float32(scale))
    assert levels(decoded, image) <= 1
    assert decoded.tokens is None and decoded.settings is None

    latents = engine.encode(PHOTO)
    assert latents.dtype == np.float32 and latents.shape[1] == engine.embed_dim
    longer = engine.outpaint(PHOTO, tokens=len(latents) + 2, num_inference_steps=1)
    assert np.allclose(longer.tokens[: len(latents)], latents * scale, rtol=1e-5, atol=1e-6)
    # The tokenizer loses detail.
    height, width = engine.height, len(latents) * engine.token_width
    assert engine.decode(latents).pixels.shape == (height, width, 3)


def test_jobs_give_the_files_of_eqim_run(engine, eqim_run, tmp_path):
    jobs = [
        {"id": "a", "class": "forest", "tokens": 5, "steps": 3, "cfg": 2.1, "seed": 3},
        {"id": "b", "classes": "field:0-3,sky:3-", "tokens": 6, "steps": 3},
        {"id": "c", "prefix": str(PHOTO), "direction": "left", "tokens": 30, "steps": 2, "keep_prefix_pixels": True},
    ]
    lines = [json.dumps(job) for job in jobs]
    (tmp_path / "jobs.jsonl").write_text("\n".join(lines))
    # The path of the image is the folder here.
    folder = eqim_run("--jobs", tmp_path / "jobs.jsonl", "--max-batch", 1)
    for line, job in zip(lines, jobs, strict=True):
        name, future = engine.submit_job(line)
        png, record = future.result().files(name)
        assert name == job["id"]
        assert png == (folder / f"{name}.png").read_bytes()
        assert record == (folder / f"{name}.json").read_text()


def test_jobs_that_do_not_fit_are_refused(engine):
    for job, problem in [
        ("[]", "a job: invalid type: sequence"),
        ('{"cfg": -1}', "cfg is -1, expected"),
        ('{"size": 3}', "size: is not a setting, expected one of cfg, "),
        ('{"id": "../a"}', "id: is"),
        ('{"class": [1, 2]}', "class is 2 classes, expected one"),
        ('{"prefix": "missing.png"}', "prefix missing.png: No such file"),
    ]:
        with pytest.raises(eqim.InputError, match=re.escape(problem)):
            engine.submit_job(job)
    with pytest.raises(eqim.InputError, match="the image was not generated"):
        engine.decode(np.zeros((2, engine.embed_dim), np.float32)).files("a")


def test_settings_make_the_same_image_again(engine):
    given = {"class_": "forest", "tokens": 5, "seed": 9, "guidance_scale": 2.5, "num_inference_steps": 3}
    image = engine.generate(**given)
    # As eqim-run records them: the number of the class, and all defaults.
    assert image.settings == {
        "class": engine.class_names.index("forest"),
        "tokens": 5,
        "seed": 9,
        "cfg": 2.5,
        "cfg_schedule": "linear",
        "steps": 3,
        "solver": "euler",
        "direction": "right",
        "keep_prefix_pixels": False,
        "tile": "none",
    }
    keywords = {
        "class": "class_",
        "cfg": "guidance_scale",
        "cfg_schedule": "guidance_schedule",
        "steps": "num_inference_steps",
    }
    again = engine.generate(**{keywords.get(name, name): value for name, value in image.settings.items()})
    assert np.array_equal(again.pixels, image.pixels)


def test_files(engine, tmp_path):
    image = engine.generate(class_="water", tokens=4, num_inference_steps=4)
    for suffix in ("png", "PNG", "webp"):
        image.save(tmp_path / f"image.{suffix}")
        assert np.array_equal(read(tmp_path / f"image.{suffix}"), image.pixels)
    for suffix in ("jpg", "jpeg"):
        image.save(str(tmp_path / f"image.{suffix}"))
        difference = np.abs(read(tmp_path / f"image.{suffix}").astype(int) - image.pixels)
        assert difference.mean() < 4
    formats = {path.name: Pillow.open(path).format for path in tmp_path.iterdir()}
    assert formats == {
        "image.png": "PNG",
        "image.PNG": "PNG",
        "image.webp": "WEBP",
        "image.jpg": "JPEG",
        "image.jpeg": "JPEG",
    }


def test_pictures_for_pillow_and_notebooks(engine):
    image = engine.generate(tokens=4, num_inference_steps=2)
    picture = image.to_pil()
    assert picture.mode == "RGB" and picture.size == (image.width, image.height) == (4 * engine.token_width, engine.height)
    assert np.array_equal(picture, image.pixels)
    assert image._repr_png_().startswith(b"\x89PNG\r\n")
    assert repr(image) == f"<eqim.Image {image.width}x{image.height}>"


def test_pixels_are_read_without_a_copy(engine):
    image = engine.generate(tokens=2, num_inference_steps=1)
    assert image.pixels.dtype == np.uint8 and image.pixels.flags.c_contiguous
    views = [np.asarray(image), np.asarray(image, dtype=np.uint8), np.from_dlpack(image)]
    views.append(np.asarray(memoryview(image.pixels)))
    for view in views:
        assert np.shares_memory(view, image.pixels)
    assert not np.shares_memory(np.array(image), image.pixels)
    assert np.asarray(image, dtype=np.float32).dtype == np.float32


def test_pixels_outlive_their_image(engine):
    image = engine.generate(tokens=2, num_inference_steps=1)
    expected = image.pixels.tobytes()
    views = [np.asarray(image), np.from_dlpack(image), image.to_pil()]
    del image
    for _ in range(20):
        engine.generate(tokens=2, seed=1, num_inference_steps=1)
    assert all(np.asarray(view).tobytes() == expected for view in views)


def test_progress(engine, capsys):
    calls = []
    engine.generate(tokens=5, num_inference_steps=1, callback=lambda known, total: calls.append((known, total)))
    assert calls == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    calls.clear()
    latents = engine.encode(PHOTO)
    total = len(latents) + 3
    engine.outpaint(PHOTO, tokens=total, num_inference_steps=1, callback=lambda known, total: calls.append((known, total)))
    assert calls[-3:] == [(total - 2, total), (total - 1, total), (total, total)]
    engine.generate(tokens=5, num_inference_steps=1, progress=True)
    assert "5/5" in capsys.readouterr().err


def test_what_a_callback_raises_cancels_the_image(engine):
    class Stop(Exception):
        pass

    calls = []

    def stop(known, total):
        calls.append(known)
        if known == 3:
            raise Stop

    with pytest.raises(Stop):
        engine.generate(tokens=100_000, num_inference_steps=1, callback=stop)
    # The engine is free for the next image.
    engine.generate(tokens=2, num_inference_steps=1)
    assert calls == [1, 2, 3]


def test_properties(engine):
    config = json.loads((BUNDLE / "config.json").read_text())["model"]
    assert engine.class_names == config["generator"]["class_names"]
    assert engine.num_classes == config["generator"]["class_num"]
    assert engine.embed_dim == config["generator"]["embed"]
    assert (engine.height, engine.token_width, engine.precision) == (256, 16, "fp32")
    assert engine.bundle == BUNDLE and not engine.closed
    assert str(BUNDLE) in repr(engine) and engine.backend in repr(engine)


def test_candle_makes_nearly_the_same_image(engine):
    settings = {"class_": "forest", "tokens": 4, "num_inference_steps": 4}
    with eqim.Engine.from_bundle(BUNDLE, backend="candle") as candle:
        assert candle.backend == "Candle"
        assert levels(candle.generate(**settings), engine.generate(**settings)) <= 1
