"""The programs of eqim as console scripts."""

import signal
import sys

from ._eqim import main


def _run(name: str) -> None:
    # The programs handle signals, as without Python.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main([name, *sys.argv[1:]]))


def bench() -> None:
    """Run eqim-bench."""
    _run("eqim-bench")


def evaluate() -> None:
    """Run eqim-eval."""
    _run("eqim-eval")


def export() -> None:
    """Run eqim-export."""
    _run("eqim-export")


def run() -> None:
    """Run eqim-run."""
    _run("eqim-run")


def serve() -> None:
    """Run eqim-serve."""
    _run("eqim-serve")


def train() -> None:
    """Run eqim-train."""
    _run("eqim-train")
