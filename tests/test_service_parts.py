"""The service's parts: who may ask how often, keys, coarse answers, and what is too much work."""

import asyncio
import stat

import numpy as np
import pytest

from geoengine.engine.errors import (
    BackendError,
    BundleError,
    GeoEngineError,
    PhotoError,
    PhotoKindError,
    PhotoSizeError,
    SourceError,
)
from geoengine.engine.regions import RegionError, parse_given_region
from geoengine.engine.regions.box import Box
from geoengine.engine.results import Candidate, Level, Location, ScoredTile
from geoengine.engine.scoring.kinds import Method
from geoengine.engine.search import SearchConfig
from geoengine.engine.shared_search import SearchEndedError
from geoengine.engine.sources.planet import PlanetSource
from geoengine.engine.tiles import (
    LngLat,
    LngLatBbox,
    Tile,
    bounds,
    center,
    great_circle_km,
    half_diagonal_km,
    parent,
    tile_at,
)
from geoengine.service.coarse import CoarseRegion, coarse_location, coarse_tile, deepest_zoom
from geoengine.service.keys import Keys, new_key
from geoengine.service.limits import Admission, Rate
from geoengine.service.parameters import Offer, Parameters, check_work
from geoengine.service.problems import Problem, problem_of
from geoengine.service.settings import Settings

LEVELS = (4, 6, 8, 10, 12, 14, 16)


# --- limits ------------------------------------------------------------------------------------------------


def test_a_rate_is_kept_for_each_client():
    now = [0.0]
    rate = Rate(60, clock=lambda: now[0])
    for _ in range(15):
        rate.take("ann")
    with pytest.raises(Problem) as refused:
        rate.take("ann")
    assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "1"})
    rate.take("bob")
    now[0] = 2.0
    rate.take("ann"), rate.take("ann")
    with pytest.raises(Problem):
        rate.take("ann")
    now[0] = 1e6
    for _ in range(15):
        rate.take("ann")
    for _ in range(1000):
        Rate(0).take("ann")


def test_clients_take_turns_and_hear_how_many_come_before_them():
    async def run():
        admission, order, told = Admission(1, 20, 10), [], {}

        async def ask(client, number):
            name = f"{client}{number}"
            told[name] = []
            async with admission.place(client):
                await admission.wait(client, 5, told[name].append)
                order.append(name)
                await asyncio.sleep(0)
                admission.done()

        await admission.wait("zoe", 5, lambda before: None)
        asked = [asyncio.ensure_future(ask("ann", n)) for n in range(3)]
        await asyncio.sleep(0)
        asked += [asyncio.ensure_future(ask(client, 0)) for client in ("bob", "cid")]
        await asyncio.sleep(0)
        assert (admission.held, admission.waiting) == (5, 5)
        assert [told[name][-1] for name in ("ann0", "bob0", "cid0", "ann1", "ann2")] == [0, 1, 2, 3, 4]
        admission.done()
        await asyncio.gather(*asked)
        assert order == ["ann0", "bob0", "cid0", "ann1", "ann2"]
        assert (admission.held, admission.searching, admission.waiting) == (0, 0, 0)

    asyncio.run(run())


def test_who_waits_too_long_or_leaves_blocks_nobody():
    async def run():
        admission = Admission(1, 20, 10)
        await admission.wait("zoe", 5, lambda before: None)
        with pytest.raises(Problem) as late:
            await admission.wait("ann", 0.01, lambda before: None)
        assert late.value.status == 503
        leaving = asyncio.ensure_future(admission.wait("ann", 5, lambda before: None))
        staying = asyncio.ensure_future(admission.wait("bob", 5, lambda before: None))
        await asyncio.sleep(0)
        leaving.cancel()
        admission.done()
        await staying
        # Cancelled in the very moment in which its turn has come: the turn goes to the next one.
        unlucky = asyncio.ensure_future(admission.wait("ann", 5, lambda before: None))
        next_one = asyncio.ensure_future(admission.wait("cid", 5, lambda before: None))
        await asyncio.sleep(0)
        admission.done()
        unlucky.cancel()
        await asyncio.wait_for(next_one, 5)
        admission.done()
        assert (admission.searching, admission.waiting) == (0, 0)

    asyncio.run(run())


