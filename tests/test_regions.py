"""Regions: boxes, polygons and countries, against clipping each tile by itself."""

import json

import numpy as np
import pytest

from geoengine.engine.errors import TileError
from geoengine.engine.regions import RegionError, parse_region
from geoengine.engine.regions.box import Box, Overlap
from geoengine.engine.regions.countries import Land, country
from geoengine.engine.regions.edges import ring_edges
from geoengine.engine.regions.polygons import Polygons
from geoengine.engine.tiles import LngLat, LngLatBbox, all_xy, bounds_array, descendants_xy, xy_at, xy_in_bbox


def clipped_area(ring, box):
    """The area in square degrees of a ring inside a box; Sutherland and Hodgman's clipping."""
    points = [tuple(p) for p in ring[:-1]]
    for axis, limit, sign in ((0, box[0], 1), (1, box[1], 1), (0, box[2], -1), (1, box[3], -1)):
        kept = []
        for a, b in zip(points, points[1:] + points[:1], strict=True):
            da, db = sign * (a[axis] - limit), sign * (b[axis] - limit)
            if da >= 0:
                kept.append(a)
            if (da >= 0) != (db >= 0):
                t = da / (da - db)
                kept.append((a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])))
        points = kept
    x, y = np.array(points).reshape(-1, 2).T
    return abs(float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum())) / 2


def brute_force(z, xy, outer, holes=()):
    """Which tiles a polygon overlaps; longitudes may run past 180."""
    found = np.zeros(len(xy), bool)
    low, high = outer.min(axis=0), outer.max(axis=0)
    for index, box in enumerate(bounds_array(z, xy)):
        for turn in (-360, 0, 360):
            moved = box + np.array([turn, 0, turn, 0])
            if (moved[2:] < low).any() or (moved[:2] > high).any():
                continue
            area = clipped_area(outer, moved) - sum(clipped_area(hole, moved) for hole in holes)
            tile = (box[2] - box[0]) * (box[3] - box[1])
            found[index] |= area > 1e-9 * tile
    return found


def star(rng, middle, radius, corners=12):
    """A ring round a point that turns back and forth but does not cross itself."""
    angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
    reach = radius * rng.uniform(0.2, 1, corners)
    ring = np.array(middle) + np.stack([np.cos(angle), np.sin(angle)], axis=1) * reach[:, None]
    return np.concatenate([ring, ring[:1]])


def region_of(*rings):
    edges = [ring_edges(ring, hole=index > 0) for index, ring in enumerate(rings)]
    return Polygons("made", np.concatenate(edges), of_earth=False)


def rows(xy):
    return {tuple(row) for row in xy.tolist()}


@pytest.mark.parametrize("seed", range(12))
def test_tiles_of_a_polygon_are_those_that_clipping_finds(seed):
    rng = np.random.default_rng(seed)
    middle = (rng.uniform(-175, 175), rng.uniform(-70, 70))
    ring = star(rng, middle, rng.uniform(1, 40))
    if seed % 2:
        ring = ring[::-1]
    ring[:, 1] = np.clip(ring[:, 1], -90, 90)
    region = region_of(ring)
    for z in (2, 4):
        expected = brute_force(z, all_xy(z), ring)
        assert rows(region.tiles(z)) == rows(all_xy(z)[expected])
        np.testing.assert_array_equal(region.intersects(z, all_xy(z)), expected)


@pytest.mark.parametrize("seed", range(6))
def test_deep_tiles_at_the_border_are_told_exactly(seed):
    rng = np.random.default_rng(100 + seed)
    ring = star(rng, (rng.uniform(-30, 30) + 180 * (seed % 2), rng.uniform(-60, 60)), 3)
    hole = star(rng, ring[:-1].mean(axis=0), 0.2)
    region = region_of(ring, hole)
    z = 12
    at = np.concatenate([ring, hole, ring[:-1].mean(axis=0)[None]])
    near = xy_at(at[:, 0], at[:, 1], z - 2)
    xy = descendants_xy(near, z - 2, z)
    expected = brute_force(z, xy, ring, [hole])
    assert 0.02 < expected.mean() < 0.98
    np.testing.assert_array_equal(region.intersects(z, xy), expected)


