"""The built-in planet: deterministic, without seams, consistent between zooms, land and sea where it says."""

import numpy as np
import pytest

from geoengine.engine.errors import TileError
from geoengine.engine.sources import open_source, planet
from geoengine.engine.sources.planet import maps
from geoengine.engine.sources.planet.photos import render_photo
from geoengine.engine.sources.planet.world import ATTRIBUTE_LEVELS, World
from geoengine.engine.tiles import all_xy, centers, xy_at

WORLD = planet.default_world()
GOLDEN_RED = [[221, 221, 228, 218], [115, 228, 233, 64], [112, 128, 202, 54], [109, 222, 57, 222]]
GOLDEN_HUES = [[0.7035, 0.458]]


def land_cells(count: int, seed: int = 0) -> np.ndarray:
    xy = np.random.default_rng(seed).integers(0, 1 << 16, (4 * count, 2))
    middle = (xy + 0.5) / (1 << 16)
    return xy[WORLD.is_land(middle[:, 0], middle[:, 1])][:count]


def test_tiles_and_photos_are_functions_of_their_arguments() -> None:
    for z, x, y in ((0, 0, 0), (4, 3, 9), (9, 200, 301), (16, 40000, 30000), (18, 160001, 120003)):
        first, second = (planet.tile(z, x, y, size=64) for _ in range(2))
        assert first.shape == (64, 64, 3)
        assert first.dtype == np.uint8
        np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(planet.photo(10, 20, 1), planet.photo(10, 20, 1))
    assert (planet.photo(10, 20, 1) != planet.photo(10, 20, 2)).mean() > 0.5
    assert planet.photo(10, 20, 1).shape == (480, 640, 3)


def test_the_golden_tile_has_not_changed() -> None:
    """The weights in the package were trained on exactly this planet."""
    tile = planet.tile(8, 83, 140, size=112)
    assert tile[::28, ::28, 0].tolist() == GOLDEN_RED
    np.testing.assert_allclose(WORLD.hues(16, np.array([[40000, 30000]])), GOLDEN_HUES, atol=1e-4)


@pytest.mark.parametrize("level", ATTRIBUTE_LEVELS)
def test_siblings_differ_by_an_eighth_of_a_turn_in_one_hue(level: int) -> None:
    parents = np.random.default_rng(level).integers(0, 1 << (level - 2), (20, 2))
    inner = np.stack(np.meshgrid(range(4), range(4)), axis=-1).reshape(-1, 2)
    hues = WORLD.hues(level, (parents[:, None] * 4 + inner).reshape(-1, 2)).reshape(20, 16, 2)
    turn = np.abs(hues[:, :, None] - hues[:, None])
    apart = np.minimum(turn, 1 - turn).max(axis=-1)  # (20, 16, 16)
    assert apart[:, ~np.eye(16, dtype=bool)].min() >= 0.125 - 1e-6


@pytest.mark.parametrize("z", [2, 4, 5, 8, 12, 16, 17])
def test_neighbouring_tiles_meet_without_a_seam(z: int) -> None:
    """Across the border of two tiles pixels change no more than they do inside a tile, symbols left out."""
    rng = np.random.default_rng(z)
    across, within = [], []
    for x, y in rng.integers(0, (1 << z) - 1, (24, 2)).tolist():
        left = planet.tile(z, x, y, size=112).astype(int)
        right = planet.tile(z, x + 1, y, size=112).astype(int)
        below = planet.tile(z, x, y + 1, size=112).astype(int)
        across += [np.abs(left[:, -1] - right[:, 0]), np.abs(left[-1] - below[0])]
        within += [np.abs(left[:, 1] - left[:, 0]), np.abs(left[1] - left[0])]
    assert np.mean(across) < 1.6 * np.mean(within) + 1


@pytest.mark.parametrize("level", [4, 10, 16])
def test_roads_meet_those_of_the_neighbours(level: int) -> None:
    xy = np.random.default_rng(level).integers(0, (1 << level) - 1, (50, 2))
    xy[0, 0] = (1 << level) - 1  # its eastern neighbour lies across the antimeridian
    east, south = (xy + step for step in ([1, 0], [0, 1]))
    east[:, 0] %= 1 << level
    here, right, below = (maps._roads(WORLD, level, cells) for cells in (xy, east, south))
    np.testing.assert_allclose(here[:, 0, 2] - [1, 0], right[:, 0, 0], atol=1e-6)
    np.testing.assert_allclose(here[:, 1, 2] - [0, 1], below[:, 1, 0], atol=1e-6)


