"""`geoengine locate --out`: formats, what is refused, and going on after any interruption."""

import csv
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
from command_line import refused, run
from made_photos import encoded
from made_results import made_location
from tiny_bundle import write_tiny_bundle, write_tiny_tiles

from geoengine.commands.locate import locate
from geoengine.engine.bulk import formats, stream
from geoengine.engine.bulk.formats import COLUMNS, ResultFiles, ResultFormat, record_of
from geoengine.engine.bulk.items import Item, Items
from geoengine.engine.bulk.jobs import JobOrder, Target, open_job
from geoengine.engine.bulk.parts import PHOTOS_PER_PART
from geoengine.engine.bulk.running import run_job
from geoengine.engine.bulk.stream import PhotoSearch, locate_stream
from geoengine.engine.engine import GeoEngine
from geoengine.engine.errors import SourceError
from geoengine.engine.photo_sets import PhotoEntry, open_photo_set
from geoengine.engine.photos import Photo, PhotoLimits
from geoengine.engine.render import files
from geoengine.engine.search import SearchConfig

PHOTOS, BROKEN = 10, 4  # the fifth in the folder cannot be read


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
    """A folder of photos, one of which is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(PHOTOS):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
        (folder / f"{number}.png").write_bytes(b"no photo" if number == BROKEN else encoded(pixels, "PNG"))
    return folder


@pytest.fixture
def command(home, photos, engine):
    """What locates the photos, three to a part."""
    where = ("--bundle", home / "engines", "--tiles", home / "tiles", "--threads", 1)
    return ("locate", photos, *where, "--photos-per-part", 3)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def names(path):
    return [os.path.basename(record["photo"]) for record in lines(path)]


ALL_BUT_ONE = [f"{number}.png" for number in range(PHOTOS) if number != BROKEN]


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


@pytest.mark.filterwarnings("ignore")
def test_places_on_the_planet_have_no_reference_system(tmp_path):
    geopandas = pytest.importorskip("geopandas")
    out = tmp_path / "results.parquet"
    planet = ResultFiles(format=ResultFormat.PARQUET, world="planet", about={"attribution": "somebody"})
    planet.write(out, [record_of(made_location(lng=-148.2, lat=37.3))])
    frame = geopandas.read_parquet(out)
    assert frame.crs is None and list(frame["world"]) == ["planet"]
    assert (frame.geometry[0].x, frame.geometry[0].y) == pytest.approx((-148.2, 37.3), abs=0.01)
    import pyarrow.parquet

    about = json.loads(pyarrow.parquet.read_schema(out).metadata[b"geoengine"])
    assert about["attribution"] == "somebody" and "hypothesis" in about["note"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_parts_without_a_photo_are_joined_too(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(formats, "_ROWS_PER_GROUP", 2)
    results = ResultFiles(format=ResultFormat(kind), world="planet", about={})
    parts = [tmp_path / f"{number}.{kind}" for number in range(4)]
    for number, part in enumerate(parts):
        results.write(part, [record_of(made_location(f"{number}-{i}")) for i in range(number)])
    results.join(tmp_path / f"all.{kind}", parts)
    if kind == "parquet":
        import pyarrow.parquet as pq

        found = pq.read_table(tmp_path / "all.parquet").column("photo").to_pylist()
    else:
        text = (tmp_path / f"all.{kind}").read_text().splitlines()
        found = (
            [json.loads(t)["photo"] for t in text] if kind == "jsonl" else [t.split(",")[0] for t in text][1:]
        )
    assert found == ["1-0", "2-0", "2-1", "3-0", "3-1", "3-2"]


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


class Crash(BaseException):
    """The machine loses power."""


class InstantEngine:
    """Locates every photo at once, at the same place."""

    def prepare(self, photo, *, method):
        return photo

    def locate(self, photos, *, config, progress):
        return [made_location(photo.name, levels=(4,), top=1) for photo in photos]


def run_until_done(target, items, *, retry=False):
    """Run a job as often as it takes; returns how often it crashed."""
    order = JobOrder(identity={"photos": items.identity}, world="planet", about={}, part_photos=6)
    search = PhotoSearch(config=SearchConfig(), limits=PhotoLimits())
    for crashes in itertools.count():
        try:
            with open_job(target, order, retry=retry) as job:
                if not job.state.complete:
                    list(run_job(InstantEngine(), job, items, search))
            return crashes
        except Crash:
            pass


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_crash_at_any_file_operation_loses_and_repeats_nothing(photos, tmp_path, monkeypatch, kind):
    """Whatever operation on a file is the last one: the same commands end as they would have."""
    countdown = [0]

    def counted(function):
        def call(*arguments, **options):
            countdown[0] -= 1
            if countdown[0] == 0:
                raise Crash
            return function(*arguments, **options)

        return call

    for name in ("replace", "unlink"):
        monkeypatch.setattr(files.Path, name, counted(getattr(files.Path, name)))
    monkeypatch.setattr(files.os, "fsync", counted(lambda descriptor: None))
    broken = photos / f"{BROKEN}.png"
    items = Items([open_photo_set(photos)])
    for crash_at in itertools.count(1):
        target = Target.parse(tmp_path / f"{crash_at}{'.jsonl' if kind == 'file' else ''}", None)
        countdown[0] = crash_at
        broken.write_bytes(b"no photo")
        crashes = run_until_done(target, items)
        assert [failure["position"] for failure in lines(target.failures)] == [BROKEN]
        broken.write_bytes((photos / "0.png").read_bytes())
        crashes += run_until_done(target, items, retry=True)
        parts = sorted(target.folder.glob("part-*")) if target.in_parts else [target.out]
        found = [name for part in parts for name in names(part)]
        assert sorted(found) == sorted([*ALL_BUT_ONE, broken.name]), crash_at
        assert not target.failures.exists()
        left = {path.name for path in target.folder.iterdir()} - {part.name for part in parts}
        assert left == {"_job.json", "_lock"}
        if not crashes:
            break
    assert crash_at > 15, "there are that many operations"


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


# --- the stream ---


class CountingEngine:
    """Locates photos when it is told to; counts what was read before."""

    def __init__(self):
        self.read, self.searched = 0, threading.Semaphore(0)
        self.groups = []

    def prepare(self, photo, *, method):
        self.read += 1
        return Photo(photo.name, photo.pixels[:8, :8])

    def locate(self, photos, *, config, progress):
        self.groups.append(len(photos))
        until = time.monotonic() + 20
        while self.read < self.expected() and time.monotonic() < until:
            time.sleep(0.002)
        assert self.read >= self.expected(), "the next photos are read during a search"
        return [made_location(photo.name) for photo in photos]

    def expected(self):
        return min(40, sum(self.groups) + stream.PHOTOS_PER_SEARCH)


def test_the_next_photos_are_read_during_a_search_and_no_more(monkeypatch):
    monkeypatch.setattr(stream, "PHOTOS_PER_SEARCH", 4)
    monkeypatch.setattr(stream, "_MOST_READERS", 2)
    engine = CountingEngine()
    data = encoded(np.zeros((20, 20, 3), np.uint8), "PNG")
    items = ((i // 10, Item(str(i), i, PhotoEntry(key=str(i), row=i, data=data))) for i in range(40))
    search = PhotoSearch(config=SearchConfig(), limits=PhotoLimits())
    seen = 0
    for searched in locate_stream(engine, items, search):
        assert all(int(location.photo) // 10 == searched.number for location in searched.outcomes)
        seen += len(searched.outcomes)
        assert searched.last == (seen % 10 == 0)
        time.sleep(0.02)
        # Those of the next search, and those that the readers hold or have handed in.
        assert engine.read <= seen + stream.PHOTOS_PER_SEARCH + 2 * 2 + 2
    assert seen == 40 and engine.groups == [4, 4, 2] * 4


def test_targets():
    from pathlib import Path

    assert Target.parse(Path("a.geoparquet"), None).format is ResultFormat.PARQUET
    assert Target.parse(Path("a.csv"), None).failures == Path("a.failures.jsonl")
    assert Target.parse(Path("a"), None).failures == Path("a/_failures.jsonl")
