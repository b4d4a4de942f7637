"""examples/slurm/generate.sbatch, run by Slurm: each image is made once, with the bytes of one process."""

import json
import os
import re
import subprocess

import pytest
from conftest import BUNDLE, PATIENCE, PROGRAMS, ROOT, new_place, until

TASKS = 3
FLAGS = ["--cfg", "3"]
# The bytes depend on the number of threads: all runs here have one.
COMMAND = ["sbatch", "--parsable", "--cpus-per-task=1"]
SCRIPT = ["examples/slurm/generate.sbatch", "demo/bundle", "jobs.jsonl", "images", *FLAGS]

# State, exit code and restarts of a task: done in one run, done in two runs, ended by bad input.
DONE, AGAIN, REFUSED = ("COMPLETED", "0:0", "0"), ("COMPLETED", "0:0", "1"), ("FAILED", "2:0", "0")
# The first run of a task does not end before its time limit.
SLOW = """#!/bin/bash
{programs}/eqim-run "$@" || exit
[[ -n ${{SLURM_RESTART_COUNT:-}} ]] || exec sleep 600
"""


def job(number):
    settings = {"id": f"image-{number}", "class": number % 5, "seed": 1000 + number, "tokens": 8 + number % 9}
    # Jobs with and without guidance.
    return settings if number % 3 else {**settings, "cfg": 1}


JOBS = [job(number) for number in range(48)]
FEW = JOBS[:6]


def names(jobs):
    return [settings["id"] for settings in jobs]


def lines_of(jobs):
    return "".join(json.dumps(settings) + "\n" for settings in jobs)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The bytes of the images and of their records from one process, by the names of the files."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "jobs.jsonl").write_text(lines_of(JOBS))
    command = [PROGRAMS / "eqim-run", "--engine", BUNDLE, "--jobs", "jobs.jsonl", "--output", "images", *FLAGS]
    done = subprocess.run(
        [*command, "--threads", "1", "--max-batch", "1"], cwd=folder, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    return contents(folder / "images")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def of_jobs(alone, jobs):
    """The files of some jobs."""
    return {f"{name}.{kind}": alone[f"{name}.{kind}"] for name in names(jobs) for kind in ["png", "json"]}


def submit(slurm, place, *options, script=SCRIPT, **environment):
    """Submits the script, and returns the number of the array."""
    return slurm.run(*COMMAND, *options, *script, folder=place, **environment).strip()


def finished(place, array, task="*"):
    """Ids of the images that the runs of an array, or of one of its tasks, have reported."""
    lines = "".join(path.read_text() for path in place.glob(f"*-{array}_{task}.jsonl")).splitlines(keepends=True)
    # The last line may not be complete yet.
    results = [json.loads(line) for line in lines if line.endswith("\n")]
    return [result["id"] for result in results if "file" in result]


def log(place, array):
    """What the tasks of an array have written to their logs."""
    return "".join(path.read_text() for path in place.glob(f"*-{array}_*.log"))


def states_of_files(folder):
    """What changes if a file is written again, for the images with a record."""
    files = [path for record in folder.glob("*.json") for path in [record, record.with_suffix(".png")]]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def assert_unchanged(before):
    assert before == {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in before}


@pytest.fixture(scope="module", autouse=True)
def limited(slurm, tmp_path_factory):
    """The folder and the array of a task that reaches its time limit. It runs beside the other tests, since Slurm looks at
    time limits every 30 s."""
    place = new_place(tmp_path_factory.mktemp("limited"))
    (place / "jobs.jsonl").write_text(lines_of(FEW))
    program = place / "bin/eqim-run"
    program.parent.mkdir()
    program.write_text(SLOW.format(programs=PROGRAMS))
    program.chmod(0o755)
    path = f"{program.parent}:{slurm.environment['PATH']}"
    return place, submit(slurm, place, "--array=1", "--job-name=limited", "--time=1", PATH=path)


def test_a_task_is_requeued_and_another_one_cancelled_and_submitted_again(slurm, place, alone):
    (place / "jobs.jsonl").write_text(lines_of(JOBS))
    array = submit(slurm, place, f"--array=1-{TASKS}")
    until(lambda: all(len(finished(place, array, task)) >= 2 for task in [1, 2]), "two images of two tasks")
    slurm.run("scontrol", "requeue", f"{array}_1")
    slurm.run("scancel", f"{array}_2")
    # The parts of the second array are others.
    again = submit(slurm, place, "--array=5-6")

    until(lambda: slurm.tasks(array)["1"]["JobState"] == "PENDING", "end of the first run of task 1")
    until(lambda: slurm.tasks(array)["2"]["JobState"] == "CANCELLED", "end of task 2")
    before = states_of_files(place / "images")
    for task in [1, 2]:
        assert len(finished(place, array, task)) < len(JOBS) / TASKS - 1, "was not interrupted in its middle"

    ended = slurm.ended(array)
    assert (ended["1"], ended["2"][0], ended["3"]) == (AGAIN, "CANCELLED", DONE)
    assert_unchanged(before)
    before = states_of_files(place / "images")
    left = {name for name in names(JOBS) if place / f"images/{name}.json" not in before}
    # Only jobs of the cancelled task are left. Part 2 of 3 has every third job, from the second.
    assert left and left < set(names(JOBS[1::TASKS]))

    assert slurm.ended(again) == {"5": DONE, "6": DONE}
    first, second = slurm.tasks(array), slurm.tasks(again)
    # The older array had ended.
    assert min(task["StartTime"] for task in second.values()) >= max(task["EndTime"] for task in first.values())
    assert_unchanged(before)
    assert sorted(finished(place, again)) == sorted(left)
    reported = finished(place, array) + finished(place, again)
    assert len(reported) == len(set(reported))
    assert contents(place / "images") == alone


def test_a_line_that_is_no_job_fails_its_task_once(slurm, place, alone):
    (place / "jobs.jsonl").write_text(lines_of([*FEW, {"id": "bad", "class": 99}]))
    array = submit(slurm, place, "--array=1-2")
    assert slurm.ended(array) == {"1": ("FAILED", "1:0", "0"), "2": DONE}
    assert "1 jobs failed" in log(place, array)
    assert contents(place / "images") == of_jobs(alone, FEW)


@pytest.mark.parametrize(
    "options, script, message",
    [
        (["--array=1-2"], SCRIPT[:1], "expected BUNDLE JOBS.jsonl FOLDER, found 0 arguments"),
        (["--array=1,3"], SCRIPT, "--array has gaps"),
        (["--array=1-5:2"], SCRIPT, "--array has gaps"),
        (["--array="], SCRIPT, "is not a task of an array"),
        (["--array=1-2", "--export=ALL,PATH=/usr/bin:/bin"], SCRIPT, "eqim-run is not in PATH"),
        (["--array=1-2"], [SCRIPT[0], "no-bundle", *SCRIPT[2:]], "no-bundle"),
        (["--array=1-2"], [*SCRIPT, "--steps", "many"], "'many' for '--steps"),
    ],
)
def test_bad_input_is_not_requeued(slurm, place, options, script, message):
    (place / "jobs.jsonl").write_text(lines_of(FEW))
    array = submit(slurm, place, *options, script=script)
    assert set(slurm.ended(array).values()) == {REFUSED}
    assert message in log(place, array)
    assert not (place / "images").exists()


def test_a_task_without_a_finished_image_is_not_requeued_at_its_time_limit(slurm, place, alone):
    # eqim-run waits for the jobs of the pipe. The signal is the one of the time limit.
    pipe = place / "jobs.jsonl"
    os.mkfifo(pipe)
    array = submit(slurm, place, "--array=1")
    until(lambda: "is read to its end" in log(place, array), "start of eqim-run")
    slurm.run("scancel", "--batch", "--signal=USR1", f"{array}_1")
    until(lambda: "no image was finished within the time limit" in log(place, array), "message")
    # Without O_NONBLOCK, this would wait for ever if eqim-run has ended.
    with open(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK), "w") as end:
        end.write(lines_of(FEW))
    assert slurm.ended(array) == {"1": DONE}
    assert contents(place / "images") == of_jobs(alone, FEW)


