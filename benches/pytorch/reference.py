"""Runs the PyTorch reference for eqim-bench.

    python reference.py CHECKOUT BUNDLE DEVICE THREADS

CHECKOUT is a checkout of drx-code/EquivariantModeling. BUNDLE is a folder that eqim-export onnx wrote in FP32; its
weights are loaded into the modules of the reference. DEVICE is cpu or cuda:N. THREADS is the number of threads of PyTorch on
the CPU; 0 keeps the default. Noise is drawn on the CPU, as the reference does, so that it is the same on every device.
Requests are read from standard input, one JSON object per line, and answers are written to standard output in the same
way. The variant of a request is `reference`, or one of tuned.py. The semantic decoder is left out, because bundles do not
contain its weights. This makes the reference faster than its own decode().
"""

import json
import os
import struct
import sys
import time

CHECKOUT, BUNDLE, DEVICE, THREADS = sys.argv[1:]
ON_GPU = DEVICE.startswith("cuda:")
os.environ["CUDA_VISIBLE_DEVICES"] = DEVICE.removeprefix("cuda:") if ON_GPU else ""
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # output of the reference goes to standard error, because it is not an answer

import numpy  # noqa: E402
import torch  # noqa: E402
import tuned  # noqa: E402

if not ON_GPU:
    # The reference moves everything to a GPU; here everything stays on the CPU.
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self


def synchronize():
    """Waits until the GPU has finished."""
    if ON_GPU:
        torch.cuda.synchronize()


def read_safetensors(path):
    """Returns all tensors of a .safetensors file of 32-bit floats."""
    values = numpy.memmap(path, numpy.uint8, "c")
    length = struct.unpack("<Q", values[:8])[0]
    header = json.loads(bytes(values[8 : 8 + length]))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] != "F32":
            sys.exit(f"{path}: tensor {name} is of type {entry['dtype']}, expected F32: give a bundle in FP32")
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = torch.from_numpy(values[begin:end].view(numpy.float32)).reshape(entry["shape"])
    return tensors


def load(module, tensors, prefix=""):
    """Loads all parameters of a module from the tensors whose names begin with `prefix`."""
    names = [name for name, _ in module.named_parameters()]
    missing = [prefix + name for name in names if prefix + name not in tensors]
    if missing:
        sys.exit(f"the bundle lacks {missing[0]}, which the checkout's module has: is it of another version?")
    module.load_state_dict({name: tensors[prefix + name] for name in names}, strict=False)
    return module.eval().cuda()


def generator(config, tensors, steps):
    from functools import partial

    from generator.equ_modeling import EquivariantGenerativeModel

    model = EquivariantGenerativeModel(
        encoder_embed_dim=config["dim"],
        encoder_depth=config["depth"],
        encoder_num_heads=config["heads"],
        decoder_embed_dim=config["dim"],
        decoder_depth=0,
        decoder_num_heads=config["heads"],
        mlp_ratio=config["mlp_dim"] / config["dim"],
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        vae_embed_dim=config["embed"],
        class_num=config["class_num"],
        buffer_size=config["buffer"],
        diffloss_d=config["flow_depth"],
        diffloss_w=config["flow_dim"],
        num_sampling_steps=str(steps),
        cond_length=config["window"],
    )
    return load(model, tensors)


def decoder(config, tensors):
    from tokenizer.models.tokenizer import EquivariantTokenizerDecoder1D

    encoder, levels = config["encoder"], config["encoder"]["levels"]
    rows = config["rows"] << (len(levels) - 1)
    width = encoder["conv_in"]
    columns = EquivariantTokenizerDecoder1D(
        double_enc=False,
        z_channels=config["decoder"]["z_channels"],
        resolution=rows,
        in_channels=config["image_channels"],
        out_ch=config["image_channels"],
        ch=width,
        ch_mult=[level["channels"] // width for level in levels],
        num_res_blocks=encoder["res_blocks"],
        dropout=0.0,
        attn_resolutions=[rows >> i for i, level in enumerate(levels) if level["attention"]],
        len_down_scale=config["len_down_scale"],
        semantic_map="res",
    )
    wide, narrow, _ = tensors["post_quant_layer.weight"].shape
    widen = torch.nn.Conv1d(narrow, wide, 3, padding=1, padding_mode="reflect")
    load(widen, tensors, "post_quant_layer.")
    load(columns, tensors, "decoder.")
    return lambda z: columns(widen(z.permute(0, 2, 1)).permute(0, 2, 1))[0]


class Clock:
    """Wraps a function and records the seconds of each call."""

    def __init__(self, function):
        self.function = function
        self.seconds = []

    def __call__(self, *arguments, **named):
        synchronize()
        start = time.perf_counter()
        result = self.function(*arguments, **named)
        synchronize()
        self.seconds.append(time.perf_counter() - start)
        return result


def answer(model, decode, vae_norm, samplers, request):
    """Generates a batch of images as engine_generator.py of the reference does, and returns the times in seconds."""
    labels = torch.tensor(request["labels"]).cuda()
    prefix = None
    if request["prefix"]:
        values = numpy.fromfile(request["prefix"], numpy.float32)
        prefix = torch.from_numpy(values).reshape(len(labels), -1, model.token_embed_dim).cuda()
    model.diffloss.num_sampling_steps = str(request["steps"])
    transformer = model.forward_encoder = Clock(type(model).forward_encoder.__get__(model))
    variant = request["variant"]
    if variant not in samplers:
        samplers[variant] = tuned.sampler(model.diffloss, variant)
    flow = model.diffloss.sample = Clock(samplers[variant])
    decoded = Clock(decode)
    torch.manual_seed(request["seed"])
    start = time.perf_counter()
    with torch.no_grad():
        tokens = model.sample_tokens(
            bsz=len(labels),
            num_iter=request["tokens"],
            cfg=request["cfg"],
            cfg_schedule="linear",
            labels=labels,
            gt_latents=prefix,
        )
        tokens = tokens.squeeze(2).permute(0, 2, 1)
        if request["decode"]:
            decoded(tokens / vae_norm)
    synchronize()
    total = time.perf_counter() - start
    tokens.contiguous().cpu().numpy().tofile(request["output"])
    return {"step": transformer.seconds, "flow": flow.seconds, "decode": decoded.seconds, "total": total}


def main():
    bundle = os.path.abspath(BUNDLE)
    os.chdir(CHECKOUT)
    sys.path.insert(0, CHECKOUT)
    sys.dont_write_bytecode = True
    if int(THREADS):
        torch.set_num_threads(int(THREADS))
    with open(os.path.join(bundle, "config.json")) as file:
        config = json.load(file)["model"]
    tensors = read_safetensors(os.path.join(bundle, "model.safetensors"))
    model = generator(config["generator"], tensors, config["generator"]["steps"])
    decode = decoder(config["tokenizer"], tensors)
    processor = torch.cuda.get_device_name() if ON_GPU else f"{torch.get_num_threads()} threads"
    print(json.dumps({"torch": torch.__version__, "processor": processor}), file=ANSWERS, flush=True)
    samplers = {"reference": type(model.diffloss).sample.__get__(model.diffloss)}
    for line in sys.stdin:
        result = answer(model, decode, config["generator"]["vae_norm"], samplers, json.loads(line))
        print(json.dumps(result), file=ANSWERS, flush=True)


if __name__ == "__main__":
    main()
