"""Tile maths against mercantile, and its own laws."""

import math
import pickle

import mercantile
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from geoengine.engine import tiles
from geoengine.engine.errors import TileError
from geoengine.engine.tiles import LngLat, LngLatBbox, Tile

ZOOMS = st.integers(0, tiles.MAX_ZOOM)
# Inside the map by a little: on its east and south edge mercantile gives tiles that do not exist.
LNGS = st.floats(-180, 180 - 1e-11)
LATS = st.floats(-85.05112877, 85.05112877)
ANY_LATS = st.floats(-90, 90)


@st.composite
def some_tiles(draw, max_zoom=tiles.MAX_ZOOM):
    z = draw(st.integers(0, max_zoom))
    numbers = st.integers(0, 2**z - 1)
    return Tile(z, draw(numbers), draw(numbers))


@st.composite
def tile_arrays(draw):
    z = draw(ZOOMS)
    numbers = st.integers(0, 2**z - 1)
    rows = draw(st.lists(st.tuples(numbers, numbers), max_size=20))
    return z, np.array(rows, np.int64).reshape(-1, 2)


def mercantile_tile(tile):
    return mercantile.Tile(tile.x, tile.y, tile.z)


def geo_tile(tile):
    return Tile(tile.z, tile.x, tile.y)


# --- one tile ----------------------------------------------------------------------------------------------


def test_tile_of_a_known_place():
    eiffel_tower = LngLat(2.2945, 48.8584)
    assert tiles.tile_at(eiffel_tower, 16) == Tile(16, 33185, 22545)
    assert tiles.quadkey(Tile(16, 33185, 22545)) == "1202200110120003"
    assert tiles.center(Tile(1, 1, 0)) == pytest.approx((90.0, 66.51326044311186))


@given(LNGS, LATS, ZOOMS)
def test_tile_at_is_mercantiles(lng, lat, z):
    assert tiles.tile_at(LngLat(lng, lat), z) == geo_tile(mercantile.tile(lng, lat, z))


@given(LNGS, LATS, ZOOMS)
def test_tile_at_is_the_printed_equation_six(lng, lat, k):
    north = math.log(math.tan(math.pi / 4 + math.radians(lat) / 2))  # eq. 4
    printed = 2**k - (north + math.pi) / (2 * math.pi / 2**k)
    row = tiles.tile_at(LngLat(lng, lat), k).y
    # Floats cannot say on which side of an edge a point lies that is this close to it.
    assert row - 2**k * 1e-13 <= printed <= row + 1 + 2**k * 1e-13


@given(some_tiles())
def test_every_corner_and_centre_is_in_its_tile(tile):
    west, _, _, north = tiles.bounds(tile)
    assert tiles.tile_at(LngLat(west, north), tile.z) == tile
    assert tiles.tile_at(tiles.center(tile), tile.z) == tile


@given(some_tiles())
def test_bounds_are_mercantiles(tile):
    assert tiles.bounds(tile) == pytest.approx(tuple(mercantile.bounds(mercantile_tile(tile))), abs=1e-12)


@given(LNGS, st.floats(tiles.MAX_LATITUDE_DEG, 90), ZOOMS)
@example(0.0, 90.0, 16)
def test_latitudes_beyond_the_map_are_clipped(lng, lat, z):
    assert tiles.tile_at(LngLat(lng, lat), z).y == 0
    assert tiles.tile_at(LngLat(lng, -lat), z).y == 2**z - 1


@given(ANY_LATS, ZOOMS)
def test_the_antimeridian_is_the_edge_of_two_columns(lat, z):
    assert tiles.tile_at(LngLat(-180, lat), z).x == 0
    assert tiles.tile_at(LngLat(180, lat), z).x == 2**z - 1


