#!/usr/bin/env python3
"""Build the photographs for the demo model: copy those of the repository, and fetch the others.

OUT/train/CLASS and OUT/heldout/CLASS get the photographs that photos.tsv names. The ones that are not in the repository
come from their Debian packages, through apt; no root is needed, and the machine's own apt stays as it is. A second run
fetches only what is missing. Needs Python 3.9, Pillow, apt-get and dpkg-deb.
"""

import argparse
import csv
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

try:
    from PIL import Image
except ImportError:
    sys.exit("error: Pillow is not installed: pip install pillow")

HERE = Path(__file__).resolve().parent
TABLE = HERE / "photos.tsv"
COLUMNS = "class file package version suite path licence author sha256 crop height use heldout copy_sha256".split()
LEFT_OUT = "left out: "
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

# A configuration of apt with its state in {folder}. It reads nothing of the machine's but the keys that it trusts.
APT = """
Dir::Etc::main "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::Etc::sourcelist "{folder}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::State "{folder}";
Dir::State::lists "{folder}/lists";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
APT::Sandbox::User "root";
Acquire::Languages "none";
"""


class Problem(Exception):
    """An error to show without its traceback."""


class BadInput(Problem):
    """An argument or a file that cannot be used: exit code 2."""


class Failed(Problem):
    """A run that could not be finished: exit code 1."""


def read_table(table):
    """The rows of photos.tsv, as dictionaries."""
    try:
        with open(table, encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{table}: cannot be read: {error}") from error
    if not lines or lines[0] != COLUMNS:
        raise BadInput(f"{table}: the first line must be the columns {' '.join(COLUMNS)}, separated by tabs")
    rows = [check_row(line, f"{table}:{number}") for number, line in enumerate(lines[1:], 2)]
    names = [name(row) for row in rows]
    if twice := sorted({one for one in names if names.count(one) > 1}):
        raise BadInput(f"{table}: {twice[0]} is listed twice")
    return rows


def check_row(line, place):
    if len(line) != len(COLUMNS) or not all(line):
        raise BadInput(f"{place}: expected {len(COLUMNS)} columns, none of them empty")
    row = dict(zip(COLUMNS, line))
    use, heldout = row["use"], row["heldout"]
    if use not in ("repository", "fetched") and not use.startswith(LEFT_OUT):
        raise BadInput(f"{place}: use is {use!r}, expected 'repository', 'fetched' or '{LEFT_OUT}REASON'")
    if heldout not in ("yes", "no") or heldout == "yes" and not is_used(row):
        raise BadInput(f"{place}: heldout is {heldout!r}, expected 'no', or 'yes' for a photograph that is used")
    if not row["height"].isdecimal():
        raise BadInput(f"{place}: height is {row['height']!r}, expected a number of pixels")
    for part in row["class"], row["file"]:
        if part.startswith(".") or Path(part).name != part:
            raise BadInput(f"{place}: {part!r} is not a plain name")
    return row


def is_used(row):
    return not row["use"].startswith(LEFT_OUT)


def name(row):
    return f"{row['class']}/{row['file']}"


def destination(out, row):
    return out / ("heldout" if row["heldout"] == "yes" else "train") / row["class"] / row["file"]


def check_folder(out, rows):
    """Refuses a folder with other files: a photograph that has changed sides would be both trained on and held out."""
    if out.resolve().is_relative_to(HERE):
        raise BadInput(f"{out}: is in the folder of the repository's photographs, choose another")
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out}: is not a folder")
    wanted = {destination(out, row) for row in rows}
    for part in "train", "heldout":
        for path in sorted((out / part).rglob("*")):
            if path.is_file() and not path.name.startswith(".") and path not in wanted:
                raise BadInput(f"{path}: is not in photos.tsv there, delete it or choose another folder")


def write(path, data):
    """Writes a file under a temporary name first, so that an interrupted run leaves no incomplete photograph."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def check_sha256(data, expected, what):
    if (found := hashlib.sha256(data).hexdigest()) != expected:
        raise Failed(f"{what}: SHA-256 is {found}, expected {expected}")


def copy(row, out):
    source = HERE / row["class"] / row["file"]
    data = source.read_bytes()
    check_sha256(data, row["copy_sha256"], source)
    write(destination(out, row), data)


def convert(data, height, what):
    """The JPEG of a package's picture, without metadata, at most `height` pixels high."""
    try:
        with Image.open(io.BytesIO(data)) as source:
            image = source.convert("RGB")
    except OSError as error:
        raise Failed(f"{what}: Pillow cannot read it: {error}") from error
    if image.height > height:
        image = image.resize((round(image.width * height / image.height), height), Image.LANCZOS)
    # Pillow would take the comment of the source.
    image.info.clear()
    result = io.BytesIO()
    image.save(result, "JPEG", quality=88, optimize=True)
    return result.getvalue()


