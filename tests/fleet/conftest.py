"""A running slurmctld and slurmd, and what the tests of this folder share.

EQIM_PROGRAMS is the folder of the built programs, EQIM_BUNDLE the demo bundle. The tests run as root, as slurmd does.
"""

import getpass
import os
import re
import socket
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(os.environ.get("EQIM_PROGRAMS", ROOT / "target/release")).resolve()
BUNDLE = Path(os.environ.get("EQIM_BUNDLE", ROOT / "demo/bundle")).resolve()
# Seconds. Longer than anything takes here.
PATIENCE = 120
# States of tasks that have ended.
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
# The node declares more CPUs than the machine has, so that tasks run side by side. Its address is written next to its
# name, so that no name is resolved. A requeued task waits until the credentials of its first run have expired:
# cred_expire is 120 s by default.
CONFIGURATION = """
ClusterName=eqim
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/node
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=1,sched_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
NodeName=node NodeHostname={host} NodeAddr=127.0.0.1 CPUs=8
PartitionName=all Nodes=node Default=YES
"""


def until(condition, what):
    """Waits until a condition holds, and returns its value."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE} s"
        time.sleep(0.02)
    return value


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Slurm:
    """munged, slurmctld and slurmd of one machine, with their own configuration, key, state and ports."""

    def __init__(self, folder):
        self.folder, self.servers = folder, []
        for name in ["controller", "node"]:
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        configuration = folder / "slurm.conf"
        text = CONFIGURATION.format(
            folder=folder,
            host=socket.gethostname().split(".")[0],
            user=getpass.getuser(),
            controller_port=free_port(),
            node_port=free_port(),
        )
        configuration.write_text(text)
        # The variables of an outer cluster would change the arrays of this one.
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.environment["SLURM_CONF"] = str(configuration)
        # The folder of the servers is not in the PATH of every user.
        self.environment["PATH"] = f"{PROGRAMS}:{os.environ['PATH']}:/usr/sbin"
        names = ["key-file", "socket", "pid-file", "seed-file", "log-file"]
        files = [f"--{name}={folder}/munge.{name.removesuffix('-file')}" for name in names]
        try:
            # Without --force, munged refuses a socket in a folder that other users cannot open.
            self.start("munged", "--foreground", "--force", *files)
            self.until((folder / "munge.socket").exists, "socket of munged")
            self.start("slurmctld", "-D", "-c")
            self.start("slurmd", "-D")
            self.until(lambda: self.try_to("sinfo", "-h", "-o", "%t").stdout == "idle\n", "start of the node")
        except BaseException:
            self.end()
            raise

    def start(self, *command):
        with open(self.folder / f"{command[0]}.log", "w") as log:
            self.servers.append(subprocess.Popen(command, stdout=log, stderr=log, env=self.environment))

    def until(self, condition, what):
        """Waits until a condition holds, as long as the servers run."""
        until(lambda: condition() or any(server.poll() is not None for server in self.servers), what)
        assert all(server.poll() is None for server in self.servers), self.log()

    def log(self):
        """What the servers have written."""
        return "".join(f"{path.name}:\n{path.read_text()}\n" for path in sorted(self.folder.glob("*.log")))

    def try_to(self, *command, folder=None, **environment):
        """Runs a command, and returns the finished process."""
        environment = {**self.environment, **environment}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE)

    def run(self, *command, **options):
        """Runs a command, and returns what it printed."""
        done = self.try_to(*command, **options)
        assert done.returncode == 0, f"{command}: {done.stderr}\n{self.log()}"
        return done.stdout

    def tasks(self, array):
        """The fields of the tasks of an array, by the numbers of the tasks. Tasks that have not run yet are one: "1-3"."""
        lines = self.run("scontrol", "--oneliner", "show", "job", str(array)).splitlines()
        fields = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines]
        return {task.get("ArrayTaskId"): task for task in fields}

    def ended(self, array):
        """Waits until all tasks of an array have ended. Returns state, exit code and number of restarts of each."""

        def are_ended():
            tasks = self.tasks(array)
            return tasks if all(task["JobState"] in ENDED for task in tasks.values()) else None

        tasks = until(are_ended, f"end of array {array}")
        return {number: (task["JobState"], task["ExitCode"], task["Restarts"]) for number, task in tasks.items()}

    def end(self):
        """Cancels all jobs, then ends the servers. A server that does not end is killed."""
        try:
            if len(self.servers) == 3:
                self.try_to("scancel", f"--user={getpass.getuser()}")
                until(lambda: not self.try_to("squeue", "-h").stdout, "end of all jobs")
        finally:
            for server in reversed(self.servers):
                server.terminate()
                try:
                    server.wait(10)
                except subprocess.TimeoutExpired:
                    server.kill()
                    server.wait()


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A cluster for all tests."""
    # The path of a socket has at most 108 bytes.
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.end()


def new_place(folder):
    """A folder with the names of the documentation: examples, demo/bundle."""
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "demo").mkdir()
    (folder / "demo/bundle").symlink_to(BUNDLE)
    return folder


@pytest.fixture
def place(tmp_path):
    """A folder for the arrays of a test."""
    return new_place(tmp_path)
