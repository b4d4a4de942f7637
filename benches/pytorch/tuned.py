"""The flow head of the reference as a good PyTorch user would tune it, for eqim-bench --pytorch-tuned.

All variants compute the modulations of all steps with one product per layer before the loop, as eqim does. They take the
same number of Euler steps as the reference, from the same noise.

    hoisted    nothing else
    compiled   torch.compile of the velocity
    bfloat16   weights and activations in bfloat16, the state in FP32; compiled
    int8       torch.ao.quantization.quantize_dynamic of all linear layers, which PyTorch has only for the CPU
"""

import copy

import torch


class Float32Times(torch.nn.Module):
    """Embeds the times in FP32, and returns bfloat16."""

    def __init__(self, embed):
        super().__init__()
        self.embed = embed

    def forward(self, times):
        return self.embed(times).bfloat16()


def velocity(net, x, modulations, final):
    h = net.input_proj(x)
    for block, modulation in zip(net.res_blocks, modulations):
        shift, scale, gate = modulation.chunk(3, -1)
        h = h + gate * block.mlp(block.in_ln(h) * (1 + scale) + shift)
    shift, scale = final.chunk(2, -1)
    return net.final_layer.linear(net.final_layer.norm_final(h) * (1 + scale) + shift)


def prepared(net, variant):
    """Returns the network of a variant, the function that computes its velocity, and its type."""
    if variant == "hoisted":
        return net, velocity, torch.float32
    if variant == "compiled":
        return net, torch.compile(velocity, dynamic=False), torch.float32
    if variant == "bfloat16":
        narrow = copy.deepcopy(net).bfloat16()
        narrow.time_embed = Float32Times(copy.deepcopy(net.time_embed))
        return narrow, torch.compile(velocity, dynamic=False), torch.bfloat16
    if variant == "int8":
        quantize = torch.ao.quantization.quantize_dynamic
        return quantize(copy.deepcopy(net), {torch.nn.Linear}, dtype=torch.qint8), velocity, torch.float32
    raise ValueError(f"variant is {variant}, expected hoisted, compiled, bfloat16 or int8")


def sampler(diffloss, variant):
    """Returns a function that replaces `diffloss.sample`."""
    net, run, dtype = prepared(diffloss.net, variant)

    def sample(z, temperature=1.0, cfg=1.0):
        steps = int(diffloss.num_sampling_steps)
        guided = cfg != 1.0
        rows = z.shape[0] // 2 if guided else z.shape[0]
        x = torch.randn(rows, diffloss.in_channels).to(z.device)
        times = torch.arange(steps, 0, -1, device=z.device) / steps
        y = net.time_embed(times)[:, None] + net.cond_embed(z.to(dtype))[None]
        modulations = torch.stack([block.adaLN_modulation(y) for block in net.res_blocks])
        final = net.final_layer.adaLN_modulation(y)
        for step in range(steps):
            token = torch.cat([x, x]) if guided else x
            v = run(net, token.to(dtype), modulations[:, step], final[step]).float()
            if guided:
                v = v[rows:] + cfg * (v[:rows] - v[rows:])
            x = x - v / steps
        return torch.cat([x, x]) if guided else x

    return sample
