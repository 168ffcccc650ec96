"""`geoengine locate --out`: what is written, what is refused, and going on after any interruption."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import pytest
from command_line import refused, run
from made_bulk import ALL_BUT_ONE, BROKEN, PHOTOS, lines, names, write_photos
from tiny_bundle import write_tiny_bundle, write_tiny_tiles

from geoengine.commands.locate import locate
from geoengine.engine.bulk.formats import COLUMNS
from geoengine.engine.bulk.parts import PHOTOS_PER_PART
from geoengine.engine.engine import GeoEngine
from geoengine.engine.errors import SourceError
from geoengine.engine.render import files


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Tiny encoders of Earth, and a folder of tiles of 8 x 8 pixels."""
    home = tmp_path_factory.mktemp("bulk")
    write_tiny_bundle(home / "engines", world="earth", sides=(8,))
    write_tiny_tiles(home / "tiles")
    return home


@pytest.fixture(scope="module")
def opened(home):
    with GeoEngine.open(home / "engines", str(home / "tiles"), threads=1) as engine:
        yield engine


@pytest.fixture
def engine(opened, monkeypatch):
    """One engine for all commands: opening it takes longer than locating a few photos."""
    monkeypatch.setattr(GeoEngine, "open", lambda *arguments, **options: opened)
    monkeypatch.setattr(GeoEngine, "close", lambda self: None)
    return opened


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("GEOENGINE_CACHE", "off")


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / "photos")


@pytest.fixture
def command(home, photos, engine):
    """What locates the photos, three to a part."""
    where = ("--bundle", home / "engines", "--tiles", home / "tiles", "--threads", 1)
    return ("locate", photos, *where, "--photos-per-part", 3)


# --- what is written ---


def test_results_are_those_of_stdout_in_the_order_of_the_photos(command, tmp_path):
    out = tmp_path / "results.jsonl"
    result = run(*command, "--out", out)
    assert (result.exit_code, result.stdout) == (1, "")
    failures = tmp_path / "results.failures.jsonl"
    assert f"{out}: 9 photos located; 1 could not be read, see {failures}" in result.stderr
    printed = [json.loads(line) for line in run(*command, "--json").stdout.splitlines()]
    for record in printed:
        del record["seconds"]
    assert lines(out) == printed and names(out) == ALL_BUT_ONE
    [failure] = lines(failures)
    assert failure["position"] == BROKEN and "is not an image" in failure["reason"]
    left = {path.name for path in (tmp_path / "results.jsonl.job").iterdir()}
    assert left == {"_job.json", "_lock"}, "the parts have become one file"


def test_a_folder_keeps_its_parts(command, tmp_path):
    out = tmp_path / "results"
    assert run(*command, "--out", out, "--format", "csv").exit_code == 1
    parts = sorted(out.glob("part-*.csv"))
    assert [len(part.read_text().splitlines()) - 1 for part in parts] == [3, 2, 3, 1]
    assert [failure["position"] for failure in lines(out / "_failures.jsonl")] == [BROKEN]
    joined = tmp_path / "results.csv"
    run(*command, "--out", joined)
    rows = list(csv.DictReader(io.StringIO(joined.read_text())))
    assert [os.path.basename(row["photo"]) for row in rows] == ALL_BUT_ONE
    assert tuple(rows[0]) == COLUMNS and {row["world"] for row in rows} == {"earth"}
    text = "".join("".join(part.read_text().splitlines(keepends=True)[1:]) for part in parts)
    assert joined.read_text() == ",".join(COLUMNS) + "\n" + text