def test_settings_travel_and_impossible_ones_are_refused(tmp_path):
    settings = Settings(bundle="planet", allowed_hosts=("a", "b"), min_precision_km=25.0)
    assert Settings.from_json(settings.to_json()) == settings
    for wrong, words in (
        ({"host": "0.0.0.0"}, "a key is needed"),
        ({"keys": str(tmp_path / "none")}, "no such file"),
        ({"searching": 0}, "searching must be at least 1"),
        ({"deadline_s": 0.0}, "deadline must be more than 0"),
        ({"deadline_s": float("nan")}, "deadline must be more than 0"),
        ({"min_precision_km": -1.0}, "min-precision-km"),
        ({"rate_per_minute": -1.0}, "at least 0"),
    ):
        with pytest.raises(GeoEngineError, match=words):
            Settings(**wrong)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (PhotoSizeError("photo: too many pixels"), 413, "too many pixels"),
        (PhotoKindError("photo: no image"), 415, "no image"),
        (PhotoError("photo: damaged"), 422, "damaged"),
        (SourceError("https://tiles.example/?key=secret does not answer"), 503, "map tiles did not come"),
        (BackendError("/srv/engines/x.onnx cannot run"), 503, "encoders cannot run now"),
        (BundleError("/srv/engines has been replaced"), 503, "encoders cannot run now"),
        (SearchEndedError("the search did not end in time"), 503, "did not end in time: try again"),
        (GeoEngineError("k must be at least 1"), 422, "at least 1"),
    ],
)
def test_errors_become_refusals_that_tell_no_secret(error, status, words):
    problem = problem_of(error)
    assert (problem.status, words in problem.detail) == (status, True)
    assert "/" not in problem.detail and ("Retry-After" in problem.headers) is (status == 503)


# --- keys --------------------------------------------------------------------------------------------------


def test_keys_are_kept_as_hashes_and_known_again(tmp_path):
    file = tmp_path / "keys"
    key = new_key(file, "desk")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert key not in file.read_text() and key.split("_", 2)[2] not in file.read_text()
    keys = Keys(file)
    assert keys.owner(key) == "desk"
    for wrong in ("", key[:-1], key + "x", key.replace("geoengine", "geoengin"), key[:-1] + "é", "desk"):
        assert keys.owner(wrong) is None
    other = new_key(file, "archive")
    assert (keys.owner(other), keys.owner(key)) == ("archive", "desk")
    with pytest.raises(GeoEngineError, match="has a key of the name desk already"):
        new_key(file, "desk")
    with pytest.raises(GeoEngineError, match="cannot be the name"):
        new_key(file, "a:b")
    file.write_text(file.read_text().rstrip("\n"))  # as an editor may leave it
    third = new_key(file, "third")
    assert [keys.owner(one) for one in (key, other, third)] == ["desk", "archive", "third"]
    file.write_text("# nobody\n\nnonsense\n")
    assert keys.owner(key) is None, "a file that cannot be read lets nobody in"
    with pytest.raises(GeoEngineError, match="line 3 is no key"):
        Keys(file)
    file.unlink()
    assert keys.owner(other) is None
    with pytest.raises(GeoEngineError, match="cannot be kept"):
        new_key(tmp_path / "none" / "keys", "desk")


# --- coarse answers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("km", [0.5, 5.0, 25.0, 300.0, 3000.0])
@pytest.mark.parametrize("lat", [0.0, 47.0, -79.0])
def test_a_coarse_tile_is_the_smallest_that_is_large_enough(km, lat):
    fine = tile_at(LngLat(11.0, lat), 16)
    coarse = coarse_tile(fine, km)
    assert parent(fine, coarse.z) == coarse
    assert half_diagonal_km(coarse) >= km or coarse.z == 0
    assert coarse.z == 16 or half_diagonal_km(parent(fine, coarse.z + 1)) < km
    assert coarse.z <= max(deepest_zoom(km), 0)


def test_a_coarse_result_tells_nothing_finer():
    rng, km = np.random.default_rng(2), 25.0
    places = [LngLat(10 + float(dx), 60 + float(dy)) for dx, dy in rng.uniform(-0.5, 0.5, (12, 2))]
    tiles = [tile_at(place, 16) for place in places]
    path = tuple(ScoredTile(tile=parent(tiles[0], z), score=0.5) for z in LEVELS)
    candidates = tuple(
        Candidate(rank=n + 1, tile=tile, point=center(tile), score=1 - n / 20, share=1 / 12, path=path)
        for n, tile in enumerate(tiles)
    )
    beam = tuple(ScoredTile(tile=tile, score=1 - n / 20) for n, tile in enumerate(tiles))
    level = Level(zoom=16, candidates=12, missing=0, beam=beam, ancestors=beam[:2])
    location = Location(
        photo="photo", world="earth", point=candidates[0].point, score=1.0, radius_km=0.3, seconds=1.0,
        candidates=candidates, levels=(level,), k=12, tiles="", attribution="", model="",
        radii_km=(0.1, 90.0),
    )  # fmt: skip
    coarse = coarse_location(location, km)
    shown = [*(c.tile for c in coarse.candidates), *(s.tile for c in coarse.candidates for s in c.path)]
    shown += [s.tile for one in coarse.levels for s in (*one.beam, *one.ancestors)]
    assert all(half_diagonal_km(tile) >= km for tile in shown)
    assert len({c.tile for c in coarse.candidates}) == len(coarse.candidates) < 12
    assert [c.rank for c in coarse.candidates] == list(range(1, len(coarse.candidates) + 1))
    assert sum(c.share for c in coarse.candidates) == pytest.approx(1)
    assert all(c.point == center(c.tile) for c in coarse.candidates)
    step = half_diagonal_km(coarse.candidates[0].tile)
    assert coarse.point == coarse.candidates[0].point and coarse.point != location.point
    for told, radius in zip((coarse.radius_km, *coarse.radii_km), (0.3, 0.1, 90.0), strict=True):
        assert told >= radius + great_circle_km(coarse.point, location.point)
        assert told / step == pytest.approx(round(told / step)), "it tells no distance of finer tiles"