@given(st.integers(-180, 179), ANY_LATS, ZOOMS, st.integers(-5, 5))
def test_longitudes_are_wrapped(lng, lat, z, turns):
    assert tiles.tile_at(LngLat(lng + 360 * turns, lat), z) in {
        tiles.tile_at(LngLat(lng, lat), z),
        tiles.tile_at(LngLat(lng, lat), z)._replace(x=2**z - 1 if lng == -180 else 0),
    }
    if lng != -180:  # which is also 180, the east edge of the last column
        assert tiles.tile_at(LngLat(lng + 360 * turns, lat), z) == tiles.tile_at(LngLat(lng, lat), z)


@given(some_tiles(max_zoom=tiles.MAX_ZOOM - 2))
def test_children_are_in_the_order_of_the_algorithm(tile):
    z, x, y = tile
    expected = [Tile(z + 2, 4 * x + i, 4 * y + j) for i in range(4) for j in range(4)]
    assert list(tiles.children(tile)) == expected
    assert set(expected) == {geo_tile(t) for t in mercantile.children(mercantile_tile(tile), zoom=z + 2)}
    assert {tiles.parent(child) for child in expected} == {tile}


@given(some_tiles(), st.integers(0, 4))
def test_descendants_are_the_tiles_whose_parent_is_the_tile(tile, deeper):
    z = min(tile.z + deeper, tiles.MAX_ZOOM)
    found = tiles.descendants(tile, z)
    assert len(set(found)) == 4 ** (z - tile.z)
    assert list(found) == sorted(found)
    assert {tiles.parent(t, tile.z) for t in found} == {tile}


@given(some_tiles())
def test_quadkeys_are_mercantiles_and_round_trip(tile):
    assert tiles.quadkey(tile) == mercantile.quadkey(mercantile_tile(tile))
    assert tiles.from_quadkey(tiles.quadkey(tile)) == tile


@given(some_tiles())
def test_tms_rows_count_from_the_south(tile):
    assert tiles.tms_row(tile) == 2**tile.z - 1 - tile.y
    assert tiles.tms_row(tile._replace(y=tiles.tms_row(tile))) == tile.y


def test_a_tile_is_a_value():
    tile = Tile(np.int64(3), np.int32(1), 2)
    assert (tile.z, tile.x, tile.y) == tile == (3, 1, 2)
    assert all(type(value) is int for value in tile)
    assert {tile: "here"}[Tile(3, 1, 2)] == "here"
    assert sorted([Tile(3, 1, 2), Tile(2, 3, 3), Tile(3, 0, 7)]) == [(2, 3, 3), (3, 0, 7), (3, 1, 2)]
    assert pickle.loads(pickle.dumps(tile)) == tile
    assert str(tile) == "3/1/2"


# --- arrays of tiles ---------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(-720, 720), ANY_LATS), max_size=20), ZOOMS)
def test_xy_at_is_tile_at_of_each_row(points, z):
    lng, lat = np.array(points).reshape(-1, 2).T
    assert tiles.xy_at(lng, lat, z).tolist() == [list(tiles.tile_at(LngLat(*p), z)[1:]) for p in points]


@given(tile_arrays())
def test_array_forms_are_the_scalar_ones_of_each_row(case):
    z, xy = case
    rows = [Tile(z, x, y) for x, y in xy.tolist()]
    assert tiles.centers(z, xy).tolist() == [list(tiles.center(tile)) for tile in rows]
    assert tiles.bounds_array(z, xy).tolist() == [list(tiles.bounds(tile)) for tile in rows]
    to_z = min(z + 2, tiles.MAX_ZOOM)
    deeper = [list(t[1:]) for tile in rows for t in tiles.descendants(tile, to_z)]
    assert tiles.descendants_xy(xy, z, to_z).tolist() == deeper


@pytest.mark.parametrize("z", range(6))
def test_all_xy_has_every_tile_once_in_order(z):
    xy = tiles.all_xy(z)
    assert xy.dtype == np.int64
    assert xy.tolist() == [[x, y] for x in range(2**z) for y in range(2**z)]


def test_arrays_may_be_empty():
    empty = np.empty((0, 2), np.int64)
    assert tiles.xy_at([], [], 3).shape == (0, 2)
    assert tiles.centers(3, empty).shape == (0, 2)
    assert tiles.bounds_array(3, empty).shape == (0, 4)
    assert tiles.descendants_xy(empty, 3, 5).shape == (0, 2)