@pytest.mark.filterwarnings("ignore")  # of geopandas and what it imports
def test_geoparquet_opens_in_geopandas(command, tmp_path):
    geopandas = pytest.importorskip("geopandas")
    out, folder = tmp_path / "results.parquet", tmp_path / "results"
    run(*command, "--out", out)
    run(*command, "--out", folder, "--format", "parquet")
    records = [json.loads(line) for line in run(*command, "--json").stdout.splitlines()]
    for frame in (geopandas.read_parquet(out), geopandas.read_parquet(folder)):
        assert frame.crs.to_string() == "OGC:CRS84"
        assert [(p.x, p.y) for p in frame.geometry] == [(r["longitude"], r["latitude"]) for r in records]
        assert list(frame["z"]) == [r["candidates"][0]["z"] for r in records]
        best = frame["candidates"].iloc[0][0]
        assert best["share"] == frame["share"].iloc[0] == records[0]["candidates"][0]["share"]


def test_the_default_size_of_parts_is_the_library_s():
    import inspect

    assert inspect.signature(locate).parameters["photos_per_part"].default == PHOTOS_PER_PART


# --- going on ---


def test_a_job_that_is_done_is_not_run_again(command, tmp_path, monkeypatch):
    out = tmp_path / "results.jsonl"
    run(*command, "--out", out)
    before = out.read_bytes()
    monkeypatch.setattr("geoengine.engine.bulk.running.locate_stream", None)
    result = run(*command, "--out", out)
    assert result.exit_code == 1 and "all of it is done already" in result.stderr
    assert out.read_bytes() == before


def test_a_search_that_fails_stops_the_job_which_goes_on(command, tmp_path, monkeypatch):
    out = tmp_path / "results.jsonl"
    located, whole = [], GeoEngine.locate

    def locate_some(self, photos, **options):
        located.append(len(photos))
        if len(located) == 3:
            raise SourceError("the tile server is gone")
        return whole(self, photos, **options)

    monkeypatch.setattr(GeoEngine, "locate", locate_some)
    result = run(*command, "--out", out)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "geoengine: the tile server is gone\n" in result.stderr
    assert "6 photos done in this run; the same command goes on with the rest" in result.stderr
    assert not out.exists()
    run(*command, "--out", out)
    assert names(out) == ALL_BUT_ONE and located == [3, 2, 3, 3, 1]


def test_killed_again_and_again_every_photo_is_there_once(command, tmp_path):
    out = tmp_path / "results.jsonl"
    program = (
        "import sys, time\nfrom geoengine.engine.bulk import stream\nwhole = stream._located\n"
        "def slow(*arguments):\n    time.sleep(0.15)\n    return whole(*arguments)\n"
        "stream._located = slow\nfrom geoengine.cli import main\nmain()\n"
    )
    arguments = [str(part) for part in (*command[:-1], 1, "--out", out)]
    parts = tmp_path / "results.jsonl.job"
    for kills in range(2):
        process = subprocess.Popen([sys.executable, "-c", program, *arguments], stderr=subprocess.PIPE)
        until = time.monotonic() + 60
        while len(list(parts.glob("part-*"))) < 2 * (kills + 1) and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stderr.close()
        assert not out.exists()
    there = {file.name: file.stat().st_mtime_ns for file in parts.glob("part-*")}
    assert len(there) >= 4
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert names(out) == ALL_BUT_ONE


@pytest.mark.parametrize("out", ["results.jsonl", "results"])
def test_failures_are_tried_again_only_when_asked(command, photos, tmp_path, out):
    out = tmp_path / out
    (photos / "7.png").write_bytes(b"")
    run(*command, "--out", out)
    (photos / "7.png").write_bytes((photos / "0.png").read_bytes())
    result = run(*command, "--out", out)
    assert result.exit_code == 1 and "8 photos located; 2 could not be read" in result.stderr
    result = run(*command, "--out", out, "--retry-failed")
    assert result.exit_code == 1 and "9 photos located; 1 could not be read" in result.stderr
    parts = [out] if out.is_file() else sorted(out.glob("part-*"))
    found = [name for part in parts for name in names(part)]
    assert sorted(found) == ALL_BUT_ONE and found[-1] == "7.png"
    (photos / f"{BROKEN}.png").write_bytes((photos / "0.png").read_bytes())
    assert run(*command, "--out", out, "--retry-failed").exit_code == 0
    assert run(*command, "--out", out, "--retry-failed").exit_code == 0, "there is nothing left to try"
    found = [name for part in ([out] if out.is_file() else out.glob("part-*")) for name in names(part)]
    assert sorted(found) == sorted([*ALL_BUT_ONE, f"{BROKEN}.png"])
    assert not list(tmp_path.rglob("*failures*"))