@pytest.mark.parametrize("z", [4, 9, 10, 11, 12])
def test_listing_and_telling_agree(z):
    ring = star(np.random.default_rng(7), (179.5, 30.0), 2.5)
    region = region_of(ring)
    box = Box(LngLatBbox(176, 26, -176, 34))
    around = box.tiles(z)
    assert rows(region.tiles(z)) == rows(around[region.intersects(z, around)])


def test_a_polygon_on_the_grid_is_its_tiles_and_no_more():
    box = bounds_array(6, [(20, 30)])[0]
    west, south, east, north = box
    ring = np.array([(west, south), (east, south), (east, north), (west, north), (west, south)])
    for turned in (ring, ring[::-1]):
        region = region_of(turned)
        assert rows(region.tiles(6)) == {(20, 30)}
        assert rows(region.tiles(8)) == rows(descendants_xy([(20, 30)], 6, 8))
        around = xy_in_bbox(LngLatBbox(west - 1, south - 1, east + 1, north + 1), 12)
        assert rows(around[region.intersects(12, around)]) == rows(descendants_xy([(20, 30)], 6, 12))


def test_polygons_that_overlap_are_one_and_a_hole_is_left_out():
    def square(west, south, side):
        return np.array(
            [
                (west, south),
                (west + side, south),
                (west + side, south + side),
                (west, south + side),
                (west, south),
            ],
            float,
        )

    edges = [ring_edges(square(0, 0, 20), hole=False), ring_edges(square(10, 10, 20), hole=False)]
    both = Polygons("both", np.concatenate(edges), of_earth=False)
    parts = [region_of(square(0, 0, 20)), region_of(square(10, 10, 20))]
    assert rows(both.tiles(7)) == rows(parts[0].tiles(7)) | rows(parts[1].tiles(7))
    ring = region_of(square(0, 0, 20), square(5, 5, 10))
    assert not ring.intersects(14, xy_at([10.0], [10.0], 14))[0]
    assert ring.intersects(14, xy_at([2.0], [10.0], 14))[0]


def test_a_polygon_beyond_the_maps_edge():
    cap = np.array([(-180, 70), (180, 70), (180, 90), (-180, 90), (-180, 70)], float)
    xy = all_xy(4)
    np.testing.assert_array_equal(region_of(cap).intersects(4, xy), brute_force(4, xy, cap))


# --- boxes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["5,45,10,48", "170,-20,-170,-10", "-180,-90,180,90", "-10.5,35,4.25,44"])
def test_a_box(text):
    box = parse_region(text)
    assert box.name == text and not box.of_earth
    west, south, east, north = map(float, text.split(","))
    for z in (3, 6):
        listed = rows(box.tiles(z))
        assert listed == rows(xy_in_bbox(LngLatBbox(west, south, east, north), z))
        assert rows(all_xy(z)[box.intersects(z, all_xy(z))]) == listed


def test_what_two_regions_have_in_common():
    overlap = Overlap(parse_region("0,40,20,50"), parse_region("10,45,30,60"))
    assert rows(overlap.tiles(8)) == rows(parse_region("10,45,20,50").tiles(8))
    assert overlap.name == "0,40,20,50, 10,45,30,60"


# --- countries and land -----------------------------------------------------------------------------------


PLACES = {
    "FR": [(2.35, 48.86), (9.15, 42.15), (-52.33, 4.92)],  # Paris, Corsica, Cayenne
    "FJI": [(178.44, -18.14), (-179.9, -16.8)],  # on both sides of the antimeridian
    "ru": [(37.62, 55.75), (-172.0, 66.5)],
    "AQ": [(0.0, -80.0), (100.0, -84.0), (-90.0, -80.0)],
    "VAT": [(12.4534, 41.9033)],
    "ZAF": [(28.05, -26.2)],
}


