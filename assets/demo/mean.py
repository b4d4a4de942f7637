"""Mixes the weights of two checkpoints of one network.

    python3 assets/demo/mean.py FIRST SECOND FRACTION OUTPUT

The weights of OUTPUT are FRACTION of those of SECOND and the rest of those of FIRST. Python needs safetensors and numpy.
"""

import sys

from safetensors import safe_open
from safetensors.numpy import save_file

first, second, fraction, output = sys.argv[1:]
fraction = float(fraction)
with safe_open(first, "numpy") as a, safe_open(second, "numpy") as b:
    if a.keys() != b.keys():
        sys.exit(f"{first} and {second} have tensors of other names")
    mixed = {name: a.get_tensor(name) * (1 - fraction) + b.get_tensor(name) * fraction for name in a.keys()}
    metadata = a.metadata()
save_file({name: tensor.astype("float32") for name, tensor in mixed.items()}, output, metadata)
