"""The console scripts, which are the programs of the package."""

import os
import re
import signal
import subprocess
import sys
import sysconfig
import urllib.request
from pathlib import Path

import pytest
from conftest import BUNDLE, PATIENCE, ROOT, environment, printed
from PIL import Image as Pillow

import eqim

SCRIPTS = Path(sysconfig.get_path("scripts"))
PROGRAMS = ["eqim-bench", "eqim-eval", "eqim-export", "eqim-run", "eqim-serve", "eqim-train"]


def run(program, *arguments, folder=None, **variables):
    """Runs a program. Returns the process, which has ended."""
    command = [program, *map(str, arguments)]
    variables = {**environment(), **variables}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_is_that_of_the_native_program(programs, name):
    for flag in ("--help", "-h", "--version"):
        ours, native = run(SCRIPTS / name, flag), run(programs / name, flag)
        assert (ours.returncode, ours.stdout, ours.stderr) == (0, native.stdout, "")
    assert ours.stdout == f"{name} {eqim.__version__}\n"


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version

    assert eqim.__version__ == version("eqim")


BAD = [
    ("eqim-bench", ["--engine", "missing"]),
    ("eqim-export", ["inspect", "missing"]),
    ("eqim-export", ["onnx", "--generator", "missing.pth", "--tokenizer", "missing.ckpt", "-o", "out"]),
    ("eqim-run", ["--engine", "missing"]),
    ("eqim-run", ["--engine", BUNDLE, "--class", "cat"]),
    ("eqim-run", ["--tokens", "many"]),
    ("eqim-serve", ["--engine", "missing"]),
    ("eqim-train", ["tokenizer", "--images", "missing", "-o", "out"]),
    *[(name, ["--unknown"]) for name in PROGRAMS],
]


@pytest.mark.parametrize(("name", "arguments"), BAD)
def test_bad_input_has_exit_code_2(programs, tmp_path, name, arguments):
    ours, native = (run(folder / name, *arguments, folder=tmp_path) for folder in (SCRIPTS, programs))
    assert (ours.returncode, ours.stdout, ours.stderr) == (2, native.stdout, native.stderr)
    assert native.returncode == 2 and "rror" in ours.stderr and not os.listdir(tmp_path)


def test_eqim_run_writes_the_same_bytes(programs, engine, tmp_path):
    backend = {"ONNX Runtime": "ort", "Candle": "candle"}[engine.backend]
    flags = ["--engine", BUNDLE, "--backend", backend, "--tokens", 6, "--seed", 4, "--cfg", 3, "--steps", 8]
    for folder in (SCRIPTS, programs):
        for classes in ("forest", "sky,none"):
            output = tmp_path / folder.name / f"{classes}.png"
            output.parent.mkdir(exist_ok=True)
            made = run(folder / "eqim-run", *flags, "--class", classes, "-o", output)
            assert made.returncode == 0, made.stderr
    names = ["forest.png", "sky,none-0.png", "sky,none-1.png"]
    ours, native = ([(tmp_path / folder.name / name).read_bytes() for name in names] for folder in (SCRIPTS, programs))
    assert ours == native
    image = engine.generate(class_="forest", tokens=6, seed=4, guidance_scale=3, num_inference_steps=8)
    image.save(tmp_path / "python.png")
    assert (tmp_path / "python.png").read_bytes() == ours[0]


def test_a_program_that_is_interrupted(programs, tmp_path):
    codes = []
    for folder in (SCRIPTS, programs):
        command = [folder / "eqim-run", "--engine", BUNDLE, "--tokens", "100000", "-o", tmp_path / "image.png"]
        with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
            # Progress, in which the image has begun.
            assert process.stderr.readline()
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=PATIENCE)
        codes.append(process.returncode)
    assert codes[0] == codes[1] != 0


def test_eqim_serve(tmp_path):
    command = [SCRIPTS / "eqim-serve", "--engine", BUNDLE, "--port", "0"]
    log = tmp_path / "log.txt"
    with open(log, "w") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        try:
            line = process.stdout.readline()
            assert " at http://" in line, log.read_text()
            address = line.strip().rsplit(" at ", 1)[1]
            with urllib.request.urlopen(f"{address}/health/live", timeout=PATIENCE) as answer:
                assert answer.status == 200
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 0, log.read_text()


