"""GeoEngine: what a photo's beams become, and what is refused."""

import io
import math
import time

import numpy as np
import pytest
from PIL import Image
from tiny_bundle import EMBED_DIM, IMAGE_SIZE, write_tiny_bundle

from geoengine.engine import engine as engine_module
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.engine import GeoEngine
from geoengine.engine.errors import BackendError, BundleError, PhotoError, SourceError, TileError
from geoengine.engine.photos import Photo
from geoengine.engine.preprocess import to_square
from geoengine.engine.results import Level, ScoredTile
from geoengine.engine.scoring.answer import uncertainty_radius_km
from geoengine.engine.scoring.mass import softmax_shares
from geoengine.engine.search import SearchConfig
from geoengine.engine.sources import WORLD_BOUNDS, TileBatch
from geoengine.engine.tiles import (
    LngLat,
    center,
    great_circle_km,
    half_diagonal_km,
    parent,
    tile_at,
)

CONFIG = SearchConfig(k=3, levels=(1, 3), top=2)


class NoiseTiles:
    """Tiles of random pixels, 8 x 8, drawn from their address."""

    name, attribution, tile_size = "noise", "© nobody", 8
    min_zoom, max_zoom, bounds, identity, storable = 0, 30, WORLD_BOUNDS, "noise", True

    def __init__(self, world="planet", deepest=99):
        self.world, self.deepest, self.closed = world, deepest, 0

    def read(self, z, xy):
        if z <= self.deepest:
            draw = [np.random.default_rng([z, *row]).integers(0, 256, (8, 8, 3), np.uint8) for row in xy]
            yield TileBatch(np.arange(len(xy)), np.stack(draw))

    def close(self):
        self.closed += 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def engine(folder):
    with GeoEngine.open(folder, NoiseTiles(), threads=1) as opened:
        yield opened