def test_an_answer_that_is_coarse_already_keeps_its_place():
    tile, km = Tile(4, 8, 5), 10.0
    only = Candidate(
        rank=1, tile=tile, point=center(tile), score=1.0, share=1.0, path=(ScoredTile(tile=tile, score=1.0),)
    )
    location = Location(
        photo="photo", world="earth", point=only.point, score=1.0, radius_km=half_diagonal_km(tile),
        candidates=(only,), levels=(), k=1, tiles="", attribution="", model="", seconds=1.0,
    )  # fmt: skip
    coarse = coarse_location(location, km)
    assert coarse.candidates == (only,)
    assert coarse.point == only.point and coarse.radius_km == pytest.approx(location.radius_km)


@pytest.mark.parametrize("z", [4, 7, 9, 14])
def test_a_region_does_not_tell_where_in_a_coarse_tile_something_is(z):
    km, place = 25.0, LngLat(10.3, 60.2)
    tile = coarse_tile(tile_at(place, 16), km)
    corner = bounds(tile)
    small = Box(LngLatBbox(corner.west + 1e-4, corner.south + 1e-4, corner.west + 2e-4, corner.south + 2e-4))
    region = CoarseRegion(small, km)
    inside = tile_at(place, z)
    assert region.intersects(z, np.array([inside[1:], (0, 0)])).tolist() == [True, False]
    xy = region.tiles(z)
    assert len(xy) == 4 ** max(0, z - tile.z) and inside[1:] in [tuple(each) for each in xy.tolist()]
    assert region.intersects(z, xy).all() and (np.unique(xy, axis=0) == xy).all()
    assert (region.name, region.of_earth) == (small.name, False)


# --- work --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({"k": 64}, True),
        ({"k": 16, "levels": (4, 8, 12, 16)}, True),
        ({"k": 64, "levels": (4, 8, 12, 16)}, False),
        ({"k": 1, "levels": (4, 14)}, False),
        ({"k": 1, "levels": (7,)}, True),
        ({"k": 1, "levels": (8,)}, False),
        ({"k": 1, "levels": (8, 10), "within": "0,0,10,10"}, True),
        ({"k": 1, "levels": (12,), "within": "0,0,0.1,0.1"}, False),  # it would have to be counted first
    ],
)
def test_searches_are_bounded(options, fits):
    within = options.pop("within", None)
    config = SearchConfig(**options, within=None if within is None else parse_given_region(within))
    if fits:
        check_work(config, PlanetSource(), 20_000)
    else:
        with pytest.raises(GeoEngineError, match="would look at"):
            check_work(config, PlanetSource(), 20_000)


def test_a_region_without_tiles_is_said_before_anything_is_read():
    class Europe(PlanetSource):
        bounds = (0.0, 40.0, 20.0, 60.0)

    with pytest.raises(RegionError, match="no map tiles in this region"):
        check_work(SearchConfig(within=parse_given_region("100,0,110,10")), Europe(), 20_000)


def test_regions_of_clients_name_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FR").write_text('{"type": "Polygon", "coordinates": [[[0,0],[1,0],[1,1],[0,0]]]}')
    (tmp_path / "area.geojson").write_text("{}")
    assert parse_given_region("FR").name != "FR"
    for text in ("area.geojson", str(tmp_path / "FR"), "", "F", "1,2", "~/x"):
        with pytest.raises(RegionError, match=r"^within is no region|^'"):
            parse_given_region(text)
    for text in ("{", "[]", '{"type": "Polygon", "coordinates": [[{"a": 1}, 2, "b"]]}', '{"type": "Point"}'):
        with pytest.raises(RegionError, match="within"):
            parse_given_region(text)


def test_methods_that_are_not_offered_are_refused():
    chosen = Parameters(method=Method.geoclip)
    with pytest.raises(GeoEngineError, match="geoclip is not offered here: there are tiles"):
        chosen.config(Offer(levels=LEVELS))
    assert chosen.config(Offer(levels=LEVELS, methods=tuple(Method))).method is Method.geoclip
    for prior in ("population", "/etc/passwd"):
        with pytest.raises(GeoEngineError, match="this prior is not offered here: there is none"):
            Parameters(prior=prior).config(Offer(levels=LEVELS))
    assert Parameters(prior="a").config(Offer(levels=LEVELS, priors=("a",))).prior == "a"
    assert Tile(0, 0, 0) == coarse_tile(Tile(16, 5, 5), 1e6)
