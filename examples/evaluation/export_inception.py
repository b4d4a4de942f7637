"""Exports torch-fidelity's Inception network to ONNX, for `eqim-eval --features`.

Usage: python3 export_inception.py --weights weights-inception-2015-12-05-6726825d.pth -o inception.onnx

Needs torch, torch-fidelity, onnx and onnxruntime. torch-fidelity's source names the address of the weights:
torch_fidelity.feature_extractor_inceptionv3.URL_INCEPTION_V3.

The graph takes `images`, float32 [batch, 3, 299, 299], RGB from 0 to 255. It returns `features`, [batch, 2048], for
the distances, and `logits`, [batch, 1008], for the inception score. It does not resize: `eqim-eval` does.
"""

import argparse
import hashlib
import importlib.metadata
import io
import os
import sys

import numpy
import onnx
import onnxruntime
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

# Other weights give other distances, which cannot be compared with published ones.
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
OUTPUTS = ["2048", "logits_unbiased"]
TOLERANCE = 1e-4


class RandomInception(FeatureExtractorInceptionV3):
    """The network with random weights, for tests without the file of weights."""

    def load_state_dict(self, _state):
        generator = torch.Generator().manual_seed(0)
        for name, tensor in self.state_dict().items():
            if tensor.dim() > 1:
                tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
            elif name.endswith(("bn.weight", "running_var")):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point():
                tensor.normal_(0, 0.1, generator=generator)


class Resized(torch.nn.Module):
    """The network after its resize."""

    def __init__(self, network):
        super().__init__()
        # torch-fidelity defines the layers in the order in which it calls them.
        *layers, self.fc = network.children()
        self.layers = torch.nn.Sequential(*layers)

    def forward(self, images):
        features = torch.flatten(self.layers((images - 128) / 128), 1)
        # Without the bias, as in the published inception score.
        return features, features @ self.fc.weight.T


def random_network():
    """torch-fidelity's network with random weights."""
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    return RandomInception("inception", OUTPUTS, feature_extractor_weights_path=empty)


def published_network(path):
    """torch-fidelity's network with the weights at `path`."""
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    if digest != WEIGHTS_SHA256:
        sys.exit(f"{path}: expected the file with the SHA-256 {WEIGHTS_SHA256}, found {digest}")
    return FeatureExtractorInceptionV3("inception", OUTPUTS, feature_extractor_weights_path=path)


def export(network, source):
    """Returns the ONNX model."""
    buffer = io.BytesIO()
    names = ["images", "features", "logits"]
    torch.onnx.export(
        Resized(network).eval(),
        (torch.zeros(2, 3, 299, 299),),
        buffer,
        input_names=names[:1],
        output_names=names[1:],
        dynamic_axes={name: {0: "batch"} for name in names},
        opset_version=17,
        # The other exporter writes paths of this machine into the file.
        dynamo=False,
    )
    model = onnx.load_from_string(buffer.getvalue())
    model.producer_name, model.producer_version = "export_inception.py", torch.__version__
    onnx.helper.set_model_props(model, {"source": source})
    onnx.checker.check_model(model, full_check=True)
    return model


def difference(network, session, count):
    """Largest difference of ONNX Runtime from PyTorch on random images, relative to the largest value."""
    images = torch.randint(0, 256, (count, 3, 299, 299), dtype=torch.uint8)
    # torch-fidelity's own call: its resize from 299 to 299 changes nothing.
    expected = [values.numpy() for values in network(images)]
    found = session.run(["features", "logits"], {"images": images.numpy().astype(numpy.float32)})
    return numpy.max([numpy.abs(a - b).max() / numpy.abs(a).max() for a, b in zip(expected, found)])


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--weights", metavar="FILE", help="the .pth file of weights that torch-fidelity downloads")
    weights.add_argument("--random-weights", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="the .onnx file to write")
    return parser.parse_args()


def main():
    """Exports, compares and then writes the file."""
    arguments = parse_arguments()
    version = importlib.metadata.version("torch-fidelity")
    if arguments.random_weights:
        network, source = random_network(), f"torch-fidelity {version}, random weights"
    else:
        network = published_network(arguments.weights)
        source = f"torch-fidelity {version}, {os.path.basename(arguments.weights)}, SHA-256 {WEIGHTS_SHA256}"
    model = export(network, source).SerializeToString()

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    worst = numpy.max([difference(network, session, count) for count in (1, 3)])
    if not worst <= TOLERANCE:
        sys.exit(f"ONNX Runtime differs from PyTorch by {worst:.1e} of the largest value, expected {TOLERANCE:.0e}")
    with open(arguments.output, "wb") as file:
        file.write(model)
    print(f"{arguments.output}: {len(model)} bytes, differs from PyTorch by {worst:.1e} of the largest value")


if __name__ == "__main__":
    try:
        main()
    except OSError as problem:
        sys.exit(str(problem))
