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

# The recipe of the tests of eqim-train: images 32 pixels high, tokens 4 pixels wide.
MICRO = (ROOT / "programs/tests/training/micro.toml").read_text()
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
    recipe = MICRO
    for old, new in [
        ("steps = 6", f"steps = {steps}\nshard_optimizer = true"),
        ("batch_size = 3", "batch_size = 8"),
        ("checkpoint_every = 3", "checkpoint_every = 10"),
        ("sample_every = 6", "sample_every = 1000"),
    ]:
        assert old in recipe
        recipe = recipe.replace(old, new)
    (place / "recipe.toml").write_text(recipe)
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
