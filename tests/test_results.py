import dataclasses
import io
import itertools
import json

import jsonschema
import pytest
from made_results import made_location

from geoengine.engine.render.geojson import feature_collection, geojson_text
from geoengine.engine.render.json_lines import json_lines, json_object, schema_text
from geoengine.engine.render.table import format_km, printable, table_text
from geoengine.engine.results import HYPOTHESIS, ExifComparison, Level
from geoengine.engine.tiles import Tile, bounds

EARTH = {"world": "earth", "lng": 179.999, "lat": -16.5}


@pytest.fixture(scope="module")
def validator():
    schema = json.loads(schema_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_coverage_is_the_share_of_wanted_tiles_that_exist():
    level = Level(zoom=4, candidates=192, missing=64, beam=())
    assert level.coverage == 0.75
    assert dataclasses.replace(level, candidates=0, missing=0).coverage == 0.0


def test_results_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        made_location().score = 1.0


@pytest.mark.parametrize("exif", [None, ExifComparison(distance_km=12.3), ExifComparison(distance_km=None)])
@pytest.mark.parametrize("where", [{}, EARTH, {"levels": (3, 4, 9)}])
def test_json_obeys_the_schema(validator, where, exif):
    validator.validate(json_object(made_location(exif=exif, **where)))


def test_the_schema_refuses_unknown_and_missing_fields(validator):
    record = json_object(made_location())
    assert not validator.is_valid(record | {"latitude_deg": 1.0})
    assert not validator.is_valid({key: value for key, value in record.items() if key != "world"})
    assert not validator.is_valid(record | {"latitude": 86})


def test_json_says_where_and_in_which_world():
    record = json_object(made_location())
    assert record["world"] == "planet"
    assert record["latitude"] == pytest.approx(37.3, abs=0.01)
    assert record["longitude"] == pytest.approx(-148.2, abs=0.01)
    assert (record["candidates"][0]["z"], len(record["candidates"][0]["path"])) == (16, 7)
    assert record["levels"][0]["coverage"] == round(254 / 256, 6)
    assert record["note"] == HYPOTHESIS
    assert "exif" not in record


def test_json_has_one_line_per_photo_and_only_ascii():
    text = json_lines([made_location("Zürich\n\udcff.jpg"), made_location("b.jpg")])
    assert text.isascii()
    assert [json.loads(line)["photo"] for line in text.splitlines()] == ["Zürich\n\udcff.jpg", "b.jpg"]


def test_json_refuses_numbers_that_json_lacks():
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_lines([dataclasses.replace(made_location(), score=float("nan"))])


def test_exif_distances_mean_something_on_earth_only():
    exif = ExifComparison(distance_km=12.34567)
    assert json_object(made_location(exif=exif))["exif"] == {"distance_km": 12.346, "meaningful": False}
    assert json_object(made_location(exif=exif, **EARTH))["exif"]["meaningful"] is True
    untagged = json_object(made_location(exif=ExifComparison(distance_km=None), **EARTH))
    assert untagged["exif"] == {"distance_km": None, "meaningful": False}


def test_geojson_has_the_candidates_then_the_beams():
    location = made_location()
    collection = feature_collection([location])
    kinds = [feature["properties"]["kind"] for feature in collection["features"]]
    beam = sum(len(level.beam) for level in location.levels)
    assert kinds == ["candidate"] * 3 + ["beam"] * beam
    assert collection["type"] == "FeatureCollection"
    assert {feature["properties"]["world"] for feature in collection["features"]} == {"planet"}
    first, second = collection["features"][:2]
    assert first["properties"]["radius_km"] == 1.25
    assert "radius_km" not in second["properties"]


def test_geojson_positions_are_longitude_then_latitude():
    location = made_location()
    [lng, lat] = feature_collection([location])["features"][0]["geometry"]["coordinates"]
    assert (lng, lat) == pytest.approx((location.point.lng, location.point.lat), abs=1e-7)


def test_geojson_rings_are_closed_and_counter_clockwise():
    for feature in feature_collection([made_location(), made_location(**EARTH)])["features"]:
        if feature["geometry"]["type"] == "Polygon":
            [ring] = feature["geometry"]["coordinates"]
            assert ring[0] == ring[-1] and len(ring) == 5
            doubled_area = sum(a[0] * b[1] - b[0] * a[1] for a, b in itertools.pairwise(ring))
            assert doubled_area > 0, "RFC 7946 3.1.6: exterior rings run counter-clockwise"


def test_geojson_polygons_end_at_the_antimeridian():
    location = made_location(**EARTH)
    edge = [t.tile for level in location.levels for t in level.beam if t.tile.x == 2**t.tile.z - 1]
    assert edge, "the point lies in the last column"
    rings = {
        feature["properties"]["tile"]: feature["geometry"]["coordinates"][0]
        for feature in feature_collection([location])["features"]
        if feature["properties"]["kind"] == "beam"
    }
    for tile in edge:
        longitudes = {position[0] for position in rings[str(tile)]}
        assert longitudes == {round(bounds(tile).west, 7), 180.0}
    for ring in rings.values():
        assert max(p[0] for p in ring) - min(p[0] for p in ring) <= 22.5


def test_geojson_text_is_json_without_nan():
    assert json.loads(geojson_text([made_location()]))["note"] == HYPOTHESIS
    with pytest.raises(ValueError, match="not JSON compliant"):
        geojson_text([dataclasses.replace(made_location(), radius_km=float("inf"))])


def test_geojson_carries_the_distance_to_the_tag_only_when_asked():
    exif = ExifComparison(distance_km=2.0)
    [with_tag] = feature_collection([made_location(exif=exif, top=1)])["features"][:1]
    [without] = feature_collection([made_location(top=1)])["features"][:1]
    assert with_tag["properties"]["exif"] == {"distance_km": 2.0, "meaningful": False}  # on the planet
    assert "exif" not in without["properties"]


def test_the_table_shows_answer_candidates_path_and_world():
    location = made_location()
    text = table_text([location], io.StringIO())
    assert "harbour.jpg  [demo planet, not Earth]" in text
    assert "37.29809, -148.19733  ± 1.2 km (uncalibrated)" in text
    assert "60.0%" in text and f"   {location.candidates[2].tile} " in text
    assert "path: z4 0.500  z6 0.500" in text
    assert "1778 tiles of planet (14 more do not exist there)" in text
    assert HYPOTHESIS in text
    assert "\x1b" not in text, "no colours outside a terminal"


def test_the_table_names_whom_the_tiles_are_from():
    text = table_text([made_location(attribution="© [bold]Contributors", **EARTH)], io.StringIO())
    assert "Tiles: © [bold]Contributors" in text
    assert "demo planet" not in text


def test_the_table_says_when_a_distance_to_the_tag_means_nothing():
    exif = ExifComparison(distance_km=8000.0)
    planet = table_text([made_location(exif=exif)], io.StringIO())
    assert "8,000 km from the answer, which means nothing" in planet
    earth = table_text([made_location(exif=exif, **EARTH)], io.StringIO())
    assert "GPS tag: 8,000 km from the answer\n" in earth
    none = table_text([made_location(exif=ExifComparison(distance_km=None))], io.StringIO())
    assert "GPS tag: none in this photo" in none


def test_a_file_name_cannot_steer_the_terminal():
    text = table_text([made_location("a\x1b[2J\n[bold]b.jpg")], io.StringIO())
    assert "\x1b" not in text
    assert r"a\x1b[2J\n[bold]b.jpg" in text
    assert printable("Zürich 東京.jpg") == "Zürich 東京.jpg"


def test_no_results_make_an_empty_table():
    assert table_text([], io.StringIO()) == ""


@pytest.mark.parametrize(
    ("km", "text"), [(0.0123, "12 m"), (1.25, "1.2 km"), (99.94, "99.9 km"), (12345.6, "12,346 km")]
)
def test_distances_are_short(km, text):
    assert format_km(km) == text


def test_made_up_paths_are_consistent():
    # What the tests above stand on: each tile of a path contains the next.
    for candidate in made_location().candidates:
        for outer, inner in zip(candidate.path, candidate.path[1:], strict=False):
            gap = inner.tile.z - outer.tile.z
            assert outer.tile == Tile(outer.tile.z, inner.tile.x >> gap, inner.tile.y >> gap)
