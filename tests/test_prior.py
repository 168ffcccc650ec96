"""Priors: what a density says of tiles, its file, the command, and what it does to a search."""

from pathlib import Path

import numpy as np
import pytest
from command_line import refused, run
from test_engine import NoiseTiles, photo
from tiny_bundle import write_tiny_bundle

from geoengine.engine.engine import GeoEngine
from geoengine.engine.errors import GeoEngineError
from geoengine.engine.scoring.density import EVERYWHERE, Density, PriorError, counted, open_prior
from geoengine.engine.scoring.kinds import Score
from geoengine.engine.search import SearchConfig
from geoengine.engine.tiles import LngLat, all_xy, bounds_array, descendants_xy, tile_at

ZOOM = 5
PHOTO = Path(__file__).parent / "data" / "photos" / "planet01.jpg"


@pytest.fixture
def density():
    rng = np.random.default_rng(3)
    places = np.column_stack([rng.uniform(-180, 180, 200), rng.uniform(-70, 70, 200)])
    ids, counts = counted(places, rng.uniform(1, 9, 200), ZOOM)
    return Density(name="made up", world="earth", zoom=ZOOM, ids=ids, counts=counts)


def probability(density, zoom, xy):
    return np.exp(density.log_probability(np.array([0]), zoom, xy)[0].astype(np.float64))


@pytest.mark.parametrize("zoom", [0, 2, ZOOM, ZOOM + 2])
def test_probabilities_of_a_zoom_sum_to_one(density, zoom):
    assert probability(density, zoom, all_xy(zoom)).sum() == pytest.approx(1.0, abs=5e-3)  # but for the poles


@pytest.mark.parametrize("zoom", [1, 3, 4])
def test_a_tile_has_what_its_children_have(density, zoom):
    xy = all_xy(zoom)
    deep = probability(density, zoom + 2, descendants_xy(xy, zoom, zoom + 2)).reshape(len(xy), 16)
    np.testing.assert_allclose(probability(density, zoom, xy), deep.sum(axis=1), rtol=1e-3)


def test_counts_and_area_are_mixed():
    place = LngLat(10.0, 50.0)
    tile = tile_at(place, ZOOM)
    ids, counts = counted([place, place], np.array([2.0, 3.0]), ZOOM)
    one = Density(name="one", world="earth", zoom=ZOOM, ids=ids, counts=counts)
    west, south, east, north = np.radians(bounds_array(ZOOM, [tile[1:]])[0])
    area = (east - west) * (np.sin(north) - np.sin(south)) / (4 * np.pi)
    assert probability(one, ZOOM, np.array([tile[1:]])) == pytest.approx(1 - EVERYWHERE + EVERYWHERE * area)
    empty = np.array([[0, tile.y]])
    assert probability(one, ZOOM, empty) == pytest.approx(EVERYWHERE * area)
    assert (one.weight(ZOOM), one.weight(ZOOM + 1)) == (1.0, 0.0)


def test_a_density_is_read_as_it_was_written(density, tmp_path):
    density.write(tmp_path / "made.npz")
    read = open_prior(str(tmp_path / "made.npz"), "earth")
    np.testing.assert_array_equal(read.ids, density.ids)
    np.testing.assert_allclose(read.counts, density.counts, rtol=1e-6)
    assert (read.name, read.zoom, read.world) == ("made up", ZOOM, "earth")
    assert [path.name for path in tmp_path.iterdir()] == ["made.npz"]
    with pytest.raises(PriorError, match="is of the world 'earth', and this search of 'planet'"):
        open_prior(str(tmp_path / "made.npz"), "planet")