@pytest.mark.parametrize("code", PLACES)
def test_countries_hold_their_places(code):
    region = country(code)
    for lng, lat in PLACES[code]:
        for z in (6, 10, 14):
            assert region.intersects(z, xy_at([lng], [lat], z))[0], (code, lng, lat, z)
    for lng, lat in ((-40.0, 30.0), (28.2, -29.5)):  # the ocean; Lesotho, which is a hole in South Africa
        assert not region.intersects(12, xy_at([lng], [lat], 12))[0]


def test_no_country_spreads_round_the_world():
    assert len(country("RU").tiles(4)) < 40
    assert len(country("FJ").tiles(6)) < 8
    assert country("RU").of_earth and country("RU").name == "RU (Russia)"


def test_land_is_land_with_a_margin_and_without_antarctica():
    land = Land()
    counts = [len(land.tiles(z)) for z in (4, 6, 8)]
    assert counts == sorted(counts) and 130 < counts[0] < 256 and 15_000 < counts[2] < 25_000
    places = np.array([(2.35, 48.86), (-157.86, 21.31), (0.0, -80.0), (-25.0, -30.0)])  # the last: an ocean
    for z in (8, 10, 13):
        assert land.intersects(z, xy_at(*places.T, z)).tolist() == [True, True, False, False]
    france = country("FR")
    inside = rows(france.tiles(8))
    margin = {(x + i, y + j) for x, y in inside for i in (-1, 0, 1) for j in (-1, 0, 1)}
    assert margin <= rows(land.tiles(8))
    fine = land.tiles(11)
    assert len(fine) == 4 * len(land.tiles(10)) and land.intersects(11, fine).all()
    assert (np.lexsort((fine[:, 1], fine[:, 0])) == np.arange(len(fine))).all()
    with pytest.raises(TileError, match="too many for one array"):
        land.tiles(16)


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1,2,3", "is no region: a region is a box"),
        ("1,2,3,x", "is no box"),
        ("1,5,3,4", "needs -90 <= south < north <= 90"),
        ("1,2,181,4", "longitudes from -180 to 180"),
        ("1,2,1,4", "different longitudes"),
        ("nan,2,1,4", "finite"),
        ("QQ", "no borders for a country with the ISO 3166 code QQ; there are AD AE"),
        ("Atlantis", "is no region"),
        ("nowhere.geojson", "cannot be read"),
    ],
)
def test_a_region_that_cannot_be_understood(text, sentence):
    with pytest.raises(RegionError, match=sentence.replace("(", r"\(")):
        parse_region(text)


SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda polygon: polygon,
        lambda polygon: {"type": "Feature", "properties": {}, "geometry": polygon},
        lambda polygon: {"type": "GeometryCollection", "geometries": [polygon, {"type": "Point"}]},
        lambda polygon: {"type": "MultiPolygon", "coordinates": [polygon["coordinates"]]},
        lambda polygon: {
            "type": "FeatureCollection",
            "features": [{"type": "Feature", "geometry": polygon}, {"type": "Feature", "geometry": None}],
        },
    ],
)
def test_geojson_of_every_kind(tmp_path, wrap):
    file = tmp_path / "area.geojson"
    file.write_text(json.dumps(wrap({"type": "Polygon", "coordinates": [SQUARE]})))
    region = parse_region(str(file))
    assert region.name == "area.geojson"
    assert rows(region.tiles(6)) == rows(xy_in_bbox(LngLatBbox(0, 0, 10, 10), 6))
    assert region.intersects(16, xy_at(*LngLat(5.0, 5.0), 16))[0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is no JSON file"),
        ("[" * 100_000, "is no JSON file"),
        ("[]", 'an object with a "type" is needed'),
        ('{"type": "Point", "coordinates": [0, 0]}', "has no polygon"),
        ('{"type": "Polygon"}', '"coordinates" must be an array'),
        ('{"type": "Polygon", "coordinates": [5]}', "a list of positions"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]}', "at least three corners"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, 91], [2, 0]]]}', "latitudes are from -90 to 90"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, "a"], [2, 0]]]}', "a list of positions"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, null], [2, 0]]]}', "must be degrees"),
    ],
)
def test_geojson_that_cannot_be_used(tmp_path, text, sentence):
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(RegionError, match=sentence):
        parse_region(str(file))
