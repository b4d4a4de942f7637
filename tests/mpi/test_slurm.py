"""examples/slurm/train.sbatch, run by Slurm: the result of several ranks, and of a requeued job, is that of one process.

EQIM_PROGRAMS has an eqim-train with the feature mpi, and PATH an mpirun.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/fleet"))

from conftest import PATIENCE, PROGRAMS, slurm, until  # noqa: E402, F401

# A tokenizer for images 32 pixels high, with tokens 4 pixels wide.
RECIPE = """
[tokenizer]
perceptual_weight = 0
[tokenizer.model]
rows = 8
embed = 16
groups = 2
[tokenizer.model.encoder]
z_channels = 4
conv_in = 8
levels = [{channels = 8, attention = false}, {channels = 8, attention = false}, {channels = 16, attention = true}]
[tokenizer.model.decoder]
z_channels = 4
conv_in = 16
levels = [{channels = 8, attention = false}, {channels = 8, attention = false}, {channels = 16, attention = true}]
[tokenizer.plan]
steps = STEPS
batch_size = 8
tokens = 4
validation = 1
schedule = "constant"
base_learning_rate = 0.1
shard_optimizer = true
checkpoint_every = 10
sample_every = 1000
"""
TRAINING = ["tokenizer", "--images", "photos", "--recipe", "recipe.toml"]


@pytest.fixture
def place(tmp_path):
    """A folder with photographs."""
    for name in ["field", "sky"]:
        (tmp_path / "photos" / name).mkdir(parents=True)
        for photo in sorted((ROOT / "assets/photos" / name).glob("*.jpg"))[:2]:
            shutil.copy(photo, tmp_path / "photos" / name)
    return tmp_path


def submit(slurm, place, steps, output):
    (place / "recipe.toml").write_text(RECIPE.replace("STEPS", str(steps)))
    # mpirun refuses to run as root otherwise.
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    flags = ["--parsable", "--ntasks-per-node=2", "--cpus-per-task=1"]
    line = ["sbatch", *flags, ROOT / "examples/slurm/train.sbatch", *TRAINING, "-o", output]
    return slurm.run(*line, folder=place, **root).strip()


def alone(place, output):
    command = [PROGRAMS / "eqim-train", *TRAINING, "-o", output]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


def state(place, output):
    return (place / output / "state.safetensors").read_bytes()


def log(place, job):
    path = place / f"eqim-train-{job}.log"
    return path.read_text() if path.exists() else ""


def test_ranks_of_a_job(slurm, place):
    job = submit(slurm, place, 20, "ranks")
    assert slurm.ended(job) == {None: ("COMPLETED", "0:0", "0")}, log(place, job)
    alone(place, "alone")
    assert state(place, "ranks") == state(place, "alone")


def test_a_requeued_job_goes_on(slurm, place):
    job = submit(slurm, place, 300, "ranks")
    until(lambda: (place / "ranks/state.safetensors").exists(), "first checkpoint")
    slurm.run("scontrol", "requeue", job)
    assert slurm.ended(job) == {None: ("COMPLETED", "0:0", "1")}, log(place, job)
    assert "resuming after step" in log(place, job)
    alone(place, "alone")
    assert state(place, "ranks") == state(place, "alone")


def test_a_bad_recipe_fails(slurm, place):
    job = submit(slurm, place, 0, "ranks")
    assert slurm.ended(job)[None][:2] == ("FAILED", "2:0"), log(place, job)
    assert "rank 0 of 2: " in log(place, job) and "steps" in log(place, job)
    assert os.listdir(place) and not (place / "ranks").exists()
