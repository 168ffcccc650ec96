"""`geoengine bench scale`: what is counted, what is left out, and how it is shown."""

import xml.etree.ElementTree as ET
from types import SimpleNamespace

import numpy as np
import pytest
from fakes import AddressTiles
from tiny_bundle import write_tiny_bundle

from geoengine.bench.suite import scale, scale_rows, scale_tables
from geoengine.bench.suite.results import Results
from geoengine.bench.suite.timing import Spread
from geoengine.engine.engine import GeoEngine
from geoengine.engine.errors import SourceError
from geoengine.engine.results import Level, ScoredTile
from geoengine.engine.sources import planet
from geoengine.engine.tiles import LEVELS, LngLat, Tile, great_circle_km

CLOSE = LngLat(-128.1, 58.3)


def nothing(what, done, total):
    pass


def second(seconds):
    return Spread.of([seconds])


def found(x):
    def level(zoom, *tiles):
        beam = tuple(ScoredTile(tile=Tile(zoom, *xy), score=0.5) for xy in tiles)
        return Level(zoom=zoom, candidates=16, missing=0, beam=beam)

    return SimpleNamespace(levels=(level(4, (x, 0), (9, 9)), level(6, (4 * x, 0))))


def test_tiles_of_photos_are_counted_once():
    same, other = found(1), found(2)
    assert scale.tiles_of(scale.candidates_of([same])) == {"asked": 256 + 32, "distinct": 256 + 32}
    assert scale.tiles_of(scale.candidates_of([same, same])) == {"asked": 576, "distinct": 256 + 32}
    assert scale.tiles_of(scale.candidates_of([same, other])) == {"asked": 576, "distinct": 256 + 48}


def test_tiles_that_a_photo_needs():
    assert scale.tiles_at(LEVELS, 16) == 256 + 6 * 256
    assert scale.tiles_at(LEVELS, 64) == 6400
    assert scale.tiles_at((1, 3), 16) == 4 + 4 * 16, "there are only four to keep"


def test_what_would_not_fit_is_left_out():
    budget = scale.Budget(100.0)
    assert budget.needs(10**9) is None, "the first measurement tells how fast it goes"
    budget.add(1000, second(20.0))
    assert budget.needs(4000) is None
    assert budget.needs(4001) == pytest.approx(80.02)
    budget.add(2000, second(60.0))  # slower: 20 s are left
    assert budget.needs(1000) == pytest.approx(30.0)


def test_photos_of_a_region_are_near_its_place_and_on_land():
    places = scale.near(CLOSE, 50, 2.0)
    distances = [great_circle_km(CLOSE, place) for place in places]
    assert max(distances) < 2.01 and np.std(distances) > 0.2
    assert planet.is_land(*zip(*places, strict=True)).all()


def tiny_engine(folder):
    """A tiny bundle over tiles that are their addresses."""
    source = AddressTiles()
    if not folder.exists():
        write_tiny_bundle(folder, world=source.world, sides=(8,))
    return GeoEngine.open(folder, source)


def test_measures_both_bundles_and_goes_on(tmp_path, monkeypatch):
    counts = (1, 2)
    write_tiny_bundle(tmp_path / "other", world="earth", sides=(8,))
    monkeypatch.setattr(scale, "_trained", lambda: tiny_engine(tmp_path / "trained"))
    monkeypatch.setattr(scale, "_open", tiny_engine)
    settings = scale.ScaleSettings(parts=("photos", "k"), bundle=str(tmp_path / "other"), k=1, counts=counts)
    with Results.start(tmp_path, settings.benchmark, settings.to_dict()) as results:
        scale.measure(settings, results, nothing)
    rows = {row["key"]: row for row in results.document["rows"]}
    ours = "tiny, none"
    assert set(rows) == {
        *(f"photos/planet/{scene}/{count}" for scene in ("region", "world") for count in counts),
        *(f"photos/{ours}/region/{count}" for count in counts),
        *(f"k/{series}/{k}" for series in ("planet", ours) for k in counts),
    }
    for count in counts:
        trained, followed = rows[f"photos/planet/region/{count}"], rows[f"photos/{ours}/region/{count}"]
        assert trained["asked"] == count * (4 + 16)
        assert (trained["asked"], trained["distinct"]) == (followed["asked"], followed["distinct"])
    assert rows["k/planet/2"]["distinct"] == 4 + 32

    kept = [row for row in results.document["rows"] if row["key"] != f"photos/{ours}/region/2"]
    results.document["rows"] = list(kept)
    scale.measure(settings, results, nothing)
    assert [row["key"] for row in results.document["rows"][len(kept) :]] == [f"photos/{ours}/region/2"]