def test_a_full_disk_stops_the_job_which_goes_on(command, tmp_path, monkeypatch):
    out = tmp_path / "results.jsonl"
    whole, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        whole(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    result = run(*command, "--out", out)
    assert result.exit_code == 1 and result.stdout == ""
    assert "cannot be written (No space left on device)\n" in result.stderr
    assert "the same command goes on with the rest" in result.stderr
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.setattr(files.os, "fsync", whole)
    assert run(*command, "--out", out).exit_code == 1
    assert names(out) == ALL_BUT_ONE


def test_a_tar_that_ends_early_gives_what_was_before(command, photos, tmp_path):
    tar = tmp_path / "photos.tar"
    with tarfile.open(tar, "w") as archive:
        for photo in sorted(photos.iterdir()):
            archive.add(photo, photo.name)
    out = tmp_path / "results.jsonl"
    assert run("locate", tar, *command[2:], "--out", out).exit_code == 1
    assert names(out) == [name.removesuffix(".png") for name in ALL_BUT_ONE]
    data = tar.read_bytes()
    tar.write_bytes(data[: data.index(b"8.png") - 100])
    result = run("locate", tar, *command[2:], "--out", out)
    assert result.exit_code == 2 and "belongs to another job: its photos are others" in result.stderr
    result = run("locate", tar, *command[2:], "--out", out, "--restart")
    assert result.exit_code == 1 and "photos.tar" in result.stderr and not out.exists()
    assert len(list((tmp_path / "results.jsonl.job").glob("part-*"))) == 2


def test_a_table_whose_files_come_later(command, photos, tmp_path):
    table, out = photos / "list.csv", tmp_path / "results.csv"
    table.write_text("id,path\n" + "".join(f"p{n},{n}.png\n" for n in (0, 77, 1)))
    assert run("locate", table, *command[2:], "--out", out).exit_code == 1
    [failure] = lines(tmp_path / "results.failures.jsonl")
    assert (failure["photo"], failure["position"]) == ("p77", 1) and "77.png" in failure["reason"]
    (photos / "77.png").write_bytes((photos / "0.png").read_bytes())
    assert run("locate", table, *command[2:], "--out", out, "--retry-failed").exit_code == 0
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert sorted(row["photo"] for row in rows) == ["p0", "p1", "p77"]
    table.write_text("name,place\nx,y\n")
    refused(run("locate", table, *command[2:], "--out", tmp_path / "other.csv"), "it has no column for")
    assert not list(tmp_path.glob("other*"))


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--out", "results.txt"], "results are written as .jsonl, .csv or .parquet"),
        (["--out", "a.csv", "--format", "jsonl"], "its name says csv, and --format jsonl"),
        (["--out", "folder", "--format", "xml"], "unknown format 'xml': there are jsonl, csv, parquet"),
        (["--out", "nowhere/a.csv"], "the folder nowhere does not exist"),
        (["--out", "a.csv", "--photos-per-part", "0"], "--photos-per-part must be at least 1, got 0"),
        (["--out", "a.csv", "--json"], "--out excludes --json, --geojson and --map"),
        (["--out", "a.csv", "--restart", "--retry-failed"], "exclude each other"),
        (["--retry-failed"], "--format, --restart and --retry-failed need --out"),
    ],
)
def test_options_that_make_no_sense(command, tmp_path, monkeypatch, options, sentence):
    monkeypatch.chdir(tmp_path)
    refused(run(*command[:-2], *options), sentence)


