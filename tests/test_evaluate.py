"""Evaluations with encoders that know the truth, or lose it; their rows on disk; their reports."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from fakes import AddressTiles
from known_places import MadePhotos, OracleBackend, PlanetAddresses, picture_of
from tiny_bundle import write_tiny_bundle

from geoengine.bench.evaluate import Evaluation, job_of, setting_of
from geoengine.bench.evaluate_report import make_report
from geoengine.bench.evaluate_rows import PhotoRow, Results, ResultsError, Setting
from geoengine.bench.truth import PlanetPhotos, TruthError, land_places
from geoengine.bench.truth_sets import open_truth_set
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.calibration import STATED_SHARES, Calibration
from geoengine.engine.engine import GeoEngine
from geoengine.engine.errors import BundleError, GeoEngineError
from geoengine.engine.manifest import encoder_hash
from geoengine.engine.regions import parse_region
from geoengine.engine.render.files import OutputError
from geoengine.engine.scoring.kinds import Score
from geoengine.engine.search import SearchConfig
from geoengine.engine.sources import planet
from geoengine.engine.tiles import LEVELS, MAX_LATITUDE_DEG, LngLat

PLACES = [LngLat(10.0 * n - 103.7, 5.0 * n - 19.3) for n in range(7)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return EngineBundle.open(write_tiny_bundle(folder / "tiny", levels=LEVELS, embed_dim=28))


@pytest.fixture
def engine(bundle):
    return GeoEngine(bundle, PlanetAddresses(), OracleBackend())


def paper(k, **options):
    return SearchConfig(k=k, score=Score.paper, **options)


def evaluated(
    engine, truth, ks=(1,), scores=(Score.paper,), *, out=None, together=25, progress=None, **options
):
    configs = [SearchConfig(k=k, score=score, **options) for score in scores for k in ks]
    job = job_of(engine, truth, configs)
    with (
        Results(job, LEVELS, STATED_SHARES)
        if out is None
        else Results.open(out, job, LEVELS, STATED_SHARES) as results
    ):
        run = Evaluation(engine=engine, truth=truth, configs=configs, results=results, together=together)
        run.run(progress)
        return make_report(engine, truth, configs, results, together=together)


# --- places of the planet ---------------------------------------------------------------------------------


def test_places_are_on_land_and_uniform_by_area(monkeypatch):
    monkeypatch.setattr(planet, "is_land", lambda lng, lat: np.asarray(lng) > 0)
    lng, lat = np.array(land_places(20_000, seed=3)).T
    assert lng.min() > 0
    assert abs(lat).max() < MAX_LATITUDE_DEG
    # by area: half of a hemisphere lies below 30 degrees, slightly more as the cap is cut off
    assert np.mean(abs(lat) < 30) == pytest.approx(0.5 / math.sin(math.radians(MAX_LATITUDE_DEG)), abs=0.01)
    assert np.mean(lng < 90) == pytest.approx(0.5, abs=0.01)


def test_places_of_the_real_planet():
    places = land_places(50, seed=3)
    assert planet.is_land(*np.array(places).T).all()
    assert land_places(30, seed=3) == places[:30]
    assert land_places(50, seed=4) != places


def test_photos_of_the_planet_are_drawn_when_they_are_read_and_the_first_ones_stay(monkeypatch):
    taken = []
    monkeypatch.setattr(planet, "photo", lambda *shot: taken.append(shot) or picture_of(LngLat(0, 0)))
    photos = list(PlanetPhotos(5, seed=5))
    assert not taken
    for photo in photos:
        assert photo.read().name == photo.key  # which says nothing of the place
    assert [photo.key for photo in photos] == [f"planet photo {n}" for n in range(1, 6)]
    assert [(lat, lng) for lat, lng, _ in taken] == [(place.lat, place.lng) for place in land_places(5, 5)]
    assert len({seed for _, _, seed in taken}) == 5
    before = list(taken)
    taken.clear()
    for photo in PlanetPhotos(3, seed=5):
        photo.read()
    assert taken == before[:3]
    assert PlanetPhotos(3, seed=5).identity == PlanetPhotos(5, seed=5).identity
    assert PlanetPhotos(3, seed=6).identity != PlanetPhotos(3, seed=5).identity


def test_photos_of_several_seeds_are_those_of_each_one_under_names_of_their_own():
    both = open_truth_set("planet", count=3, seeds=[5, 7])
    photos = list(both)
    assert [photo.place for photo in photos] == land_places(3, 5) + land_places(3, 7)
    assert len({photo.key for photo in photos}) == 6
    assert photos[3].key == "planet photo 1 of seed 7"
    assert both.remarks()[0] == "3 photos of each of the seeds 5, 7"
    alone = open_truth_set("planet", count=3, seeds=[5])
    assert [photo.place for photo in alone] == land_places(3, 5)
    assert len({both.identity, alone.identity, open_truth_set("planet", seeds=[7, 5]).identity}) == 3
    np.testing.assert_array_equal(photos[4].read().pixels, list(PlanetPhotos(2, 7))[1].read().pixels)


@pytest.mark.parametrize(("count", "seed"), [(0, 1), (-3, 1), (1, -1)])
def test_photos_that_cannot_be_drawn(count, seed):
    with pytest.raises(TruthError, match=r"at least one photo, got|0 or more, got -1"):
        PlanetPhotos(count, seed)


# --- locating ---------------------------------------------------------------------------------------------


def test_an_encoder_that_knows_finds_every_place(engine):
    far = [LngLat(47.0 * n - 100.3, 11.0 * n - 19.3) for n in range(4)]
    report = evaluated(engine, MadePhotos(far), [1, 2])
    assert (report.world, report.model, report.backend) == (
        "planet",
        "tiny with random weights, for timing only",
        "oracle exact",
    )
    assert [figures.setting for figures in report.results] == [
        Setting("tiles", "paper", 1),
        Setting("tiles", "paper", 2),
    ]
    for figures in report.results:
        assert [share.hits for share in figures.accuracy.within_km.values()] == [4] * 5
        assert {zoom: share.hits for zoom, share in figures.recall.items()} == dict.fromkeys(LEVELS, 4)
        assert figures.accuracy.median_km < 0.4
        assert figures.coverage == 1.0
        assert figures.tiles_per_second == pytest.approx(figures.tiles_per_photo / figures.seconds_per_photo)
    # photos are far apart, so that only the 256 tiles of zoom 4 are shared
    assert report.results[0].tiles_per_photo == 256 / 4 + 6 * 16
    assert not engine.backend.closed


def test_recall_shows_where_the_truth_is_lost(bundle):
    engine = GeoEngine(bundle, PlanetAddresses(), OracleBackend(lost_at=12))
    [figures] = evaluated(engine, MadePhotos(PLACES)).results
    assert [share.hits for share in figures.recall.values()] == [7, 7, 7, 7, 0, 0, 0]
    assert figures.accuracy.within_km[1.0].hits == 0
    assert figures.accuracy.within_km[200.0].hits == 7


def test_tiles_that_are_missing_show_in_the_coverage(bundle):
    source = PlanetAddresses(missing=lambda z, x, y: (np.full(len(x), z == 16)) & (x % 2 == 0))
    [figures] = evaluated(GeoEngine(bundle, source, OracleBackend()), MadePhotos(PLACES[:1])).results
    assert figures.coverage == pytest.approx((256 + 5 * 16 + 8) / (256 + 6 * 16))


def test_photos_are_located_some_at_a_time(engine, monkeypatch):
    calls, progress = [], []
    locate = GeoEngine.locate
    monkeypatch.setattr(
        GeoEngine,
        "locate",
        lambda self, photos, **kw: calls.append(len(photos)) or locate(self, photos, **kw),
    )
    apart = evaluated(
        engine, MadePhotos(PLACES[:5]), [1, 2], together=2, progress=lambda _, *c: progress.append(c)
    )
    assert calls == [2, 2, 2, 2, 1, 1]
    assert list(dict.fromkeys(progress)) == [(0, 10), (4, 10), (8, 10), (10, 10)]
    together = evaluated(engine, MadePhotos(PLACES[:5]), [1, 2])
    assert [row.place for row in apart.rows] == [row.place for row in together.rows]


def test_photos_that_cannot_be_read_are_misses(engine):
    report = evaluated(engine, MadePhotos(PLACES, broken={1, 4}), [1, 2])
    assert report.problems == {"photo 1": "photo 1: is broken", "photo 4": "photo 4: is broken"}
    for figures in report.results:
        assert (figures.accuracy.photos, figures.accuracy.located) == (7, 5)
        assert [share.hits for share in figures.accuracy.within_km.values()] == [5] * 5
        assert {share.total for share in figures.recall.values()} == {7}
    assert report.to_dict()["data_set"]["unreadable"] == 2


def test_nothing_but_unreadable_photos(engine):
    report = evaluated(engine, MadePhotos(PLACES[:2], broken={0, 1}))
    [figures] = report.results
    assert figures.accuracy.located == 0 and not figures.recall
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert json.loads(text)["results"][0]["seconds_per_photo"] is None


def test_a_report_is_json(engine):
    report = json.loads(json.dumps(evaluated(engine, MadePhotos(PLACES[:2])).to_dict(), allow_nan=False))
    assert report["schema"] == 1
    assert report["data_set"]["photos"] == 2 and report["data_set"]["remarks"] == ["made for a test"]
    assert {"cpu", "cores", "gpus", "memory", "python", "geoengine", "date", "commit"} <= set(
        report["machine"]
    )
    [result] = report["results"]
    assert (result["method"], result["score"], result["k"]) == ("tiles", "paper", 1)
    assert list(result["within_km"]) == ["1", "25", "200", "750", "2500"]
    assert result["within_km"]["25"] == {
        "share": 1.0,
        "hits": 2,
        "total": 2,
        "ci95": [pytest.approx(0.342, abs=1e-3), 1.0],
    }
    assert list(result["recall"]) == [str(zoom) for zoom in LEVELS]


def test_an_empty_set_is_refused(engine):
    with pytest.raises(TruthError, match="the made photos: there is no photo to evaluate with"):
        evaluated(engine, MadePhotos([]))


def test_photos_of_another_world_are_refused(tmp_path):
    earth = EngineBundle.open(
        write_tiny_bundle(tmp_path / "tiny", world="earth", levels=LEVELS, embed_dim=28)
    )
    engine = GeoEngine(earth, AddressTiles(), OracleBackend())
    with pytest.raises(BundleError, match=r"shows the world 'planet', and engine bundle .* knows 'earth'"):
        evaluated(engine, MadePhotos(PLACES))


def test_photos_that_the_bundle_was_calibrated_on_are_refused(tmp_path):
    folder = write_tiny_bundle(tmp_path / "tiny", levels=LEVELS, embed_dim=28)
    plain = EngineBundle.open(folder)
    assumed = Calibration.assumed(plain.manifest)
    encoders = encoder_hash(plain.manifest)
    replace(assumed, encoders=encoders, identity="identity of made").write(folder)
    engine = GeoEngine(EngineBundle.open(folder), PlanetAddresses(), OracleBackend())
    with pytest.raises(TruthError, match=r"calibrated on these very photos \(the made photos\)"):
        evaluated(engine, MadePhotos(PLACES))
    report = evaluated(engine, MadePhotos(PLACES, name="other"), [1, 4], [Score.path, Score.paper])
    for figures in report.results:
        assert [share.hits for share in figures.accuracy.within_km.values()] == [7] * 5
        assert figures.calibration.keys() == set(STATED_SHARES)


def test_settings_must_differ_in_nothing_else(engine):
    truth = MadePhotos(PLACES)
    with pytest.raises(GeoEngineError, match="at least one k"):
        job_of(engine, truth, [])
    with pytest.raises(GeoEngineError, match="each setting once, got tiles paper 4 twice"):
        job_of(engine, truth, [paper(4), paper(4)])
    with pytest.raises(GeoEngineError, match="the same levels and options"):
        job_of(engine, truth, [paper(4), paper(1, levels=(4, 6))])


# --- rows on disk -----------------------------------------------------------------------------------------


def rows_in(folder):
    with (folder / "photos.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class Stop(Exception):
    """Stands for what kills a process."""


def test_a_run_that_was_stopped_goes_on_with_the_rest_alone(engine, tmp_path):
    whole = evaluated(engine, MadePhotos(PLACES, broken={5}), [1, 2], out=tmp_path / "whole", together=2)

    def stop(_, done, total):
        if done:
            raise Stop

    with pytest.raises(Stop):
        evaluated(
            engine, MadePhotos(PLACES, broken={5}), [1, 2], out=tmp_path / "part", together=2, progress=stop
        )
    assert [row["photo"] for row in rows_in(tmp_path / "part")] == ["photo 0", "photo 1"] * 2
    progress = []
    truth = MadePhotos(PLACES, broken={5})
    resumed = evaluated(
        engine, truth, [1, 2], out=tmp_path / "part", together=2, progress=lambda _, *c: progress.append(c)
    )
    assert truth.read == [2, 3, 4, 5, 6]
    assert progress[-1] == (10, 10)

    def lasting(report):
        return [replace(row, seconds=0, tiles=0) for row in report.rows]

    assert lasting(resumed) == lasting(whole)
    for again, before in zip(resumed.results, whole.results, strict=True):
        assert (again.accuracy, again.recall, again.coverage) == (
            before.accuracy,
            before.recall,
            before.coverage,
        )


def test_nothing_is_done_twice_but_photos_that_could_not_be_read(engine, tmp_path):
    evaluated(engine, MadePhotos(PLACES, broken={1, 2}), out=tmp_path)
    truth = MadePhotos(PLACES, broken={2})
    report = evaluated(engine, truth, out=tmp_path)
    assert truth.read == [1, 2]
    assert list(report.problems) == ["photo 2"]
    assert sorted(row["photo"] for row in rows_in(tmp_path)) == [f"photo {n}" for n in range(7)]


def test_more_photos_and_further_beam_widths_are_added(engine, tmp_path):
    evaluated(engine, MadePhotos(PLACES[:3]), [1], out=tmp_path)
    truth = MadePhotos(PLACES[:5])
    report = evaluated(engine, truth, [2, 1], out=tmp_path)
    assert [figures.setting.k for figures in report.results] == [2, 1]
    assert {figures.accuracy.photos for figures in report.results} == {5}
    assert len(rows_in(tmp_path)) == 10
    assert evaluated(engine, MadePhotos(PLACES[:2]), [1], out=tmp_path).photos == 2


def test_rows_come_back_as_they_went(tmp_path):
    row = PhotoRow(
        photo='a "quoted", name é',
        setting=Setting("tiles", "paper", 16),
        true=LngLat(0.1 + 0.2, -1e-9),
        place=LngLat(1 / 3, 2 / 3),
        error_km=math.pi,
        radius_km=1e-7,
        radii_km={0.5: 1.25, 0.8: 2 / 3},
        ranks={4: 1, 8: 0},
        scored=7,
        wanted=9,
        tiles=10 / 3,
        seconds=0.1,
    )
    broken = PhotoRow(
        photo="b", setting=row.setting, true=row.true, radii_km={}, ranks={}, problem="b, broken"
    )
    with Results.open(tmp_path, {}, (4, 6, 8), (0.5, 0.8)) as results:
        results.add([row, broken])
    assert rows_in(tmp_path)[1]["problem"] == "b, broken"
    assert rows_in(tmp_path)[0]["rank_z6"] == ""
    with Results.open(tmp_path, {}, (4, 6, 8), (0.5, 0.8)) as results:
        assert list(results) == [row]


def test_a_torn_last_row_is_dropped(engine, tmp_path):
    evaluated(engine, MadePhotos(PLACES), out=tmp_path)
    file = tmp_path / "photos.csv"
    file.write_bytes(file.read_bytes()[:-25])
    truth = MadePhotos(PLACES)
    evaluated(engine, truth, out=tmp_path)
    assert truth.read == [6]
    assert len(rows_in(tmp_path)) == 7


def test_a_damaged_row_is_named(engine, tmp_path):
    evaluated(engine, MadePhotos(PLACES), out=tmp_path)
    file = tmp_path / "photos.csv"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:3], "photo 2,tiles,paper,one\n", *lines[4:]]))
    with pytest.raises(ResultsError, match=r"photos.csv: line 4 is damaged: delete it"):
        evaluated(engine, MadePhotos(PLACES), out=tmp_path)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"truth": MadePhotos(PLACES, name="other")}, "data set"),
        ({"overzoom": True}, "overzoom"),
        ({"backend": "fp16"}, "backend"),
    ],
)
def test_rows_of_another_job_are_refused(engine, tmp_path, change, name):
    evaluated(engine, MadePhotos(PLACES), out=tmp_path)
    before = (tmp_path / "photos.csv").read_bytes()
    if "backend" in change:
        engine.backend.variant = change["backend"]
    with pytest.raises(
        ResultsError, match=f"results of another job: its {name} is .*, now .*; give another --out"
    ):
        evaluated(
            engine,
            change.get("truth", MadePhotos(PLACES)),
            out=tmp_path,
            overzoom=change.get("overzoom", False),
        )
    assert (tmp_path / "photos.csv").read_bytes() == before


def test_rows_of_another_bundle_are_refused_and_can_be_thrown_away(engine, tmp_path):
    evaluated(engine, MadePhotos(PLACES), out=tmp_path / "out")
    manifest = write_tiny_bundle(tmp_path / "other", levels=LEVELS, embed_dim=28) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"mean": [0.5', '"mean": [0.4'))
    second = GeoEngine(EngineBundle.open(manifest.parent), PlanetAddresses(), OracleBackend())
    with pytest.raises(ResultsError, match="results of another job: its encoders is"):
        evaluated(second, MadePhotos(PLACES), out=tmp_path / "out")
    job = job_of(second, MadePhotos(PLACES), [paper(1)])
    with Results.open(tmp_path / "out", job, LEVELS, STATED_SHARES, again=True) as results:
        assert list(results) == []
    assert rows_in(tmp_path / "out") == []


def test_a_region_and_a_prior_are_known_by_what_is_in_them(engine, tmp_path):
    def job(**options):
        return job_of(engine, MadePhotos(PLACES), [SearchConfig(k=1, score=Score.path, **options)])

    def area(lat):
        ring = [[0, lat], [9, lat], [9, 60], [0, 60], [0, lat]]
        (tmp_path / "area.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
        return parse_region(str(tmp_path / "area.geojson"))

    assert job(within=area(40))["within"] == job(within=area(40))["within"] != job(within=area(20))["within"]
    (tmp_path / "prior").write_bytes(b"1")
    first = job(prior=str(tmp_path / "prior"))
    (tmp_path / "prior").write_bytes(b"2")
    assert job(prior=str(tmp_path / "prior"))["prior"] != first["prior"]
    assert job(prior="population")["prior"] == "population"


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path):
    busy = pytest.raises(ResultsError, match="another process evaluates into it")
    with Results.open(tmp_path, {}, (), ()), busy:
        Results.open(tmp_path, {}, (), ())
    Results.open(tmp_path, {}, (), ()).close()


def test_rows_without_their_job_are_refused(tmp_path):
    Results.open(tmp_path, {}, (), ()).close()
    (tmp_path / "job.json").unlink()
    with pytest.raises(ResultsError, match=r"rows without their job.json"):
        Results.open(tmp_path, {}, (), ())
    (tmp_path / "job.json").write_text("[")
    with pytest.raises(ResultsError, match=r"job.json: cannot be read"):
        Results.open(tmp_path, {}, (), ())


def test_columns_of_another_version_are_refused(tmp_path):
    Results.open(tmp_path, {}, (4,), ()).close()
    with pytest.raises(ResultsError, match="not the columns of this version"):
        Results.open(tmp_path, {}, (4, 6), ())


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file/out: cannot be written"):
        Results.open(tmp_path / "file" / "out", {}, (), ())


def test_a_full_disk_keeps_the_rows_before(engine, tmp_path, monkeypatch):
    room = [600]

    def write(self, text):
        if room[0] == 0:
            raise OSError(28, "No space left on device")
        taken = min(len(text), room[0])
        room[0] -= taken
        return type(self).__base__.write(self, bytes(text[:taken]))

    import io

    from geoengine.bench import evaluate_rows

    class Small(io.FileIO):
        pass

    Small.write = write
    monkeypatch.setattr(evaluate_rows.io, "FileIO", Small)
    with pytest.raises(OutputError, match=r"No space left on device.*the same command goes on"):
        evaluated(engine, MadePhotos(PLACES), out=tmp_path, together=1)
    monkeypatch.undo()
    truth = MadePhotos(PLACES)
    evaluated(engine, truth, out=tmp_path)
    assert 0 < len(truth.read) < 7
    assert len(rows_in(tmp_path)) == 7


def test_the_setting_is_that_of_the_configuration():
    assert setting_of(paper(9)) == ("tiles", "paper", 9)
    assert setting_of(SearchConfig(k=1, score=Score.path)) == ("tiles", "path", 1)
