"""Accuracy figures, and the evaluation on the planet with encoders that know the truth, or do not."""

import json
import math

import numpy as np
import pytest
from fakes import AddressTiles, Oracle
from tiny_bundle import write_tiny_bundle

from geoengine.bench import evaluate as module
from geoengine.bench.accuracy import THRESHOLDS_KM, accuracy, wilson_share
from geoengine.bench.evaluate import evaluate_planet, land_places
from geoengine.engine.backends.batches import HostRows
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.engine import GeoEngine
from geoengine.engine.errors import BundleError, GeoEngineError
from geoengine.engine.sources import planet
from geoengine.engine.tiles import LEVELS, MAX_LATITUDE_DEG, LngLat

# --- accuracy ---------------------------------------------------------------------------------------------

KM_PER_DEGREE = 2 * math.pi * 6371.0088 / 360


def east(*distances_km):
    return [LngLat(km / KM_PER_DEGREE, 0.0) for km in distances_km]


def test_shares_within_each_distance():
    predicted = east(0.0, 0.999, 1.001, 24.0, 199.0, 749.0, 2499.0, 10_000.0)
    figures = accuracy(predicted, [LngLat(0.0, 0.0)] * 8)
    assert [share.hits for share in figures.within_km.values()] == [2, 4, 5, 6, 7]
    assert tuple(figures.within_km) == THRESHOLDS_KM
    assert figures.median_km == pytest.approx((24 + 199) / 2)
    assert figures.photos == 8
    assert figures.within_km[25.0].value == 0.5


def test_a_distance_of_exactly_the_threshold_counts():
    (point,) = east(25.0)
    exact = accuracy([point], [LngLat(0, 0)]).median_km
    assert accuracy([point], [LngLat(0, 0)], (exact,)).within_km[exact].hits == 1
    assert accuracy([point], [LngLat(0, 0)], (exact * (1 - 1e-12),)).within_km[exact * (1 - 1e-12)].hits == 0


def test_distances_cross_the_antimeridian():
    figures = accuracy([LngLat(179.99, 0)], [LngLat(-179.99, 0)])
    assert figures.median_km == pytest.approx(0.02 * KM_PER_DEGREE)


@pytest.mark.parametrize("predicted", [[], east(1.0)])
def test_places_must_pair_up(predicted):
    with pytest.raises(ValueError, match="one true place for each prediction"):
        accuracy(predicted, east(1.0, 2.0)[: 2 * len(predicted)])


@pytest.mark.parametrize(("hits", "total"), [(0, 10), (10, 10), (5, 10), (120, 200), (1, 1)])
def test_wilson_intervals_end_where_the_score_test_rejects(hits, total):
    share = wilson_share(hits, total)
    p = hits / total
    assert share.value == p
    assert 0 <= share.low <= p <= share.high <= 1
    for end in (share.low, share.high):
        assert abs(p - end) == pytest.approx(
            1.959964 * math.sqrt(end * (1 - end) / total), rel=1e-6, abs=1e-9
        )
    assert (share.low == 0, share.high == 1) == (hits == 0, hits == total)


def test_wilson_intervals_of_none_and_all_end_exactly():
    for total in range(1, 200):
        assert wilson_share(0, total).low == 0.0
        assert wilson_share(total, total).high == 1.0


@pytest.mark.parametrize(("hits", "total"), [(-1, 3), (4, 3), (0, 0)])
def test_impossible_shares(hits, total):
    with pytest.raises(ValueError, match="need 0 <= hits <= total"):
        wilson_share(hits, total)


# --- places -----------------------------------------------------------------------------------------------


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


# --- the evaluation ---------------------------------------------------------------------------------------


class OracleBackend:
    """The oracle behind the backend's seam; from `lost_at` on it knows nothing."""

    name, batch = "oracle", 32

    def __init__(self, lost_at=99):
        self.oracle, self.lost_at, self.closed = Oracle(), lost_at, False

    def encode(self, encoder, pixels):
        if encoder == "photo":
            places = np.ascontiguousarray(pixels).reshape(len(pixels), -1)[:, :16].copy().view(np.float64)
            return self.oracle.photos(places[:, 0], places[:, 1])
        if int(encoder[1:]) >= self.lost_at:
            return np.tile(np.eye(1, 28, dtype=np.float32), (len(pixels), 1))  # all tiles are alike
        return self.oracle.encode(encoder, pixels)

    def rows(self, encoder, capacity):
        return HostRows(self.encode, encoder, capacity)

    def close(self):
        self.closed = True


class PlanetAddresses(AddressTiles):
    name, world = "planet", "planet"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return EngineBundle.open(write_tiny_bundle(folder / "tiny", levels=LEVELS, embed_dim=28))


@pytest.fixture
def shots(monkeypatch):
    """Photos whose first pixels are their place; records (lng, lat, seed)."""
    taken = []

    def shoot(lat, lng, seed):
        taken.append((lng, lat, seed))
        pixels = np.zeros((8, 8, 3), np.uint8)
        pixels.reshape(-1)[:16] = np.array([lng, lat]).view(np.uint8)
        return pixels

    monkeypatch.setattr(planet, "photo", shoot)
    return taken


