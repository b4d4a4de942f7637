"""Writes the sets of features, the images and the expected values that the tests of `eqim-eval` read.

Usage: python3 tests/evaluation/reference.py

Needs torch-fidelity, prdc, clean-fid, SciPy, scikit-learn, Pillow and safetensors. `expected.json` names the versions.
Every value of a package is computed again in float64 with NumPy. The script stops if the two differ.
"""

import importlib.metadata
import json
import os
import platform
import re

import cleanfid.resize
import numpy
import prdc
import sklearn.metrics.pairwise
import torch
from safetensors.numpy import save_file
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

FOLDER = os.path.dirname(os.path.abspath(__file__))
PACKAGES = ["torch-fidelity", "prdc", "clean-fid", "numpy", "scipy", "scikit-learn", "torch", "pillow"]
DIMENSIONS = 24
# torch-fidelity's default.
SEED = 2020


def agree(package, own):
    """Returns the package's value, or stops if the own value differs by more than 1e-6 of it."""
    # The absolute part is for distances of a set from itself, which are zero but for rounding.
    assert numpy.allclose(package, own, rtol=1e-6, atol=1e-9), (package, own)
    return package


# Sets of features


def features(rng, count, weights, mean):
    """Correlated, nonnegative vectors, as after an average pool of a ReLU."""
    latent = rng.standard_normal((count, len(weights)))
    noise = 0.3 * rng.standard_normal((count, DIMENSIONS))
    return numpy.maximum(latent @ weights + noise + mean, 0).astype(numpy.float32)


def sets():
    """The sets by name: `c` and `d` have fewer rows than columns, `e` and `f` have equal distances."""
    rng = numpy.random.default_rng(1)
    weights = 0.4 * rng.standard_normal((6, DIMENSIONS))
    other_weights = weights + 0.1 * rng.standard_normal(weights.shape)
    mean = rng.uniform(0, 1, DIMENSIONS)
    other_mean = mean + 0.15 * rng.standard_normal(DIMENSIONS)
    a = features(rng, 300, weights, mean)
    b = features(rng, 260, other_weights, other_mean)
    # Pairs of equal rows, and six equal rows: there the distance to the fifth neighbour is zero.
    b[250:255] = b[:5]
    b[255:260] = b[10]
    c = features(rng, 20, weights, mean)
    d = features(rng, 18, other_weights, other_mean)
    e = rng.integers(0, 12, (40, 2)).astype(numpy.float32)
    f = rng.integers(0, 12, (30, 2)).astype(numpy.float32) + numpy.float32([4, 0])
    logits = (2 * rng.standard_normal((300, 10))).astype(numpy.float32)
    return {"a": a, "b": b, "c": c, "d": d, "e": e, "f": f, "logits": logits}


# Fréchet distance


def statistics(x):
    """Mean and unbiased covariance."""
    x = x.astype(numpy.float64)
    centred = x - x.mean(axis=0)
    return x.mean(axis=0), centred.T @ centred / (len(x) - 1)


def root(matrix):
    """Square root of a symmetric matrix. Eigenvalues that are zero but for rounding become zero."""
    values, vectors = numpy.linalg.eigh(matrix)
    zero = values.max() * len(values) * numpy.finfo(numpy.float64).eps
    return vectors * numpy.sqrt(numpy.where(values > zero, values, 0)) @ vectors.T


def frechet(first, second):
    """Fréchet distance of two pairs of mean and covariance."""
    (mean, covariance), (other_mean, other_covariance) = first, second
    # The trace of sqrt(A B) is the sum of the singular values of sqrt(A) sqrt(B).
    cross = numpy.linalg.svd(root(covariance) @ root(other_covariance), compute_uv=False).sum()
    difference = mean - other_mean
    return difference @ difference + numpy.trace(covariance) + numpy.trace(other_covariance) - 2 * cross


def frechet_of_rows(x, y):
    """The same without covariances: exact also with fewer rows than columns."""
    centred = [(z - z.mean(axis=0)) / numpy.sqrt(len(z) - 1) for z in (x.astype(float), y.astype(float))]
    cross = numpy.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    difference = x.mean(axis=0, dtype=float) - y.mean(axis=0, dtype=float)
    return difference @ difference + (centred[0] ** 2).sum() + (centred[1] ** 2).sum() - 2 * cross


def package_frechet(x, y):
    """The distance by torch-fidelity, in the precision of the arguments."""
    first, second = (fid_features_to_statistics(torch.from_numpy(z)) for z in (x, y))
    return fid_statistics_to_metric(first, second, verbose=False)["frechet_inception_distance"]