def test_the_commands_of_the_documentation(slurm, place):
    """The commands are run as they stand, with the number of an array of this cluster and with one thread."""
    section = (ROOT / "docs/fleet.md").read_text().split("\n## Slurm\n")[1].split("\n## ")[0]
    commands = "".join(re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)).splitlines()
    submission, *others = [command.replace("--cpus-per-task=4", "--cpus-per-task=1") for command in commands]
    assert "--cpus-per-task=1" in submission and others
    (place / "jobs.jsonl").write_text(lines_of([*JOBS, {"id": "bad", "class": 99}]))
    array = re.fullmatch(r"Submitted batch job (\d+)\n", slurm.run("bash", "-c", submission, folder=place)).group(1)
    until(lambda: all(finished(place, array, task) for task in range(1, 9)), "an image of each task")
    for command in others:
        slurm.run("bash", "-c", command.replace("1234", array), folder=place)


def test_a_task_is_requeued_at_its_time_limit(slurm, limited, alone):
    place, array = limited
    assert slurm.ended(array) == {"1": AGAIN}
    assert len(finished(place, array)) == len(FEW)
    assert "DUE TO JOB REQUEUE" in log(place, array)
    assert f"0 jobs done, {len(FEW)} done before, 0 failed" in log(place, array)
    assert contents(place / "images") == of_jobs(alone, FEW)


def test_a_task_is_started_again_when_its_node_fails(slurm, place, alone):
    (place / "jobs.jsonl").write_text(lines_of(JOBS))
    array = submit(slurm, place, "--array=0-1%2")
    until(lambda: all(len(finished(place, array, task)) >= 2 for task in [0, 1]), "two images of two tasks")
    slurm.run("scontrol", "update", "nodename=node", "state=down", "reason=test")
    until(lambda: all(task["JobState"] == "PENDING" for task in slurm.tasks(array).values()), "requeue")
    before = states_of_files(place / "images")
    assert 4 <= len(before) / 2 < len(JOBS) - 4, "was not interrupted in its middle"
    assert slurm.ended(array) == {"0": AGAIN, "1": AGAIN}
    assert_unchanged(before)
    assert contents(place / "images") == alone
