"""Checks eqim on the GPU of this machine, measures it, and writes results.json and results.md.

    python3 run.py

`cargo xtask gpu` made this folder. It holds the programs of eqim with Candle's CUDA kernels, the fixtures of the PyTorch
reference, and the demo model. The CUDA libraries are those of this machine, or of the PyTorch of this Python.
"""

import argparse
import json
import os
import re
import site
import subprocess
import sys
import tarfile
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PROGRAMS = FOLDER / "programs"
# What the programs are linked with. The driver brings libcuda, a CUDA toolkit or PyTorch the others.
LIBRARIES = {
    "libcuda.so.1": "the NVIDIA driver",
    "libcublas.so.13": "the Python package nvidia-cublas 13",
    "libcublasLt.so.13": "the Python package nvidia-cublas 13",
    "libcudart.so.13": "the Python package nvidia-cuda-runtime 13",
    "libcurand.so.10": "the Python package nvidia-curand 10",
    "libnvrtc.so.13": "the Python package nvidia-cuda-nvrtc 13",
}
DIFFERENCE = re.compile(r": (-?\d\S*e-?\d+|inf|NaN)$", re.MULTILINE)
EXPORT = "eqim-export onnx --no-validate"
DEMO = "assets/demo/model.safetensors"


class Skipped(Exception):
    """A step that cannot run here, and why."""


def library_folders():
    """Returns the folders with the CUDA libraries that the system does not find by itself."""
    known = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    packages = [*site.getsitepackages(), site.getusersitepackages(), *(path for path in sys.path if path)]
    packaged = [str(path) for package in packages for path in Path(package).glob("nvidia/*/lib")]
    installed = [str(path) for path in Path("/usr/local").glob("cuda*/lib64")]
    folders = dict.fromkeys([*known, *packaged, *installed, "/usr/local/nvidia/lib64"])
    # The programs run in another folder.
    return [os.path.abspath(folder) for folder in folders if folder and os.path.isdir(folder)]


def check_libraries(folders):
    """Stops unless all CUDA libraries are found."""
    system = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout
    for library, source in LIBRARIES.items():
        if f"{library} " not in system and not any(os.path.exists(os.path.join(f, library)) for f in folders):
            print(f"error: {library} is not found: install {source}, or name its folder in LD_LIBRARY_PATH", file=sys.stderr)
            sys.exit(2)


def unpack():
    """Unpacks the programs once."""
    if not PROGRAMS.exists():
        partial = FOLDER / "programs.partial"
        with tarfile.open(FOLDER / "programs.tar.xz") as archive:
            archive.extractall(partial)
        partial.rename(PROGRAMS)


class Machine:
    """Runs programs of the folder."""

    def __init__(self, device, folders):
        self.device = device
        self.environment = dict(
            os.environ,
            EQIM_TEST_DEVICE=device,
            LD_LIBRARY_PATH=":".join(folders),
            # The reference needs its version of timm.
            PYTHONPATH=f"{FOLDER / 'packages'}:{os.environ.get('PYTHONPATH', '')}",
            PYTHONDONTWRITEBYTECODE="1",
            RUST_BACKTRACE="0",
        )

    def run(self, line, **variables):
        """Runs a command line in the folder, and returns its output."""
        program, *arguments = line.split() if isinstance(line, str) else line
        environment = dict(self.environment, **variables)
        command = [PROGRAMS / program, *arguments]
        done = subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True)
        if done.returncode:
            output = (done.stderr or done.stdout).strip().splitlines()
            raise RuntimeError("\n".join([f"{program} {' '.join(arguments)}: exit code {done.returncode}", *output[-10:]]))
        return done.stdout

    def tests(self, program, package, prefix=""):
        """Runs each test of a test program whose name begins with `prefix`, and returns its largest difference."""
        root = FOLDER / package
        root.mkdir(exist_ok=True)
        names = re.findall(rf"^({prefix}\S*): test$", self.run([program, "--list"]), re.MULTILINE)
        if not names:
            raise RuntimeError(f"{program} has no tests {prefix}")
        # Tests that need a GPU are ignored elsewhere.
        ignored = [] if self.device == "cpu" else ["--include-ignored"]
        results, failures = {}, []
        for name in names:
            try:
                output = self.run([program, "--exact", name, "--nocapture", *ignored], CARGO_MANIFEST_DIR=str(root))
                differences = [abs(float(value)) for value in DIFFERENCE.findall(output)]
                results[name] = {"largest_difference": max(differences, default=None)}
            except RuntimeError as error:
                failures.append(str(error))
        if failures:
            raise RuntimeError(f"{len(failures)} of {len(names)} tests failed\n" + "\n".join(failures))
        return results

    def bench(self, arguments):
        """Runs eqim-bench, and returns its measurements and its tables."""
        outputs = [FOLDER / "bench.json", FOLDER / "bench.md"]
        line = f"eqim-bench --backend candle --device {self.device} {arguments}"
        try:
            self.run([*line.split(), "--export-json", str(outputs[0]), "--export-markdown", str(outputs[1])])
            return {"report": json.loads(outputs[0].read_text()), "markdown": outputs[1].read_text()}
        finally:
            for output in outputs:
                output.unlink(missing_ok=True)