def fid(data, first, second):
    """Expected Fréchet distance of two sets."""
    x, y = data[first], data[second]
    own = agree(frechet_of_rows(x, y), frechet(statistics(x), statistics(y)))
    return {
        "first": first,
        "second": second,
        "torch_fidelity": agree(package_frechet(x.astype(float), y.astype(float)), own),
        "torch_fidelity_float32": package_frechet(x, y),
        "numpy": own,
    }


# Random numbers of NumPy's RandomState


class Mt19937:
    """The generator of RandomState(seed), written out so that another language can draw the same numbers."""

    def __init__(self, seed):
        self.state = [seed]
        for i in range(1, 624):
            last = self.state[-1]
            self.state.append((1812433253 * (last ^ (last >> 30)) + i) % 2**32)
        self.position = 624

    def refill(self):
        """Computes the next 624 words in place."""
        state = self.state
        for i in range(624):
            y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7FFFFFFF)
            state[i] = state[(i + 397) % 624] ^ (y >> 1) ^ (0x9908B0DF if y % 2 else 0)
        self.position = 0

    def word(self):
        """The next 32 bits."""
        if self.position == 624:
            self.refill()
        y = self.state[self.position]
        self.position += 1
        y ^= y >> 11
        y ^= (y << 7) & 0x9D2C5680
        y ^= (y << 15) & 0xEFC60000
        return y ^ (y >> 18)

    def at_most(self, limit):
        """An integer from 0 to `limit`: words without their high bits, until one is not above the limit."""
        mask = 2 ** limit.bit_length() - 1
        while (value := self.word() & mask) > limit:
            pass
        return value

    def permutation(self, count):
        """RandomState.permutation. Its first n numbers are RandomState.choice(count, n, replace=False)."""
        order = list(range(count))
        for i in range(count - 1, 0, -1):
            j = self.at_most(i)
            order[i], order[j] = order[j], order[i]
        return order


# Kernel distance


def kernel(x, y):
    """Polynomial kernel of degree 3."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def mmd(x, y):
    """Unbiased estimate of the squared maximum mean discrepancy."""
    x, y = x.astype(float), y.astype(float)
    within = [(k.sum() - numpy.trace(k)) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y))]
    return sum(within) - 2 * kernel(x, y).mean()


def full_mmd(x, y):
    """The same with scikit-learn's kernel. torch-fidelity has it only for sets of one size."""
    x, y = x.astype(float), y.astype(float)
    k = [sklearn.metrics.pairwise.polynomial_kernel(p, q, degree=3, coef0=1) for p, q in ((x, x), (y, y), (x, y))]
    within = [m[~numpy.eye(len(m), dtype=bool)].mean() for m in k[:2]]
    return agree(within[0] + within[1] - 2 * k[2].mean(), mmd(x, y))


def package_kid(x, y, subsets, size):
    """Mean and standard deviation by torch-fidelity, in the precision of the arguments."""
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    options = {"kid_subsets": subsets, "kid_subset_size": size, "rng_seed": SEED, "verbose": False}
    return list(kid_features_to_metric(x, y, **options).values())


def kid(data, first, second, subsets, size):
    """Expected kernel distance of two sets."""
    x, y = data[first], data[second]
    generator = Mt19937(SEED)
    # A subset of the first set, then one of the second, from one generator.
    draws = [[generator.permutation(len(z))[:size] for z in (x, y)] for _ in range(subsets)]
    values = [mmd(x[i], y[j]) for i, j in draws]
    mean, deviation = package_kid(x.astype(float), y.astype(float), subsets, size)
    return {
        "first": first,
        "second": second,
        "subsets": subsets,
        "subset_size": size,
        "seed": SEED,
        "mean": agree(mean, numpy.mean(values)),
        "deviation": agree(deviation, numpy.std(values)),
        "torch_fidelity_float32": package_kid(x, y, subsets, size),
        "full": full_mmd(x, y),
        "values": values,
        "first_indices": [i for i, _ in draws],
        "second_indices": [j for _, j in draws],
    }


# Precision, recall, density, coverage


def distances(x, y):
    """Euclidean distances of all pairs of rows."""
    return numpy.sqrt(((x[:, None].astype(float) - y[None].astype(float)) ** 2).sum(axis=2))


def radii(x, k):
    """Distance of every row to its k-th neighbour. A row is not its own neighbour; an equal row is."""
    between = distances(x, x)
    numpy.fill_diagonal(between, numpy.inf)
    return numpy.sort(between, axis=1)[:, k - 1]


def manifold(real, fake, k, below):
    """The four values, with `below` for the comparison of a distance with a radius."""
    between = distances(real, fake)
    real_radii, fake_radii = radii(real, k), radii(fake, k)
    in_real = below(between, real_radii[:, None])
    in_fake = below(between, fake_radii[None])
    return {
        "precision": in_real.any(axis=0).mean(),
        "recall": in_fake.any(axis=1).mean(),
        "density": in_real.sum() / (k * len(fake)),
        "coverage": below(between.min(axis=1), real_radii).mean(),
    }