# --- boxes -------------------------------------------------------------------------------------------------


@given(st.tuples(LNGS, LNGS), st.tuples(LATS, LATS), st.integers(0, 6))
def test_tiles_in_bbox_are_mercantiles(lngs, lats, z):
    # Rounded, since mercantile takes edges within 1e-11 degrees for equal, and we within 4e-12.
    (west, east), (south, north) = (sorted(round(value, 9) for value in pair) for pair in (lngs, lats))
    found = tiles.tiles_in_bbox(LngLatBbox(west, south, east, north), z)
    assert len(found) == len(set(found))
    if west < east and south < north:
        assert set(found) == {geo_tile(tile) for tile in mercantile.tiles(west, south, east, north, zooms=z)}


@given(st.floats(100, 179), st.floats(-179, -100), st.tuples(LATS, LATS), st.integers(0, 6))
def test_a_box_across_the_antimeridian_is_its_two_halves(west, east, lats, z):
    south, north = sorted(lats)
    found = tiles.tiles_in_bbox(LngLatBbox(west, south, east, north), z)
    left = tiles.tiles_in_bbox(LngLatBbox(west, south, 180, north), z)
    right = tiles.tiles_in_bbox(LngLatBbox(-180, south, east, north), z)
    assert len(found) == len(set(found))
    assert set(found) == set(left) | set(right)
    assert found[0].x == left[0].x  # columns begin in the west


@given(some_tiles())
def test_the_bounds_of_a_tile_give_that_tile(tile):
    assert tiles.tiles_in_bbox(tiles.bounds(tile), tile.z) == [tile]


@given(some_tiles(max_zoom=26), st.integers(0, 3))
def test_the_bounds_of_a_tile_give_its_descendants(tile, deeper):
    z = tile.z + deeper
    assert tiles.tiles_in_bbox(tiles.bounds(tile), z) == list(tiles.descendants(tile, z))


@given(st.floats(-180, 180), ANY_LATS, ZOOMS)
def test_a_box_without_area_gives_the_tile_of_the_point(lng, lat, z):
    assert tiles.tiles_in_bbox(LngLatBbox(lng, lat, lng, lat), z) == [tiles.tile_at(LngLat(lng, lat), z)]


@pytest.mark.parametrize(
    ("west", "east", "columns"),
    [
        (170, -180, [7]),  # touches the antimeridian from the west
        (180, -170, [0]),  # touches it from the east
        (170, 190, [7, 0]),
        (-180, 180, list(range(8))),
        (0, 360, [4, 5, 6, 7, 0, 1, 2, 3]),
        (10, 5, [4, 5, 6, 7, 0, 1, 2, 3]),  # begins and ends in one column, all the way round
        (-1000, 1000, list(range(8))),
    ],
)
def test_columns_of_odd_boxes(west, east, columns):
    found = [tile.x for tile in tiles.tiles_in_bbox(LngLatBbox(west, 1, east, 2), 3)]
    assert (sorted(found) if east == 1000 else found) == columns


@pytest.mark.parametrize("z", range(7))
def test_a_box_over_the_whole_map_has_every_tile_once(z):
    whole = LngLatBbox(-180, -90, 180, 90)
    assert tiles.xy_in_bbox(whole, z).tolist() == tiles.all_xy(z).tolist()


# --- distances ---------------------------------------------------------------------------------------------


def test_known_distances():
    paris, london = LngLat(2.3522, 48.8566), LngLat(-0.1276, 51.5072)
    assert tiles.great_circle_km(paris, london) == pytest.approx(343.5, abs=0.1)
    quarter = math.pi / 2 * tiles.EARTH_RADIUS_KM
    assert tiles.great_circle_km(LngLat(0, 0), LngLat(90, 0)) == pytest.approx(quarter)
    assert tiles.great_circle_km(LngLat(0, 90), LngLat(77, 0)) == pytest.approx(quarter)
    assert tiles.great_circle_km(LngLat(30, 20), LngLat(-150, -20)) == pytest.approx(2 * quarter)
    assert tiles.great_circle_km(LngLat(-179.5, 0), LngLat(179.5, 0)) == pytest.approx(quarter / 90)