def test_the_antimeridian_has_no_seam() -> None:
    east, west = (planet.tile(4, x, 4, size=112).astype(int) for x in (15, 0))
    assert np.abs(east[:, -1] - west[:, 0]).mean() < 25


def test_an_odd_zoom_shows_the_same_world_as_the_even_one_above() -> None:
    cell, quarter = planet.tile(8, 83, 140, size=224), planet.tile(9, 167, 280, size=112)
    np.testing.assert_array_equal(quarter, cell[:112, 112:])


def test_zooming_in_keeps_land_and_sea() -> None:
    """Where a tile's centre is land or sea at zoom 4, so is the tile around it at zoom 16."""
    middle = centers(4, all_xy(4))
    land = planet.is_land(middle[:, 0], middle[:, 1])
    kind = WORLD.land_kind(16, xy_at(middle[:, 0], middle[:, 1], 16))
    assert 0.4 < land.mean() < 0.7
    assert (kind[land] >= 0).all()
    assert (kind[~land] <= 0).all()
    assert (kind != 0).mean() > 0.9


def test_elevation_of_points_and_of_tile_grids_agree() -> None:
    for z, x, y in ((6, 21, 33), (11, 700, 900), (16, 40000, 30000)):
        grid = WORLD.elevation_grid(z, x, y, 16)
        centre = (np.arange(16) + 0.5) / 16
        u, v = np.meshgrid((x + centre) / (1 << z), (y + centre) / (1 << z))
        points = WORLD.elevation(u.ravel(), v.ravel()).reshape(16, 16)
        np.testing.assert_allclose(grid, points, atol=0.2 if z == 6 else 1e-4)  # z6: fine octaves left out


@pytest.mark.parametrize("level", ATTRIBUTE_LEVELS)
@pytest.mark.parametrize("hue", [0, 1])
def test_a_photo_shows_both_hues_of_every_level(level: int, hue: int) -> None:
    """With one hue turned round and chance the same, a part of the picture changes, and only a part."""

    class Turned(World):
        def ancestor_hues(self, deepest: int, xy: np.ndarray) -> np.ndarray:
            hues = WORLD.ancestor_hues(deepest, xy)
            hues[:, ATTRIBUTE_LEVELS.index(level), hue] += 0.5
            return hues

    x, y = land_cells(1)[0].tolist()
    here, missing = render_photo(WORLD, x, y, 4)
    there, _ = render_photo(Turned(), x, y, 4)
    assert missing is None
    changed = (np.abs(here.astype(int) - there).max(axis=2) > 25).mean()
    assert 0.003 < changed < 0.5


def test_some_photos_lack_one_thing() -> None:
    x, y = land_cells(1)[0].tolist()
    missing = [render_photo(WORLD, x, y, seed, 48)[1] for seed in range(200)]
    assert 0.25 < np.mean([thing is not None for thing in missing]) < 0.45
    assert len(set(missing)) == 8


def test_the_source_reads_in_order_and_refuses_what_does_not_exist() -> None:
    source = open_source("planet")
    assert (source.name, source.world, source.tile_size) == ("planet", "planet", 112)
    xy = land_cells(40) >> 8
    batches = list(source.read(8, xy))
    assert np.concatenate([batch.positions for batch in batches]).tolist() == list(range(40))
    np.testing.assert_array_equal(batches[1].pixels[-1], planet.tile(8, *xy[39].tolist(), size=112))
    assert list(source.read(8, np.empty((0, 2), dtype=np.int64))) == []
    with pytest.raises(TileError, match="zooms 0 to 18"):
        list(source.read(19, np.array([[0, 0]])))
    with pytest.raises(TileError, match="outside zoom 4"):
        planet.tile(4, 16, 0)


def test_photos_are_noisy_in_every_channel_and_not_very() -> None:
    sky = planet.photo(10, 20, 1)[:30, 300:360].astype(int)
    noise = (sky[:, 1:] - sky[:, :-1]).std(axis=(0, 1)) / np.sqrt(2)
    assert ((noise > 3) & (noise < 9)).all()
