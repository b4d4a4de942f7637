"""The photographs of the repository, their table, and the parts of fetch.py that need no network."""

import hashlib
import io
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = ROOT / "assets/photos"
# A folder __pycache__ in assets/photos would be committed by accident.
sys.dont_write_bytecode = True
sys.path.insert(0, str(PHOTOS))

import fetch  # noqa: E402

LICENCES = {"CC0-1.0", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0"}
# The first two were held out before the others were chosen.
HELD_OUT = ["mountain/beam.jpg", "mountain/this-is-not-windows.jpg"]
ROWS = fetch.read_table(fetch.TABLE)
COPIED = [row for row in ROWS if row["copy_sha256"] != "-"]
README = (PHOTOS / "README.md").read_text(encoding="utf-8")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def use(row):
    return row["use"].split(":")[0]


@pytest.fixture
def table(tmp_path):
    """Writes a table of one row, with some of its columns changed."""

    def write(**changes):
        row = {**ROWS[0], **changes}
        path = tmp_path / "photos.tsv"
        path.write_text("\n".join(["\t".join(fetch.COLUMNS), "\t".join(row.values()), ""]), encoding="utf-8")
        return path

    return write


@pytest.fixture
def offline(monkeypatch):
    """No command can be run, and only the photographs of the repository are used."""
    rows = [{**row, "use": "left out: test"} if use(row) == "fetched" else row for row in ROWS]
    monkeypatch.setattr(fetch, "read_table", lambda table: rows)
    monkeypatch.setattr(fetch, "run", lambda *command, **options: pytest.fail(f"{command} was run"))


def test_every_photograph_is_listed():
    assert len(ROWS) == 211
    found = {path.relative_to(PHOTOS).as_posix() for path in PHOTOS.rglob("*") if path.parent != PHOTOS}
    assert found - {row["class"] for row in ROWS} == {fetch.name(row) for row in COPIED}
    assert {path.name for path in PHOTOS.iterdir() if path.is_file()} == {"README.md", "fetch.py", "photos.tsv"}


@pytest.mark.parametrize("row", COPIED, ids=fetch.name)
def test_photographs_of_the_repository(row):
    path = PHOTOS / row["class"] / row["file"]
    assert sha256(path) == row["copy_sha256"]
    assert row["licence"] in LICENCES
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("JPEG", "RGB")
        assert image.height <= int(row["height"])
        assert not image.getexif()


def test_columns():
    for row in ROWS:
        for column in "sha256", "copy_sha256":
            assert re.fullmatch("[0-9a-f]{64}|-", row[column]), fetch.name(row)
        assert row["sha256"] != "-", fetch.name(row)
        # What is used from the repository is there, and what is fetched is not.
        if fetch.is_used(row):
            assert (use(row) == "repository") == (row in COPIED), fetch.name(row)
            assert row["crop"] == "-", fetch.name(row)
        if use(row) == "fetched":
            assert row["suite"] in ("bookworm", "trixie"), fetch.name(row)


def credited():
    """Author, licence and package of each photograph, as the first table of credits in README.md states them."""
    section = README.split("## Credits of the photographs in this folder")[1].split("\n## ")[0]
    credits = {}
    for line in re.findall(r"^\| (`.*) \|$", section, re.MULTILINE):
        files, *credit = line.split(" | ")
        for folder, names in re.findall(r"`(\w+)/([^`]*)`", files):
            prefix, _, rest = names.partition("{")
            inner, _, suffix = rest.partition("}")
            for middle in inner.split(","):
                credits[f"{folder}/{prefix}{middle}{suffix}.jpg"] = credit
    return credits


def test_credits():
    credits = credited()
    assert credits.keys() == {fetch.name(row) for row in COPIED}
    for row in COPIED:
        author, licence, package = credits[fetch.name(row)]
        assert (licence, package) == (row["licence"], row["package"])
        assert author.startswith(row["author"].removesuffix(", Wikimedia Commons"))


def test_counts():
    counts = Counter((row["class"], use(row)) for row in ROWS)
    heldout = Counter(row["class"] for row in ROWS if row["heldout"] == "yes")
    for one in {row["class"] for row in ROWS}:
        repository, fetched, out = (counts[one, key] for key in ("repository", "fetched", "left out"))
        line = [one, repository, fetched, repository + fetched, heldout[one], out]
        assert f"| {' | '.join(map(str, line))} |" in README
    assert sum(heldout.values()) == 20


def test_held_out_are_chosen_by_hash():
    def rank(name):
        return name not in HELD_OUT, hashlib.sha256(f"eqim held out 1 {name}".encode()).hexdigest()

    for one in {row["class"] for row in ROWS}:
        rows = [row for row in ROWS if row["class"] == one and fetch.is_used(row)]
        heldout = {fetch.name(row) for row in rows if row["heldout"] == "yes"}
        assert heldout == set(sorted(map(fetch.name, rows), key=rank)[: len(heldout)])
        # Each class gives its share of 20, rounded down or up.
        assert abs(len(heldout) - 20 * len(rows) / sum(map(fetch.is_used, ROWS))) < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use": "maybe"}, "2: use is 'maybe'"),
        ({"heldout": "perhaps"}, "2: heldout is 'perhaps'"),
        ({"heldout": "yes", "use": "left out: blurred"}, "2: heldout is 'yes'"),
        ({"height": "-1"}, "2: height is '-1'"),
        ({"class": "../x"}, "2: '../x' is not a plain name"),
        ({"file": ".x.jpg"}, "2: '.x.jpg' is not a plain name"),
        ({"author": ""}, "2: expected 14 columns, none of them empty"),
        ({"author": "a\tb"}, "2: expected 14 columns"),
    ],
)
def test_bad_rows(table, changes, message):
    with pytest.raises(fetch.BadInput, match=re.escape(f"photos.tsv:{message}")):
        fetch.read_table(table(**changes))