def photo(seed, shape=(30, 40)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    return Photo(f"photo {seed}", pixels)


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


# --- results ----------------------------------------------------------------------------------------------


def test_a_location_says_where_how_and_how_sure(engine):
    start = time.perf_counter()
    first, second = engine.locate([photo(1), photo(2)], config=CONFIG)
    elapsed = time.perf_counter() - start
    assert (first.photo, second.photo) == ("photo 1", "photo 2")
    for location in (first, second):
        assert (location.world, location.k, location.tiles) == ("planet", 3, "noise")
        assert location.attribution == "© nobody"
        assert location.model == "tiny with random weights, for timing only"
        assert [level.zoom for level in location.levels] == [1, 3]
        assert [level.candidates for level in location.levels] == [4, 48]
        assert [candidate.rank for candidate in location.candidates] == [1, 2]
        beam = location.levels[-1].beam
        shares = softmax_shares(location.levels[-1], 20.0)
        for candidate, scored, share in zip(location.candidates, beam, shares, strict=False):
            assert (candidate.tile, candidate.score) == (scored.tile, scored.score)
            assert candidate.point == center(candidate.tile)
            assert candidate.share == pytest.approx(share)
        assert (location.point, location.score) == (location.candidates[0].point, beam[0].score)
        assert location.radius_km == uncertainty_radius_km(location.levels[-1], shares)
        assert 0 < 2 * location.seconds < elapsed
    assert first.levels != second.levels


def test_a_path_runs_through_the_beams_to_the_candidate(engine):
    for location in engine.locate([photo(3), photo(4)], config=SearchConfig(k=4, levels=(1, 3), top=4)):
        for candidate in location.candidates:
            assert [step.tile.z for step in candidate.path] == [1, 3]
            assert candidate.path[-1] == ScoredTile(tile=candidate.tile, score=candidate.score)
            assert candidate.path[0].tile == parent(candidate.tile, 1)
            for step, level in zip(candidate.path, location.levels, strict=True):
                assert step in level.beam


def test_several_photos_equal_single_calls(engine):
    together = engine.locate([photo(i) for i in range(5)], config=CONFIG)
    for i, location in enumerate(together):
        (alone,) = engine.locate([photo(i)], config=CONFIG)
        assert (alone.levels, alone.candidates) == (location.levels, location.candidates)


def test_photos_of_every_kind_of_source(engine, tmp_path):
    pixels = photo(5).pixels
    file = tmp_path / "p.png"
    file.write_bytes(png(pixels))
    sources = [Photo("p", pixels), pixels, png(pixels), file, str(file), Image.fromarray(pixels)]
    locations = engine.locate(sources, config=CONFIG)
    assert locations[3].photo == str(file)
    assert len({location.levels for location in locations}) == 1


def test_a_photo_whose_search_ends_early_is_answered_from_the_last_beam(folder):
    with GeoEngine.open(folder, NoiseTiles(deepest=1)) as engine:
        (location,) = engine.locate([photo(1)], config=CONFIG)
    assert [level.zoom for level in location.levels] == [1]
    assert location.candidates[0].tile.z == 1
    assert location.point == center(location.candidates[0].tile)


def test_no_photos(engine):
    assert engine.locate([], config=CONFIG) == []
    assert engine.embed_photos([]).shape == (0, EMBED_DIM)


def test_photo_embeddings_are_those_of_the_centre_square(engine, monkeypatch):
    monkeypatch.setattr(engine_module, "_PHOTO_CHUNK", 2)
    photos = [photo(1), photo(2, (50, 20)), photo(3, (8, 8)), photo(4), photo(5)]
    squares = np.stack([to_square(p.pixels, IMAGE_SIZE) for p in photos])
    np.testing.assert_array_equal(engine.embed_photos(photos), engine.backend.encode("photo", squares))


def test_progress_is_passed_on(engine):
    calls = []
    engine.locate([photo(1)], config=CONFIG, progress=lambda *call: calls.append(call))
    assert (0, 1, 4, 4) in calls
    assert calls[-1] == (1, 3, 48, 48)


# --- the radius -------------------------------------------------------------------------------------------


def level_of(*points, zoom=16, scores=None):
    scores = scores or [0.5] * len(points)
    tiles = [tile_at(LngLat(*point), zoom) for point in points]
    beam = tuple(ScoredTile(tile=t, score=s) for t, s in zip(tiles, scores, strict=True))
    return Level(zoom=zoom, candidates=len(beam), missing=0, beam=beam)


def test_shares_are_a_softmax():
    level = level_of((0, 0), (1, 1), (2, 2), scores=[0.9, 0.8, 0.1])
    weights = [math.exp(50 * s) for s in (0.9, 0.8, 0.1)]
    np.testing.assert_allclose(softmax_shares(level, 50.0), np.array(weights) / sum(weights), rtol=1e-9)
    assert softmax_shares(level_of((0, 0), scores=[1.0]), 1e6) == [1.0]


def test_radius_of_a_single_tile_is_half_its_diagonal():
    level = level_of((10, 50))
    assert uncertainty_radius_km(level, np.array([1.0])) == half_diagonal_km(level.beam[0].tile)


def test_radius_reaches_two_thirds_of_the_share():
    level = level_of((10, 50), (100, 0), (10.5, 50), (11, 50))
    answer = level.beam[0].tile
    near, nearer = level.beam[3].tile, level.beam[2].tile

    def radius_to(tile):
        return great_circle_km(center(answer), center(tile)) + half_diagonal_km(answer)

    def radius(*shares):
        return uncertainty_radius_km(level, np.array(shares))

    assert radius(0.7, 0.1, 0.1, 0.1) == half_diagonal_km(answer)
    assert radius(0.3, 0.1, 0.4, 0.2) == pytest.approx(radius_to(nearer))
    assert radius(0.3, 0.1, 0.3, 0.3) == pytest.approx(radius_to(near))
    assert radius(0.3, 0.5, 0.1, 0.1) == pytest.approx(radius_to(level.beam[1].tile))


def test_exactly_two_thirds_are_enough():
    level = level_of((10, 50), (10.5, 50), (11, 50))
    far = great_circle_km(center(level.beam[0].tile), center(level.beam[1].tile))
    radius = uncertainty_radius_km(level, np.array([1 / 3] * 3))
    assert radius == pytest.approx(far + half_diagonal_km(level.beam[0].tile))


def test_radius_across_the_antimeridian():
    level = level_of((179.99, 0), (-179.99, 0))
    assert uncertainty_radius_km(level, np.array([0.5, 0.5])) < 3


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bundles", "tiles"), [("planet", "earth"), ("earth", "planet")])
def test_worlds_must_match(tmp_path, bundles, tiles):
    source = NoiseTiles(world=tiles)
    with pytest.raises(
        BundleError, match=f"know the world '{bundles}', and the tiles of noise show '{tiles}'"
    ):
        GeoEngine.open(write_tiny_bundle(tmp_path / "tiny", world=bundles), source)
    assert source.closed == 0  # it stays the caller's


def test_worlds_must_match_however_an_engine_is_made(folder, engine):
    with pytest.raises(BundleError, match="give a bundle and tiles of the same world"):
        GeoEngine(EngineBundle.open(folder), NoiseTiles(world="earth"), engine.backend)


def test_a_source_that_was_opened_here_is_closed_on_failure(folder, monkeypatch):
    source = NoiseTiles()
    monkeypatch.setattr(engine_module, "open_source", lambda spec: source)
    with pytest.raises(BackendError, match="unknown backend"):
        GeoEngine.open(folder, "planet", backend="none")
    assert source.closed == 1


def test_a_planet_bundle_brings_its_tiles_and_an_earth_bundle_does_not(folder, tmp_path, monkeypatch):
    source, specs = NoiseTiles(), []
    monkeypatch.setattr(engine_module, "open_source", lambda spec: specs.append(spec) or source)
    with GeoEngine.open(folder) as engine:
        assert engine.source is source
        assert source.closed == 0
        assert engine.locate([photo(1)], config=CONFIG)
    assert specs == ["planet"]
    with pytest.raises(SourceError, match=r"no tile source given: name a URL template with \{z\}, \{x\}"):
        GeoEngine.open(write_tiny_bundle(tmp_path / "earth", world="earth"))


def test_leaving_the_block_closes_everything(folder):
    source = NoiseTiles()
    with GeoEngine.open(folder, source) as engine:
        pass
    assert source.closed == 1
    with pytest.raises(BackendError, match="closed"):
        engine.embed_photos([photo(1)])


def test_levels_without_an_encoder(engine, folder):
    with pytest.raises(TileError, match=r"no map encoder for level 5, 7: engine bundle .* has levels 1, 3$"):
        engine.locate([photo(1)], config=SearchConfig(levels=(3, 5, 7)))
    with pytest.raises(TileError, match="no map encoder for level 4, 6, 8"):
        engine.locate([photo(1)])


def test_some_of_the_levels(engine):
    (location,) = engine.locate([photo(1)], config=SearchConfig(k=2, levels=(3,)))
    assert [(level.zoom, level.candidates) for level in location.levels] == [(3, 64)]


def test_a_photo_that_cannot_be_read(engine, tmp_path):
    with pytest.raises(PhotoError, match=r"nowhere\.jpg"):
        engine.locate([tmp_path / "nowhere.jpg"], config=CONFIG)


@pytest.mark.parametrize("one", ["photo.jpg", b"bytes", np.zeros((4, 4, 3), np.uint8), photo(1)])
def test_one_photo_must_be_in_a_list(engine, one):
    with pytest.raises(TypeError, match="locate takes a list of photos, got one"):
        engine.locate(one, config=CONFIG)


def test_the_bundle_is_checked(folder, tmp_path):
    broken = write_tiny_bundle(tmp_path / "tiny")
    (broken / "onnx/head_photo.fp32.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match=r"head_photo\.fp32\.onnx is damaged"):
        GeoEngine.open(broken, NoiseTiles())
    assert EngineBundle.open(folder).world == "planet"