def test_the_population_is_where_people_are():
    population = open_prior("population", "earth")
    assert "GeoNames, CC BY" in population.attribution

    def of(lng, lat, zoom=8):
        return probability(population, zoom, np.array([tile_at(LngLat(lng, lat), zoom)[1:]]))[0]

    assert of(139.69, 35.69) > 100 * of(-150.0, 0.0)  # Tokyo, the Pacific
    assert of(2.35, 48.86) > 20 * of(5.0, 25.0)  # Paris, the Sahara


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "there is no such file, and the priors known by name are population"),
        (lambda path: path.write_text("no"), "this is no prior that can be used"),
        (lambda path: np.savez(path, schema=1), "this is no prior that can be used"),
        (lambda path: np.savez(path, schema=9), "reads schema 1, got 9"),
        (lambda path: np.savez(path, schema=np.array({}, dtype=object)), "this is no prior"),
    ],
)
def test_files_that_are_no_priors(tmp_path, write, message):
    write(tmp_path / "prior.npz")
    with pytest.raises(PriorError, match=message):
        open_prior(str(tmp_path / "prior.npz"), "earth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": np.float64([-1.0])}, "counts that are not above 0"),
        ({"zoom": 13}, "zoom 13"),
        ({"world": "mars"}, "world 'mars'"),
        ({"ids": np.array([4**5], np.uint64)}, "tiles outside the world"),
        ({"counts": np.float64([1.0, 2.0])}, "their counts are missing"),
    ],
)
def test_densities_that_cannot_be(tmp_path, change, message):
    made = {"name": "", "world": "earth", "zoom": 5, "ids": np.array([3], np.uint64), "counts": np.ones(1)}
    Density(**(made | change)).write(tmp_path / "bad.npz")
    with pytest.raises(PriorError, match=message):
        open_prior(str(tmp_path / "bad.npz"), "earth")


def score_of(location, tile):
    return next(scored.score for scored in location.levels[-1].beam if scored.tile == tile)


def test_a_prior_moves_the_search_and_is_named(tmp_path):
    folder = write_tiny_bundle(tmp_path / "tiny", world="earth")
    place = LngLat(100.0, -30.0)
    ids, counts = counted([place], np.ones(1), 8)
    Density(name="x", world="earth", zoom=8, ids=ids, counts=counts, attribution="© X").write(
        tmp_path / "x.npz"
    )
    with GeoEngine.open(folder, NoiseTiles(world="earth"), threads=1) as engine:
        config = SearchConfig(k=64, levels=(1, 3), prior=str(tmp_path / "x.npz"))
        photos = [photo(i) for i in range(4)]
        with_prior = engine.locate(photos, config=config)
        without = engine.locate(photos, config=SearchConfig(k=64, levels=(1, 3), score=Score.path))
        for moved, still in zip(with_prior, without, strict=True):
            assert score_of(moved, tile_at(place, 3)) > score_of(still, tile_at(place, 3)) + 1
        assert {location.scoring.prior for location in with_prior} == {str(tmp_path / "x.npz")}
        assert {location.scoring.score for location in with_prior} == {"path"}
        assert {location.attribution for location in with_prior} == {"© nobody; © X"}
        with pytest.raises(GeoEngineError, match="use --score path"):
            engine.locate(photos, config=SearchConfig(levels=(1,), score=Score.paper, prior="population"))


def test_the_command_counts_photos(tmp_path):
    table = tmp_path / "photos.csv"
    table.write_text("id,lat,lng\na,48.8,2.3\nb,48.8,2.3\nc,-33.9,151.2\n")
    done = run("prior", table, "--out", tmp_path / "p.npz")
    assert done.exit_code == 0, done.stderr
    assert "3 photos in 2 tiles" in done.stderr
    read = open_prior(str(tmp_path / "p.npz"), "earth")
    assert sorted(read.counts.tolist()) == [1.0, 2.0]
    assert read.name == "photos"


def test_what_the_command_refuses(tmp_path):
    table = tmp_path / "photos.csv"
    table.write_text("id,lat,lng\n")
    out = tmp_path / "p.npz"
    refused(run("prior", table, "--out", out, "--zoom", 13), "zoom 0 to 12, got 13")
    assert run("prior", table, "--out", out).exit_code == 2
    refused(run("prior", table, "--out", tmp_path / "no" / "p.npz"), "does not exist")
    assert not out.exists()
    demo = run("locate", "--demo", PHOTO, "--prior", "population", "--levels", "4")
    refused(demo, "is of the world 'earth', and this search of 'planet'")