@pytest.mark.parametrize(
    ("change", "other"),
    [
        (("--k", 3), "its search options are others"),
        (("--within", "-10,-10,10,10"), "its search options are others"),
        (("--compare-exif",), "its search options are others"),
        (("--precision", "fp32"), "it runs on another backend or in another precision"),
        (("--photos-per-part", 4), "its parts have another size"),
    ],
)
def test_results_of_another_job_are_refused(command, tmp_path, change, other):
    out = tmp_path / "results.jsonl"
    run(*command, "--out", out)
    before = out.read_bytes()
    result = run(*command, *change, "--out", out)
    refused(result, f"{out} belongs to another job: {other}: give --out another name, or --restart")
    assert out.read_bytes() == before


def test_a_job_that_came_to_nothing_is_in_nobodys_way(command, tmp_path, monkeypatch):
    out = tmp_path / "results"
    with monkeypatch.context() as patch:
        patch.setattr(GeoEngine, "locate", lambda *arguments, **options: 1 / 0)
        assert run(*command, "--out", out).exit_code == 1
    assert (out / "_job.json").exists() and not list(out.glob("part-*"))
    assert run(*command, "--k", 1, "--out", out, "--format", "csv").exit_code == 1
    assert len(list(out.glob("part-*.csv"))) == 4


@pytest.mark.skipif(sys.platform == "darwin", reason="names of files are UTF-8 there")
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_names_of_files_may_be_any_bytes(command, photos, tmp_path, suffix):
    os.rename(photos / "0.png", os.fsencode(photos) + b"/caf\xe9.png")
    out = tmp_path / f"out.{suffix}"
    assert run(*command, "--out", out).exit_code == 1
    if suffix == "parquet":
        import pyarrow.parquet

        names = pyarrow.parquet.read_table(out)["photo"].to_pylist()
    else:
        text = out.read_text(encoding="utf-8")
        rows = map(json.loads, text.splitlines()) if suffix == "jsonl" else csv.DictReader(io.StringIO(text))
        names = [row["photo"] for row in rows]
    assert [name for name in names if name.endswith(r"/caf\udce9.png")] and len(names) == PHOTOS - 1


def test_other_photos_and_formats_are_refused(command, photos, tmp_path):
    out = tmp_path / "results"
    run(*command, "--out", out)
    refused(run(*command, "--out", out, "--format", "csv"), "it writes another format")
    (photos / "new.png").write_bytes((photos / "0.png").read_bytes())
    refused(run(*command, "--out", out), "its photos are others")
    assert run(*command, "--out", out, "--restart").exit_code == 1
    assert sum(len(names(part)) for part in out.glob("part-*")) == PHOTOS


def test_files_of_somebody_else_are_left_alone(command, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    (tmp_path / "results.csv").write_text("mine")
    refused(run(*command, "--out", tmp_path / "notes"), "is not empty, and holds no job")
    refused(run(*command, "--out", tmp_path / "results.csv"), "exists, and is of no job")
    assert (tmp_path / "results.csv").read_text() == "mine"
    assert run(*command, "--out", tmp_path / "results.csv", "--restart").exit_code == 1


def test_two_processes_never_run_one_job(command, tmp_path):
    out = tmp_path / "results"
    run(*command, "--out", out)
    with files.locked(out / "_lock", "held"):
        refused(run(*command, "--out", out), "another process runs this job; wait for it")


def test_a_damaged_description_and_lost_results_are_said(command, tmp_path):
    out = tmp_path / "results.jsonl"
    run(*command, "--out", out)
    out.unlink()
    refused(run(*command, "--out", out), "the job is done and its results are gone: give --restart")
    (tmp_path / "results.jsonl.job" / "_job.json").write_text("{")
    refused(run(*command, "--out", out), "_job.json: it cannot be read")
    assert run(*command, "--out", out, "--restart").exit_code == 1