def pytorch(machine):
    """Returns the options of eqim-bench for the PyTorch of this Python."""
    if not (FOLDER / "reference").is_dir():
        raise Skipped("the folder has no checkout of the reference: cargo xtask gpu --reference CHECKOUT adds it")
    script = "import generator.equ_modeling, tokenizer.models.tokenizer"
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, cwd=FOLDER / "reference", env=machine.environment, capture_output=True, text=True)
    if found.returncode:
        raise Skipped(f"{sys.executable} lacks what the reference needs: {found.stderr.strip().splitlines()[-1]}")
    return f"--pytorch reference --pytorch-tuned --python {sys.executable}"


def parity(machine):
    """All numbers of the PyTorch fixtures: activations, cached steps, velocities, tokenizer, sampling runs, images."""
    return machine.tests("suite", ".", "parity::")


def training(machine):
    """A step of the generator: loss, gradients, their norm, parameters after AdamW. Steps of the tokenizer, beside the CPU."""
    return machine.tests("parity", "training")


def demo(machine):
    """The demo model, compared with the reference's algorithm on Candle on the CPU."""
    machine.run(f"{EXPORT} --generator {DEMO} --tokenizer {DEMO} -o demo")
    return machine.bench("--engine demo --reference --cfg 3 --tokens 8")


def image(machine):
    """An image of 16 tokens of the large model with random weights, compared with PyTorch."""
    return against_pytorch(machine, "--tokens 16")


def images(machine):
    """8 images of 16 tokens in a batch."""
    return against_pytorch(machine, "--tokens 16 --batch 8")


def late_token(machine):
    """One token at position 256."""
    return against_pytorch(machine, "--tokens 257 --tail 1")


def against_pytorch(machine, what):
    options = pytorch(machine)
    if not (FOLDER / "large").is_dir():
        machine.run(f"{EXPORT} --random large -o large")
    return machine.bench(f"--engine large {what} {options}")


STEPS = {step.__name__: step for step in [parity, training, demo, image, images, late_token]}


def perform(step, machine):
    """Runs a step, and returns its record."""
    print(f"{step.__name__}: {step.__doc__}", flush=True)
    start = time.monotonic()
    record = {"what": step.__doc__}
    try:
        record.update(status="passed", result=step(machine))
    except Skipped as reason:
        record.update(status="skipped", reason=str(reason))
    except RuntimeError as error:
        record.update(status="failed", reason=str(error))
    record["seconds"] = round(time.monotonic() - start, 1)
    reason = record.get("reason", "").splitlines()[:12]
    print(f"    {record['status']} in {record['seconds']} s", *reason, sep="\n    ", flush=True)
    return record


def card():
    """Name, memory and driver of the GPUs."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown: nvidia-smi does not answer"


def table(result):
    """The results of tests as a Markdown table."""
    lines = ["| test | largest difference |", "|---|---:|"]
    for name, test in result.items():
        difference = test["largest_difference"]
        lines.append(f"| `{name}` | {'' if difference is None else f'{difference:.1e}'} |")
    return "\n".join(lines)


def markdown(results):
    """The results as a document."""
    parts = [f"# eqim on {results['device']}\n\nGPU: {results['card']}"]
    for name, record in results["steps"].items():
        parts.append(f"## {name}: {record['status']}\n\n{record['what']} {record['seconds']} s.")
        result = record.get("result")
        if result is None:
            parts.append(f"```\n{record['reason']}\n```")
        else:
            parts.append(result["markdown"] if "markdown" in result else table(result))
    return "\n\n".join(parts) + "\n"


def save(name, text):
    """Writes a file of the folder as a whole."""
    partial = FOLDER / f"{name}.partial"
    partial.write_text(text)
    partial.replace(FOLDER / name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda:0", help="device of Candle and PyTorch: cuda:N or cpu")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), help="steps to run")
    arguments = parser.parse_args()
    folders = library_folders()
    if arguments.device != "cpu":
        check_libraries(folders)
    unpack()
    machine = Machine(arguments.device, folders)
    results = {"device": arguments.device, "card": card(), "steps": {}}
    for name in arguments.only:
        results["steps"][name] = perform(STEPS[name], machine)
        # After every step, so that a run that is stopped has results.
        save("results.json", json.dumps(results, indent=1))
        save("results.md", markdown(results))
    states = [record["status"] for record in results["steps"].values()]
    print(f"{states.count('passed')} passed, {states.count('failed')} failed, {states.count('skipped')} skipped: see results.md")
    sys.exit(1 if "failed" in states else 0)


if __name__ == "__main__":
    main()
