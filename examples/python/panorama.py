"""Generates a panorama that passes through several classes, and prints its strips as they become final.

python examples/python/panorama.py demo/bundle panorama.png
"""

import sys
from pathlib import Path

import eqim


def course(names: list[str], length: int, overlap: int) -> str:
    """Classes one after the other, each of which fades into the next."""
    last = len(names) - 1
    spans = [
        f"{name}:{max(0, number * length - overlap)}-{'' if number == last else (number + 1) * length}"
        for number, name in enumerate(names)
    ]
    return ",".join(spans)


def panorama(engine: eqim.Engine, length: int = 40, seed: int = 7) -> eqim.Image:
    """The panorama of all classes of a model, `length` tokens of each."""
    classes = course(engine.class_names, length, length // 4)
    stream = engine.stream(classes=classes, tokens=length * engine.num_classes, seed=seed, guidance_scale=3.0)
    width = stream.total * engine.token_width
    for strip in stream:
        print(f"{strip.x + strip.pixels.shape[1]} of {width} columns")
    image = stream.image
    assert image is not None
    return image


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    bundle, output = map(Path, sys.argv[1:])
    try:
        with eqim.Engine.from_bundle(bundle) as engine:
            panorama(engine).save(output)
    except eqim.EqimError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
