"""The commands and the Python programs of docs/serving.md are run as they stand, with the address of a service here."""

import base64
import re
import subprocess
import sys

import pytest
from conftest import PATIENCE, ROOT, png_size

ADDRESS = "127.0.0.1:8000"


def blocks(language):
    """The blocks of the document in a language."""
    text = (ROOT / "docs/serving.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands():
    """The commands of the document that begin with curl, each with the lines that continue it."""
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("curl ")]


def run(service, folder, *command):
    """Runs a command in a folder, and returns what it printed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr + service.log.read_text()
    return done.stdout


@pytest.mark.parametrize("found", [commands(), blocks("python")], ids=["curl", "python"])
def test_the_document_has_programs_of_clients(found):
    assert found and all(ADDRESS in program for program in found), found


@pytest.mark.parametrize("command", commands())
def test_curl(service, photo, tmp_path, command):
    answer = run(service, tmp_path, "bash", "-c", command.replace(ADDRESS, service.address))
    if "/v1/images/" not in command:
        assert answer and '"error"' not in answer, answer
        return
    # The last image of a stream is the whole one.
    files = re.findall(r'"b64_json": *"([^"]+)"', answer)
    assert files, answer
    size = png_size(base64.b64decode(files[-1]))
    asked = re.search(r'(?:"size": *"|size=)(\d+x\d+)', command)
    assert asked is None or size == asked.group(1)


@pytest.mark.parametrize("program", blocks("python"))
def test_python(service, photo, tmp_path, program):
    printed = run(service, tmp_path, sys.executable, "-c", program.replace(ADDRESS, service.address))
    assert "stream=True" not in program or "image_generation.completed" in printed, printed
