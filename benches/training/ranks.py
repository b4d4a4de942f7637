"""Steps of the generator's training in several processes: eqim-train with MPI, and the reference with DDP.

    python benches/training/ranks.py CHECKOUT EQIM_TRAIN RUN [RANKS…]

CHECKOUT is a checkout of drx-code/EquivariantModeling. EQIM_TRAIN is an eqim-train with the feature mpi, and RUN a folder with
photos/ (few, since each run encodes them), tokenizer.safetensors and recipe.toml, the recipe of a generator with `log_every = 1` and `batch_size` rows of 16 tokens.
The reference trains the same sizes on random tokens with torch's DistributedDataParallel over gloo, AdamW and its moving average.
Both have as many threads per process as there are cores per process. For each number of ranks it prints the median time of a step
and the largest peak of the memory of a rank. Python needs torch and timm 0.9.12.
"""

import json
import os
import statistics
import subprocess
import sys
import time
import tomllib
from pathlib import Path

STEPS, WARMUP = 12, 3


def peak(process):
    """Peak of the resident memory of a process in MiB; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return max((int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM")), default=0)


def threads(ranks):
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def reference(rank, ranks, checkout, recipe, classes, results):
    sys.path.insert(0, checkout)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571", "CUDA_VISIBLE_DEVICES": ""}
    import torch

    torch.set_num_threads(threads(ranks))
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self
    from functools import partial

    from generator.equ_modeling import EquivariantGenerativeModel

    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    sizes, plan = recipe["generator"]["model"], recipe["generator"]["plan"]
    model = EquivariantGenerativeModel(
        encoder_embed_dim=sizes["dim"],
        encoder_depth=sizes["depth"],
        encoder_num_heads=sizes["heads"],
        decoder_embed_dim=sizes["dim"],
        decoder_depth=0,
        decoder_num_heads=sizes["heads"],
        mlp_ratio=sizes["mlp_dim"] / sizes["dim"],
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        vae_embed_dim=recipe["tokenizer"]["model"]["embed"],
        class_num=classes,
        buffer_size=sizes["buffer"],
        attn_dropout=0.0,
        proj_dropout=0.0,
        diffloss_d=sizes["flow_depth"],
        diffloss_w=sizes["flow_dim"],
        cond_length=sizes["window"],
        shift_num=256,
    ).train()
    averages = [parameter.detach().clone() for parameter in model.parameters()]
    trained = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    rows, seconds = plan["batch_size"] // ranks, []
    for _ in range(STEPS):
        tokens = torch.randn(rows, plan["tokens"], recipe["tokenizer"]["model"]["embed"])
        labels = torch.randint(0, classes, (rows,))
        start = time.perf_counter()
        trained(tokens, labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan["clip"])
        optimizer.step()
        optimizer.zero_grad()
        for average, parameter in zip(averages, model.parameters(), strict=True):
            average.mul_(0.999).add_(parameter.detach(), alpha=0.001)
        torch.distributed.barrier()
        seconds.append(time.perf_counter() - start)
    results.put((statistics.median(seconds[WARMUP:]), peak(os.getpid())))


def run_reference(ranks, checkout, recipe, classes):
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (ranks, checkout, recipe, classes, results)
    processes = [context.Process(target=reference, args=(rank, *arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    found = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return max(seconds for seconds, _ in found), max(memory for _, memory in found)


def children(program):
    """The processes that run a program."""
    running = subprocess.run(["pgrep", "-f", f"^{program} "], capture_output=True, text=True, check=False)
    return running.stdout.split()


def run_eqim(ranks, program, folder, batch):
    """Trains with a number of ranks; 0 is one process without MPI's launcher."""
    output = folder / "out" / f"ranks-{ranks}"
    line = [program, "generator", "--images", "photos", "--tokenizer", "tokenizer.safetensors", "--recipe", "recipe.toml"]
    line += ["-o", str(output), "--steps", str(STEPS)]
    launcher = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]
    environment = os.environ | {"RAYON_NUM_THREADS": str(threads(max(1, ranks)))}
    command = [*launcher, *line] if ranks else line
    run = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    memory = 0
    while run.poll() is None:
        memory = max([memory, *map(peak, children(program))])
        time.sleep(0.05)
    if run.returncode:
        sys.exit(f"{' '.join(command)} failed with exit code {run.returncode}")
    lines = (output / "metrics.jsonl").read_text().splitlines()
    # The last step ends with a validation.
    seconds = [batch / json.loads(line)["images_per_second"] for line in lines[WARMUP:-1]]
    return statistics.median(seconds), memory


def main():
    checkout, program, folder, *ranks = sys.argv[1:]
    folder = Path(folder)
    recipe = tomllib.loads((folder / "recipe.toml").read_text())
    classes = sum(path.is_dir() for path in (folder / "photos").iterdir())
    batch = recipe["generator"]["plan"]["batch_size"]
    print(f"{batch} rows of {recipe['generator']['plan']['tokens']} tokens; {len(os.sched_getaffinity(0))} cores")
    print("| ranks | eqim-train: s per step | MiB per rank | reference: s per step | MiB per rank |\n|---|---:|---:|---:|---:|")
    for count in [0, *map(int, ranks or ["1", "2", "4"])]:
        seconds, memory = run_eqim(count, program, folder, batch)
        own = f"{seconds:.3f} | {memory}"
        if count == 0:
            print(f"| one process, without mpirun | {own} | | |", flush=True)
            continue
        other, peak_memory = run_reference(count, checkout, recipe, classes)
        print(f"| {count} | {own} | {other:.3f} | {peak_memory} |", flush=True)


if __name__ == "__main__":
    main()
