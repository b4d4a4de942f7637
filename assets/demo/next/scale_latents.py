"""Rotates the latents of a tokenizer to their principal components and divides each by the square root of its standard
deviation. The transform is folded into quant_layer and post_quant_layer, so reconstructions stay the same.

usage: scale_latents.py TOKENIZER.safetensors LATENTS OUT.safetensors
LATENTS is the folder of latents [tokens, E] that eqim-train generator encoded with the same tokenizer.
"""

import pathlib
import sys

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

tokenizer, folder, out = sys.argv[1:]
files = [safe_open(path, "np") for path in sorted(pathlib.Path(folder).glob("*.safetensors"))]
latents = np.concatenate([file.get_tensor(key) for file in files for key in file.keys()]).astype(np.float64)
mean = latents.mean(0)
variances, components = np.linalg.eigh(np.cov(latents.T))
roots = variances**0.25
forward = components.T / roots[:, None]  # latent - mean -> scaled
backward = components * roots  # scaled -> latent - mean

with safe_open(tokenizer, "np") as file:
    weights = {key: file.get_tensor(key).astype(np.float32) for key in file.keys()}
    metadata = file.metadata()
double = {key: weights[key].astype(np.float64) for key in weights if "quant_layer" in key}
weights["quant_layer.weight"] = np.einsum("ij,jck->ick", forward, double["quant_layer.weight"])
weights["quant_layer.bias"] = forward @ (double["quant_layer.bias"] - mean)
after = double["post_quant_layer.weight"]
weights["post_quant_layer.weight"] = np.einsum("icK,cj->ijK", after, backward)
weights["post_quant_layer.bias"] = double["post_quant_layer.bias"] + after.sum(2) @ mean
save_file({key: np.ascontiguousarray(value, np.float32) for key, value in weights.items()}, out, metadata)
print(f"standard deviations {roots.max()**2:.3f} to {roots.min()**2:.3f}, now {roots.max():.3f} to {roots.min():.3f}, rms {np.sqrt((roots**2).mean()):.3f}")