def run(*command, **options):
    """The standard output of a command."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    except FileNotFoundError as error:
        raise Failed(f"{command[0]}: is not installed; fetching needs apt-get and dpkg-deb, as on Debian") from error
    if done.returncode:
        raise Failed(f"{' '.join(command)}: exit code {done.returncode}\n{(done.stderr or done.stdout).strip()}")
    return done.stdout


def find_mirror():
    """The Debian mirror in the machine's sources of apt."""
    # With --no-release-info, apt also names the sources whose lists it does not have yet.
    names = "--no-release-info", "--format", "$(REPO_URI) $(COMPONENT)"
    targets = run("apt-get", "indextargets", *names, "Created-By: Packages")
    for target in targets.splitlines():
        uri, _, component = target.partition(" ")
        if component == "main" and uri.rstrip("/").endswith("/debian"):
            return uri
    raise Failed("apt's sources name no Debian mirror that ends in /debian: give one with --mirror URI")


def open_apt(folder, mirror, suite):
    """Sets up an apt of its own in `folder`, for a suite of a mirror. Returns the environment to call it with."""
    for part in "lists/partial", "cache/archives/partial":
        (folder / part).mkdir(parents=True)
    (folder / "status").touch()
    # How to reach the mirror, for example by a proxy, is as on the machine.
    lines = run("apt-config", "dump").splitlines()
    ways = [line for line in lines if line.startswith("Acquire::") and not line.startswith("Acquire::IndexTargets")]
    (folder / "apt.conf").write_text("\n".join(ways) + APT.format(folder=folder), encoding="utf-8")
    keys = f" [signed-by={KEYRING}]" if KEYRING.exists() else ""
    (folder / "sources.list").write_text(f"deb{keys} {mirror} {suite} main\n", encoding="utf-8")
    environment = {**os.environ, "APT_CONFIG": str(folder / "apt.conf"), "LC_ALL": "C"}
    # Without --error-on, apt only warns of a suite that it cannot get.
    run("apt-get", "update", "--error-on=any", env=environment)
    return environment


def unpack(package, paths):
    """The contents of some files of a .deb, by their paths."""
    found = {}
    with tempfile.TemporaryFile() as file:
        try:
            subprocess.run(["dpkg-deb", "--fsys-tarfile", package], stdout=file, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise Failed(f"{package}: cannot be unpacked: {error}") from error
        file.seek(0)
        with tarfile.open(fileobj=file) as archive:
            for member in archive:
                path = member.name.removeprefix("./")
                if path in paths and member.isfile():
                    found[path] = archive.extractfile(member).read()
    return found


def fetch(package, rows, out, environment):
    """Fetches a package and writes its photographs."""
    with tempfile.TemporaryDirectory() as folder:
        run("apt-get", "download", package, cwd=folder, env=environment)
        (file,) = Path(folder).glob("*.deb")
        pictures = unpack(file, {row["path"] for row in rows})
    for row in rows:
        what = f"{package}: {row['path']}"
        if row["path"] not in pictures:
            raise Failed(f"{what}: is not in the package")
        data = pictures[row["path"]]
        check_sha256(data, row["sha256"], what)
        write(destination(out, row), convert(data, int(row["height"]), what))


def fetch_suite(suite, rows, out, mirror):
    """Fetches the photographs of a suite. Returns how many packages could not be fetched."""
    packages = sorted({f"{row['package']}={row['version']}" for row in rows})
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            environment = open_apt(Path(folder), mirror or find_mirror(), suite)
        except Failed as error:
            print(f"error: {suite}: {error}", file=sys.stderr)
            return len(packages)
        for package in packages:
            mine = [row for row in rows if f"{row['package']}={row['version']}" == package]
            print(f"{suite}: {package}: photographs to fetch: {len(mine)}", flush=True)
            try:
                fetch(package, mine, out, environment)
            except Failed as error:
                print(f"error: {error}", file=sys.stderr)
                failures += 1
    return failures


def build(out, mirror):
    rows = [row for row in read_table(TABLE) if is_used(row)]
    check_folder(out, rows)
    missing = [row for row in rows if not destination(out, row).exists()]
    for row in missing:
        if row["use"] == "repository":
            copy(row, out)
    missing = [row for row in missing if row["use"] == "fetched"]
    failures = 0
    for suite in sorted({row["suite"] for row in missing}):
        failures += fetch_suite(suite, [row for row in missing if row["suite"] == suite], out, mirror)
    if failures:
        raise Failed(f"{out}: not complete, packages that failed: {failures}; a second run fetches only what is missing")
    heldout = sum(row["heldout"] == "yes" for row in rows)
    print(f"{out}: {len(rows) - heldout} photographs in train, {heldout} in heldout")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; what it has already is kept")
    parser.add_argument(
        "--mirror", metavar="URI", help="Debian mirror with the suites of photos.tsv [default: that of apt's sources]"
    )
    options = parser.parse_args(arguments)
    try:
        build(options.out, options.mirror)
    except Problem as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