def test_bad_tables(tmp_path, table):
    path = table()
    text = path.read_text(encoding="utf-8")
    path.write_text(text + text.splitlines()[1] + "\n", encoding="utf-8")
    with pytest.raises(fetch.BadInput, match="is listed twice"):
        fetch.read_table(path)
    for content in b"", b"class\tfile\n", b"\xff":
        path.write_bytes(content)
        with pytest.raises(fetch.BadInput, match="photos.tsv"):
            fetch.read_table(path)
    with pytest.raises(fetch.BadInput, match="no.tsv: cannot be read"):
        fetch.read_table(tmp_path / "no.tsv")


def test_copies(offline, tmp_path, capsys):
    out = tmp_path / "out"
    assert fetch.main([str(out)]) == 0
    used = [row for row in COPIED if fetch.is_used(row)]
    assert {path for path in out.rglob("*") if path.is_file()} == {fetch.destination(out, row) for row in used}
    assert all(sha256(fetch.destination(out, row)) == row["copy_sha256"] for row in used)
    assert (out / "heldout/mountain/beam.jpg").exists()
    heldout = sum(row["heldout"] == "yes" for row in used)
    assert capsys.readouterr().out == f"{out}: {len(used) - heldout} photographs in train, {heldout} in heldout\n"
    # What is there is kept.
    kept = out / "train/mountain/fog.jpg"
    kept.write_bytes(b"kept")
    assert fetch.main([str(out)]) == 0
    assert kept.read_bytes() == b"kept"


def test_refused_folders(offline, tmp_path, capsys):
    stranger = tmp_path / "out/train/mountain/beam.jpg"
    stranger.parent.mkdir(parents=True)
    stranger.touch()
    for out, message in [
        (tmp_path / "out", f"{stranger}: is not in photos.tsv there"),
        (stranger, "is not a folder"),
        (PHOTOS / "out", "is in the folder of the repository's photographs"),
    ]:
        assert fetch.main([str(out)]) == 2
        assert message in capsys.readouterr().err
    assert not (PHOTOS / "out").exists()


def test_failures_are_named(offline, monkeypatch, tmp_path, capsys):
    row = next(row for row in ROWS if use(row) == "fetched")
    monkeypatch.setattr(fetch, "read_table", lambda table: [row])

    def fails(*command, **options):
        raise fetch.Failed("apt-get: no")

    monkeypatch.setattr(fetch, "run", fails)
    assert fetch.main([str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert f"{row['suite']}: apt-get: no" in error and "packages that failed: 1" in error


def test_changed_copies_are_refused(offline, monkeypatch, tmp_path, capsys):
    rows = [{**row, "copy_sha256": row["sha256"]} for row in COPIED if fetch.is_used(row)]
    monkeypatch.setattr(fetch, "read_table", lambda table: rows)
    assert fetch.main([str(tmp_path / "out")]) == 1
    assert f"{fetch.name(rows[0])}: SHA-256 is" in capsys.readouterr().err


def test_conversion():
    source = io.BytesIO()
    picture = Image.linear_gradient("L").resize((1000, 800)).convert("RGBA")
    exif = Image.Exif()
    exif[270] = "description"
    picture.save(source, "PNG", exif=exif, icc_profile=b"profile")
    result = fetch.convert(source.getvalue(), 512, "x.png")
    assert result == fetch.convert(source.getvalue(), 512, "x.png")
    with Image.open(io.BytesIO(result)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (640, 512))
        assert not image.getexif() and not {"icc_profile", "comment"} & image.info.keys()
    with Image.open(io.BytesIO(fetch.convert(source.getvalue(), 2000, "x.png"))) as image:
        assert image.size == (1000, 800)
    with pytest.raises(fetch.Failed, match="x.png: Pillow cannot read it"):
        fetch.convert(b"no picture", 512, "x.png")


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb")
def test_unpacking(tmp_path):
    folder = tmp_path / "package"
    (folder / "DEBIAN").mkdir(parents=True)
    (folder / "DEBIAN/control").write_text("Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x\nDescription: x\n")
    (folder / "usr").mkdir()
    (folder / "usr/a").write_text("A")
    (folder / "usr/b").write_text("B")
    package = tmp_path / "x.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", folder, package], check=True, stdout=subprocess.DEVNULL)
    assert fetch.unpack(package, {"usr/a", "usr/c"}) == {"usr/a": b"A"}
    package.write_bytes(b"no package")
    with pytest.raises(fetch.Failed, match="x.deb: cannot be unpacked"):
        fetch.unpack(package, {"usr/a"})