def test_followed_encoders_do_all_the_work(tmp_path, monkeypatch):
    with tiny_engine(tmp_path / "tiny") as engine:
        series = scale.Series("", engine)
        encoded = []
        encode = engine.backend.encode
        monkeypatch.setattr(
            engine.backend, "encode", lambda name, pixels: encoded.append(len(pixels)) or encode(name, pixels)
        )
        one = np.array([[0, 0], [1, 1]])
        levels = {1: {0: one, 1: one}, 3: {0: one, 1: one + 1}}
        ranked = []
        monkeypatch.setattr(scale, "_exhaust", lambda rows: ranked.append(len(list(rows))))
        scale.follow(series, [np.zeros((9, 9, 3), np.uint8)] * 2, levels, 4)
    assert sum(encoded) == 2 + scale.tiles_of(levels)["distinct"] == 2 + 2 + 3
    assert ranked == [2, 2]


def test_missing_tiles_are_an_error(tmp_path):
    with tiny_engine(tmp_path / "tiny") as engine:
        engine.source.missing = lambda z, x, y: x == 7
        series = scale.Series("", engine)
        levels = {3: {0: np.array([[6, 0], [7, 0]])}}
        with pytest.raises(SourceError, match="lacks tiles of zoom 3"):
            scale.follow(series, [np.zeros((9, 9, 3), np.uint8)], levels, 4)


def test_rows_of_an_index(tmp_path, monkeypatch):
    monkeypatch.setenv("GEOENGINE_CACHE", str(tmp_path))
    monkeypatch.setattr(scale_rows, "available_memory", lambda: 10**8)
    with Results.start(tmp_path, "scale-rows", {}) as results:
        scale_rows.measure_rows((1000, 10**6), results, nothing)
    small, large = results.document["rows"]
    assert small["scoring_s"]["rounds"] >= 3 and 0 < small["opening_s"] < 60
    assert large["left_out"] == "needs 1.2 GB of memory, and 0.1 are free"
    assert not list((tmp_path / "bench").iterdir()), "indices are taken away"
    assert "left out: needs 1.2 GB" in scale_tables.tables(results.document)


def test_own_memory_is_told_from_mapped_memory():
    before = scale_rows.resident_mib()
    kept = np.ones(64 << 20, np.uint8)
    after = scale_rows.resident_mib()
    assert len(kept) and 60 < after["RssAnon"] - before["RssAnon"] < 80


def document(region_64):
    times = {1: 20.0, 4: 40.0, 64: region_64}
    rows = [
        {
            "key": str(count), "part": "photos", "series": "s", "scene": "region", "photos": count,
            "asked": 1792 * count, "distinct": 1000 * count, "seconds": second(time).to_dict(),
        }
        for count, time in times.items()
    ]  # fmt: skip
    rows.append(
        {"key": "out", "part": "photos", "series": "s", "scene": "world", "photos": 4, "left_out_s": 300.0}
    )
    rows += [
        {
            "key": f"k{k}",
            "part": "k",
            "series": "s",
            "k": k,
            "distinct": 100 * k,
            "seconds": second(k).to_dict(),
        }
        for k in (1, 4)
    ]  # fmt: skip
    rows += [
        {
            "key": f"r{n}", "part": "rows", "rows": n, "bytes": 1032 * n, "opening_s": 1e-3,
            "opening_mib": 0.1, "own_mib": 0.3, "mapped_mib": 9.0, "first_s": n / 1e6,
            "scoring_s": second(n / 1e7).to_dict(),
        }
        for n in (10**4, 10**5)
    ]  # fmt: skip
    facts = {"series": {"s": "openvino, int8"}, "region_km": 2.0}
    return {"benchmark": "scale", "facts": facts, "rows": rows}


def test_says_whether_the_goal_is_met():
    assert "- s: 0.100 of one photo alone: met" in scale_tables.tables(document(128.0))
    assert "- s: 0.101 of one photo alone: not met" in scale_tables.tables(document(129.0))
    unfinished = document(128.0)
    del unfinished["rows"][2]
    assert "- s: not measured" in scale_tables.tables(unfinished)
    assert "about 300 s, see --seconds" in scale_tables.tables(unfinished)
    assert not any("photos" in name for name in scale_tables.key_figures(unfinished))
    assert scale_tables.key_figures(document(128.0)) == {
        "64 photos of a region, each over one alone, s": "0.100",
        "scoring 10,000 rows": "1 ms",
        "scoring 100,000 rows": "10 ms",
    }
    assert scale_tables.tables({"facts": {}, "rows": []}) == "\n"


def test_plots():
    drawn = scale_tables.plots(document(128.0))
    assert list(drawn) == ["scale-photos", "scale-k", "scale-rows"]
    for text in drawn.values():
        assert ET.fromstring(text).tag.endswith("svg")
    assert scale_tables.plots({"benchmark": "scale", "facts": {}, "rows": []}) == {}


def test_a_part_alone_replaces_neither_results_nor_plots_of_all():
    names = {scale.ScaleSettings(parts=parts).benchmark for parts in (scale.PARTS, ("k",), ("photos", "k"))}
    assert names == {"scale", "scale-k", "scale-photos-k"}
    drawn = [plot for name in names for plot in scale_tables.plots(document(128.0) | {"benchmark": name})]
    assert len(set(drawn)) == len(drawn) == 3 * 3