def test_an_encoder_that_knows_finds_every_place(bundle, shots):
    engine = GeoEngine(bundle, PlanetAddresses(), OracleBackend())
    report = evaluate_planet(photos=4, ks=[1, 2], seed=7, engine=engine)
    assert (report.world, report.model, report.backend) == ("planet", "tiny/none", "oracle")
    assert (report.photos, report.seed) == (4, 7)
    assert [beam.k for beam in report.beams] == [1, 2]
    for beam in report.beams:
        assert [share.hits for share in beam.accuracy.within_km.values()] == [4] * 5
        assert {zoom: share.hits for zoom, share in beam.recall.items()} == dict.fromkeys(LEVELS, 4)
        assert beam.accuracy.median_km < 0.4
        assert beam.tiles_per_second == pytest.approx(beam.tiles / beam.seconds)
        assert beam.seconds_per_photo == pytest.approx(beam.seconds / 4)
    # photos are far apart, so that only the 256 tiles of zoom 4 are shared
    assert report.beams[0].tiles == 256 + 4 * 6 * 16
    assert [(lng, lat) for lng, lat, _ in shots] == land_places(4, seed=7)
    assert not engine.backend.closed


def test_recall_shows_where_the_truth_is_lost(bundle, shots):
    engine = GeoEngine(bundle, PlanetAddresses(), OracleBackend(lost_at=12))
    (beam,) = evaluate_planet(photos=6, ks=[1], seed=1, engine=engine).beams
    assert [share.hits for share in beam.recall.values()] == [6, 6, 6, 6, 0, 0, 0]
    assert beam.accuracy.within_km[1.0].hits == 0
    assert beam.accuracy.within_km[200.0].hits == 6


def test_calls_are_of_a_few_photos_and_the_first_ones_stay(bundle, shots, monkeypatch):
    monkeypatch.setattr(module, "PHOTOS_PER_CALL", 2)
    calls, progress = [], []
    locate = GeoEngine.locate
    monkeypatch.setattr(
        GeoEngine,
        "locate",
        lambda self, photos, **kw: calls.append(len(photos)) or locate(self, photos, **kw),
    )
    engine = GeoEngine(bundle, PlanetAddresses(), OracleBackend())

    def run(photos, ks):
        return evaluate_planet(
            photos=photos, ks=ks, seed=5, engine=engine, progress=lambda *call: progress.append(call)
        )

    run(5, [1, 2])
    assert calls == [2, 2, 2, 2, 1, 1]
    assert progress == [(2, 10), (4, 10), (6, 10), (8, 10), (9, 10), (10, 10)]
    before = list(shots)
    shots.clear()
    run(3, [1])
    assert shots == before[:3]
    assert len({seed for _, _, seed in before}) == 5


def test_photo_names_say_nothing_of_the_place(bundle, shots, monkeypatch):
    names = []
    locate = GeoEngine.locate
    monkeypatch.setattr(
        GeoEngine,
        "locate",
        lambda self, photos, **kw: names.extend(p.name for p in photos) or locate(self, photos, **kw),
    )
    evaluate_planet(photos=2, ks=[1], seed=5, engine=GeoEngine(bundle, PlanetAddresses(), OracleBackend()))
    assert names == ["planet photo 1", "planet photo 2"]


def test_a_report_is_json(bundle, shots):
    engine = GeoEngine(bundle, PlanetAddresses(), OracleBackend())
    report = json.loads(json.dumps(evaluate_planet(photos=2, ks=[1], seed=5, engine=engine).to_dict()))
    assert list(report) == ["world", "model", "backend", "photos", "seed", "beams"]
    (beam,) = report["beams"]
    assert list(beam["within_km"]) == ["1", "25", "200", "750", "2500"]
    assert beam["within_km"]["25"]["share"] == 1.0
    assert beam["within_km"]["25"]["ci95"][1] == 1.0
    assert list(beam["recall"]) == [str(zoom) for zoom in LEVELS]


def test_the_package_engine_is_opened_and_closed(bundle, shots, monkeypatch):
    backend, opened = OracleBackend(), []

    def fake_open(cls, *spec):
        opened.append(spec)
        return cls(bundle, PlanetAddresses(), backend)

    monkeypatch.setattr(GeoEngine, "open", classmethod(fake_open))
    evaluate_planet(photos=1, ks=[1], seed=5)
    assert opened == [("planet", "planet")]
    assert backend.closed


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"photos": 0, "ks": [1]}, r"at least one photo and one k, got 0 and \[1\]"),
        ({"photos": 1, "ks": []}, "at least one photo and one k"),
        ({"photos": 1, "ks": [4, 0]}, "k must be at least 1, got 0"),
        ({"photos": 1, "ks": [4, 4]}, r"each k once, got \[4, 4\]"),
    ],
)
def test_numbers_that_cannot_be_evaluated(arguments, match):
    with pytest.raises(GeoEngineError, match=match):
        evaluate_planet(**arguments, seed=1)


def test_only_the_planet_is_evaluated(tmp_path):
    earth = EngineBundle.open(write_tiny_bundle(tmp_path / "tiny", world="earth"))
    engine = GeoEngine(earth, AddressTiles(), OracleBackend())
    with pytest.raises(BundleError, match="only the planet has known truth, and this engine is for 'earth'"):
        evaluate_planet(photos=1, ks=[1], seed=1, engine=engine)