@given(LNGS, ANY_LATS, LNGS, ANY_LATS)
@example(-15.7, 41.1, 164.3, -41.1)  # antipodes for which rounding takes the haversine over 1
def test_distances_are_a_metric_of_arrays_too(lng1, lat1, lng2, lat2):
    there = tiles.great_circle_km(LngLat(lng1, lat1), LngLat(lng2, lat2))
    assert 0 <= there <= math.pi * tiles.EARTH_RADIUS_KM
    assert tiles.great_circle_km(LngLat(lng2, lat2), LngLat(lng1, lat1)) == pytest.approx(there, abs=1e-6)
    both = tiles.great_circle_km_array([lng1, lng1], [lat1, lat1], [lng2, lng1], [lat2, lat1])
    assert both == pytest.approx([there, 0.0], abs=1e-6)


@given(some_tiles(max_zoom=20).filter(lambda tile: tile.z >= 1), st.floats(0, 1), st.floats(0, 1))
def test_no_point_of_a_tile_is_farther_than_half_its_diagonal(tile, right, down):
    west, south, east, north = tiles.bounds(tile)
    point = LngLat(west + right * (east - west), north + down * (south - north))
    assert tiles.great_circle_km(tiles.center(tile), point) <= tiles.half_diagonal_km(tile) + 1e-6


# --- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Tile(3, 8, 0), r"tile 3/8/0 is outside zoom 3: x and y must be in \[0, 8\)"),
        (lambda: Tile(3, 0, -1), "tile 3/0/-1 is outside zoom 3"),
        (lambda: Tile(-1, 0, 0), r"zoom -1 does not exist: a zoom must be in \[0, 30\]"),
        (lambda: Tile(31, 0, 0), "zoom 31 does not exist"),
        (lambda: Tile(3, 0.5, 0), "a tile needs whole numbers z, x, y; got 3, 0.5, 0"),
        (lambda: Tile(3, 1, 2)._replace(x=9), "tile 3/9/2 is outside zoom 3"),
        (lambda: tiles.children(Tile(30, 0, 0)), "zoom 32 does not exist"),
        (lambda: tiles.parent(Tile(1, 0, 0)), r"tile 1/0/0 has no parent at zoom -1: .* \[0, 1\]"),
        (lambda: tiles.parent(Tile(4, 0, 0), 5), "tile 4/0/0 has no parent at zoom 5"),
        (lambda: tiles.descendants(Tile(4, 0, 0), 3), "zoom 4 have no descendants at zoom 3, .* coarser"),
        (lambda: tiles.from_quadkey("0124"), "'0124' is no quadkey"),
        (lambda: tiles.from_quadkey("0" * 31), "at most 30 digits"),
        (lambda: tiles.tile_at(LngLat(math.nan, 0), 3), "coordinates must be finite numbers of degrees"),
        (lambda: tiles.centers(3, [(0, 0), (8, 1)]), "tile 3/8/1 is outside zoom 3"),
        (lambda: tiles.centers(3, [(0.0, 1.0)]), r"whole numbers of shape \(n, 2\); got float64 \(1, 2\)"),
        (lambda: tiles.centers(3, [0, 1]), r"whole numbers of shape \(n, 2\); got int64 \(2,\)"),
        (lambda: tiles.all_xy(14), "268435456 tiles of zoom 14 are too many for one array"),
        (lambda: tiles.tiles_in_bbox(LngLatBbox(0, 1, 1, 0), 3), "a box needs south <= north; got south 1"),
        (lambda: tiles.tiles_in_bbox(LngLatBbox(0, 0, math.inf, 1), 3), "coordinates must be finite"),
        (lambda: tiles.tiles_in_bbox(LngLatBbox(-180, -80, 180, 80), 16), "too many for one array"),
    ],
)
def test_errors(call, message):
    with pytest.raises(TileError, match=message):
        call()