def test_eqim_export(tmp_path):
    shown = run(SCRIPTS / "eqim-export", "inspect", BUNDLE)
    assert shown.returncode == 0 and "decoder" in shown.stdout, shown.stderr


def test_eqim_bench(tmp_path):
    flags = ["--engine", BUNDLE, "--tokens", "2", "--steps", "2", "--stage", "flow", "--duration", "0", "--iterations", "1"]
    measured = run(SCRIPTS / "eqim-bench", *flags, folder=tmp_path)
    assert measured.returncode == 0, measured.stderr


RECIPE = """
[tokenizer.model]
rows = 8
embed = 16
groups = 2
[tokenizer.model.encoder]
z_channels = 4
conv_in = 8
levels = [{ channels = 8, attention = false }, { channels = 8, attention = false }, { channels = 16, attention = true }]
[tokenizer.model.decoder]
z_channels = 4
conv_in = 16
levels = [{ channels = 8, attention = false }, { channels = 8, attention = false }, { channels = 16, attention = true }]
[tokenizer.plan]
steps = 2
batch_size = 2
tokens = 4
validation = 1
schedule = "constant"
log_every = 1
checkpoint_every = 2
sample_every = 2
"""


def test_eqim_train_restarts_itself(programs, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        with Pillow.open(ROOT / "assets/photos/mountain/fog.jpg") as photo:
            photo.resize((64, 40)).rotate(90 * number).save(photos / f"{number}.png")
    (tmp_path / "micro.toml").write_text(RECIPE)
    flags = ["tokenizer", "--images", "photos", "--recipe", "micro.toml"]
    # The program starts itself again with one thread per tensor, unless the variable is set.
    for name, folder, variables in (
        ("ours", SCRIPTS, {}),
        ("native", programs, {}),
        ("set", SCRIPTS, {"CANDLE_NUM_THREADS": "1"}),
    ):
        trained = run(folder / "eqim-train", *flags, "-o", name, folder=tmp_path, **variables)
        assert trained.returncode == 0, trained.stderr
    weights = [(tmp_path / name / "tokenizer.safetensors").read_bytes() for name in ("ours", "native", "set")]
    assert weights[0] == weights[1] == weights[2]
    # The checkpoint is one that the package reads.
    assert eqim.load_checkpoint(tmp_path / "ours/tokenizer.safetensors")


@pytest.mark.parametrize("start", [["-m", "script"], ["-P", "script.py"] if sys.version_info >= (3, 11) else ["script.py"]])
def test_eqim_train_restarts_itself_however_python_was_started(tmp_path, start):
    (tmp_path / "script.py").write_text("import sys\nfrom eqim._programs import train\nsys.argv = sys.argv\ntrain()\n")
    trained = subprocess.run(
        [sys.executable, *start, "recipe"], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert trained.returncode == 0 and "[tokenizer" in trained.stdout, trained.stderr


IMPORT = """
import sys, time
start = time.perf_counter()
import eqim
seconds = time.perf_counter() - start
with open("/proc/self/maps") as file:
    libraries = file.read()
assert "_eqim" in libraries
assert "libonnxruntime" not in libraries, "ONNX Runtime is loaded"
for module in ("onnxruntime", "torch", "PIL", "tqdm"):
    assert module not in sys.modules, module
engine = eqim.Engine.from_bundle(sys.argv[1])
# The library is loaded without its package.
assert "onnxruntime" not in sys.modules
print(seconds)
"""


def test_import_is_fast_and_loads_no_onnxruntime():
    # The time that benches/python/overhead.py prints is far below: this machine may be busy.
    assert float(printed(IMPORT, BUNDLE)) < 1


def test_the_package_has_what_it_says():
    assert set(eqim.__all__) <= set(dir(eqim))
    folder = Path(eqim.__file__).parent
    assert {"py.typed", "_eqim.pyi"} <= set(os.listdir(folder))
    assert re.fullmatch(r"\d+\.\d+\.\d+", eqim.__version__)
