"""The parts of a bulk run without a command: formats, jobs that crash, and the stream of photos."""

import itertools
import json
import threading
import time

import numpy as np
import pytest
from made_bulk import ALL_BUT_ONE, BROKEN, lines, names, write_photos
from made_photos import encoded
from made_results import made_location

from geoengine.engine.bulk import formats, stream
from geoengine.engine.bulk.formats import ResultFiles, ResultFormat, record_of
from geoengine.engine.bulk.items import Item, Items
from geoengine.engine.bulk.jobs import JobOrder, Target, open_job
from geoengine.engine.bulk.running import run_job
from geoengine.engine.bulk.stream import PhotoSearch, locate_stream
from geoengine.engine.photo_sets import PhotoEntry, open_photo_set
from geoengine.engine.photos import Photo, PhotoLimits
from geoengine.engine.render import files
from geoengine.engine.search import SearchConfig


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
def test_a_crash_at_any_file_operation_loses_and_repeats_nothing(tmp_path, monkeypatch, kind):
    """Whatever operation on a file is the last one: the same commands end as they would have."""
    photos = write_photos(tmp_path / "photos")
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