def margin(real, fake, k):
    """Smallest relative difference of a distance and a radius that it is compared with."""
    between = distances(real, fake)
    gaps = [numpy.abs(between - r) / between for r in (radii(real, k)[:, None], radii(fake, k)[None])]
    return min(gap.min() for gap in gaps)


def prc(data, real, fake, k):
    """Expected precision, recall, density and coverage of two sets."""
    x, y = data[real], data[fake]
    own = manifold(x, y, k, numpy.less)
    package = prdc.compute_prdc(x.astype(float), y.astype(float), nearest_k=k)
    inclusive = manifold(x, y, k, numpy.less_equal)
    # torch-fidelity takes the generated set first.
    pair = (torch.from_numpy(z).double() for z in (y, x))
    other = prc_features_to_metric(*pair, prc_neighborhood=k, verbose=False)
    for name in ("precision", "recall"):
        agree(other[name], inclusive[name])
    return {
        "real": real,
        "fake": fake,
        "k": k,
        **{name: float(agree(package[name], own[name])) for name in own},
        **{f"{name}_inclusive": float(value) for name, value in inclusive.items()},
        "margin": float(margin(x, y, k)) if real not in "ef" else 0.0,
    }


# Inception score


def inception_score(logits, splits):
    """Mean and standard deviation over consecutive parts."""
    exponents = numpy.exp(logits.astype(float) - logits.max(axis=1, keepdims=True))
    p = exponents / exponents.sum(axis=1, keepdims=True)
    bounds = [i * len(p) // splits for i in range(splits + 1)]
    scores = []
    for start, end in zip(bounds, bounds[1:]):
        part = p[start:end]
        divergence = (part * (numpy.log(part) - numpy.log(part.mean(axis=0)))).sum(axis=1)
        scores.append(numpy.exp(divergence.mean()))
    return numpy.mean(scores), numpy.std(scores)


def isc(logits, splits, shuffle):
    """Expected inception score."""
    own = inception_score(logits[Mt19937(SEED).permutation(len(logits))] if shuffle else logits, splits)
    package = isc_features_to_metric(torch.from_numpy(logits), splits, shuffle, SEED).values()
    mean, deviation = agree(list(package), own)
    return {"splits": splits, "shuffle": shuffle, "seed": SEED, "mean": mean, "deviation": deviation}


# Resizing


def picture():
    """An image [3, 96, 131] with gradients, edges between 0 and 255, and noise."""
    rng = numpy.random.default_rng(2)
    y, x = numpy.mgrid[:96, :131]
    waves = [128 + 100 * numpy.sin(x / (5 + 3 * c) + c) * numpy.cos(y / (9 - 2 * c)) for c in range(3)]
    image = numpy.stack(waves) + 12 * rng.standard_normal((3, 96, 131))
    image[:, 20:60, 30:70] = numpy.where((x + y)[20:60, 30:70] // 8 % 2, 255, 0)
    return numpy.clip(numpy.rint(image), 0, 255).astype(numpy.uint8)


def cubic(x):
    """Keys' cubic with a = -0.5, as Pillow writes it."""
    x, a = numpy.abs(x), -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return numpy.where(x < 1, near, numpy.where(x < 2, far, 0.0))


def cubic_axis(image, size):
    """Resizes the last axis with Pillow's antialiased cubic; sums in float64, result in float32."""
    source = image.shape[-1]
    scale = source / size
    stretch = max(scale, 1.0)
    out = numpy.empty((*image.shape[:-1], size), numpy.float32)
    for i in range(size):
        centre = (i + 0.5) * scale
        start = max(int(centre - 2 * stretch + 0.5), 0)
        end = min(int(centre + 2 * stretch + 0.5), source)
        weights = cubic((numpy.arange(start, end) - centre + 0.5) * (1 / stretch))
        total = 0.0
        for weight in weights:
            total += weight
        value = numpy.zeros(image.shape[:-1])
        for j, weight in zip(range(start, end), weights):
            value += image[..., j].astype(float) * (weight / total)
        out[..., i] = value
    return out


def clean(image, size):
    """Columns first, then rows, then a limit to 0..255. No rounding to integers."""
    wide = cubic_axis(image.astype(numpy.float32), size)
    return cubic_axis(wide.swapaxes(1, 2), size).swapaxes(1, 2).clip(0, 255)


def linear_axis(source, size):
    """Lower index, upper index and weight of the upper one, with TensorFlow 1's corners."""
    position = numpy.arange(size, dtype=numpy.float32) * numpy.float32(source / size)
    low = position.astype(int)
    return low, numpy.minimum(low + 1, source - 1), position - low.astype(numpy.float32)


def legacy(image, size):
    """TensorFlow 1's bilinear, all in float32."""
    image = image.astype(numpy.float32)
    top, bottom, dy = linear_axis(image.shape[1], size)
    left, right, dx = linear_axis(image.shape[2], size)
    rows = [image[:, r][:, :, left] + (image[:, r][:, :, right] - image[:, r][:, :, left]) * dx for r in (top, bottom)]
    return rows[0] + (rows[1] - rows[0]) * dy[:, None]


def package_clean(image, size):
    """clean-fid takes and returns [height, width, 3]."""
    resize = cleanfid.resize.make_resizer("PIL", False, "bicubic", (size, size))
    return numpy.ascontiguousarray(resize(image.transpose(1, 2, 0)).transpose(2, 0, 1))


def package_legacy(image, size):
    """torch-fidelity takes and returns [batch, 3, height, width]."""
    batch = torch.from_numpy(image)[None].float()
    return interpolate_bilinear_2d_like_tensorflow1x(batch, (size, size), align_corners=False)[0].numpy()


def resized(image):
    """The results by name: `clean_64` and so on. NumPy's must be equal in every bit."""
    results = {}
    for size in (64, 150):
        results[f"clean_{size}"] = package_clean(image, size)
        results[f"legacy_{size}"] = package_legacy(image, size)
        assert numpy.array_equal(results[f"clean_{size}"], clean(image, size))
        assert numpy.array_equal(results[f"legacy_{size}"], legacy(image, size))
    return results


def summary(name, result):
    """What `expected.json` says of a resized image."""
    return {
        "name": name,
        "shape": list(result.shape),
        "mean": float(result.mean(dtype=float)),
        "zeros": int((result == 0).sum()),
        "at_255": int((result == 255).sum()),
    }


# Statistics of guided-diffusion (ADM)


def adm(data):
    """Writes both forms of the file, with all of its arrays, and returns the expected distances."""
    rng = numpy.random.default_rng(3)
    mean, covariance = statistics(data["b"])
    spatial = rng.standard_normal((9, 6))
    arrays = {
        "arr_0": rng.integers(0, 256, (2, 8, 8, 3), dtype=numpy.uint8),
        "mu": mean,
        "sigma": covariance,
        "mu_s": spatial.mean(axis=0),
        "sigma_s": numpy.cov(spatial, rowvar=False),
    }
    numpy.savez_compressed(os.path.join(FOLDER, "adm.npz"), **arrays)
    numpy.savez(os.path.join(FOLDER, "adm_stored.npz"), **arrays)
    own = frechet(statistics(data["a"]), (mean, covariance))
    first = fid_features_to_statistics(torch.from_numpy(data["a"]).double())
    package = fid_statistics_to_metric(first, {"mu": mean, "sigma": covariance}, verbose=False)
    return {
        "files": ["adm.npz", "adm_stored.npz"],
        "features": "a",
        "torch_fidelity": agree(package["frechet_inception_distance"], own),
        "numpy": own,
    }


def versions():
    """The versions of Python and of the packages."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def expected(data, image_results):
    """All expected values."""
    generator = Mt19937(SEED)
    return {
        "versions": versions(),
        "fid": [fid(data, *pair) for pair in ("ab", "ba", "cd", "ac", "aa")],
        "kid": [kid(data, "a", "b", 10, 100), kid(data, "c", "d", 4, 18)],
        "prc": [prc(data, *pair, k) for pair in ("ab", "ba", "cd", "ef") for k in (3, 5)],
        "isc": [isc(data["logits"], 10, True)] + [isc(data["logits"], splits, False) for splits in (10, 7, 1)],
        "random": {
            "seed": SEED,
            "words": [generator.word() for _ in range(8)],
            "permutation_of_300": Mt19937(SEED).permutation(300),
        },
        "resize": [summary(name, result) for name, result in image_results.items()],
        "adm": adm(data),
    }


def to_json(value):
    """JSON with lists of numbers on one line."""
    text = json.dumps(value, indent=2)
    return re.sub(r"\[[\s\d.,e+-]+\]", lambda match: re.sub(r"\s+", " ", match.group()), text) + "\n"


def main():
    """Writes all files."""
    torch.set_num_threads(1)
    data = sets()
    assert Mt19937(SEED).permutation(300) == numpy.random.RandomState(SEED).permutation(300).tolist()
    image = picture()
    results = resized(image)
    save_file(data, os.path.join(FOLDER, "features.safetensors"))
    save_file({"image": image, **results}, os.path.join(FOLDER, "resize.safetensors"))
    with open(os.path.join(FOLDER, "expected.json"), "w", encoding="utf-8") as file:
        file.write(to_json(expected(data, results)))


if __name__ == "__main__":
    main()
