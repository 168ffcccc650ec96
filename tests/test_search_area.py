"""Searches of a part of the world, and over the levels that a source has."""

import dataclasses
import io
import json

import jsonschema
import numpy as np
import pytest
from command_line import refused, run
from fakes import AddressTiles, HostEncoders, Oracle
from made_results import made_location

from geoengine.engine.engine import GeoEngine
from geoengine.engine.errors import SourceError
from geoengine.engine.regions import RegionError, parse_region
from geoengine.engine.render.json_lines import json_object, schema_text
from geoengine.engine.render.table import table_text
from geoengine.engine.search import SearchConfig, search
from geoengine.engine.tiles import LngLat, LngLatBbox, Tile, tile_at, xy_in_bbox

BOX = LngLatBbox(170, -20, -160, 30)  # across the antimeridian


def find(source, levels, lng, lat, *, k=3, within=None):
    oracle = Oracle(levels)
    config = SearchConfig(k=k, levels=levels, within=within)
    photos = oracle.photos(np.atleast_1d(lng), np.atleast_1d(lat))
    return search(photos, source, HostEncoders(oracle.encode), config)


def test_every_level_stays_inside_the_region():
    source = AddressTiles()
    found = find(
        source, (4, 6, 8), [175.0, -165.0, 10.0], [10.0, -10.0, 50.0], within=parse_region("170,-20,-160,30")
    )
    for zoom, read in source.reads:
        wanted = {tuple(row) for row in xy_in_bbox(BOX, zoom).tolist()}
        assert set(read) <= wanted
        assert zoom > 4 or set(read) == wanted
    for levels, lng, lat in zip(found, (175.0, -165.0), (10.0, -10.0), strict=False):
        assert levels[-1].beam[0].tile == tile_at(LngLat(lng, lat), 8)
    assert [level.missing for level in found[2]] == [0, 0, 0], "what lies outside is not missing"


def test_a_search_can_start_deep_inside_a_region():
    within = parse_region("6.5,46.3,6.7,46.4")
    source = AddressTiles()
    [levels] = find(source, (12, 14), 6.61, 46.35, within=within)
    assert levels[-1].beam[0].tile == tile_at(LngLat(6.61, 46.35), 14)
    assert levels[0].candidates == len(within.tiles(12)) < 20


def test_only_levels_that_the_source_has_are_searched():
    source = AddressTiles()
    source.min_zoom, source.max_zoom = 5, 9
    [levels] = find(source, (4, 6, 8, 10), 30.0, 20.0)
    assert [level.zoom for level in levels] == [6, 8]
    assert {zoom for zoom, _ in source.reads} == {6, 8}
    with pytest.raises(SourceError, match="addresses has zooms 5 to 9, none of the levels 10, 12"):
        find(source, (10, 12), 30.0, 20.0)


def test_only_tiles_inside_the_sources_bounds_are_asked_for():
    source = AddressTiles()
    source.bounds = LngLatBbox(5.0, 45.0, 10.0, 48.0)
    find(source, (10, 12), 7.0, 46.0)
    for zoom, read in source.reads:
        assert set(read) <= {tuple(row) for row in xy_in_bbox(source.bounds, zoom).tolist()}
    source.reads.clear()
    find(source, (10,), 7.0, 46.0, within=parse_region("9,40,20,46"))
    assert set(source.reads[0][1]) == {
        tuple(row) for row in xy_in_bbox(LngLatBbox(9.0, 45.0, 10.0, 46.0), 10).tolist()
    }


def test_a_region_without_tiles_is_named():
    source = AddressTiles(missing=lambda z, x, y: np.ones(len(x), bool))
    with pytest.raises(SourceError, match="no tile of zoom 4, the first level within 1,2,3,4"):
        find(source, (4, 6), 2.0, 3.0, within=parse_region("1,2,3,4"))


# --- results and the command line -------------------------------------------------------------------------


def test_results_say_where_was_searched_and_what_was_left_out():
    whole = made_location()
    part = dataclasses.replace(whole, within="FR (France)", left_out=(4, 6))
    schema = jsonschema.Draft202012Validator(json.loads(schema_text()))
    for location in (whole, part):
        schema.validate(json_object(location))
    assert (json_object(whole)["within"], json_object(whole)["levels_left_out"]) == ("", [])
    assert (json_object(part)["within"], json_object(part)["levels_left_out"]) == ("FR (France)", [4, 6])
    text = table_text([part], io.StringIO())
    assert "search within FR (France): k=4" in text and "without zoom 4, 6, which it does not have" in text
    assert "within" not in table_text([whole], io.StringIO())


def test_the_planet_is_searched_within_a_box():
    pixels = np.full((32, 32, 3), 90, np.uint8)
    config = SearchConfig(k=2, levels=(4, 6), within=parse_region("10,10,30,30"))
    with GeoEngine.open("planet", threads=1) as engine:
        [location] = engine.locate([pixels], config=config)
        assert location.within == "10,10,30,30" and location.left_out == ()
        assert location.candidates[0].tile[1:] in {tuple(row) for row in config.within.tiles(6).tolist()}
        assert location.levels[0].candidates == len(config.within.tiles(4))
        with pytest.raises(
            RegionError, match=r"FR \(France\) is on Earth, and the planet is not: give a box"
        ):
            engine.locate([pixels], config=dataclasses.replace(config, within=parse_region("FR")))


def test_the_command_line_takes_a_region(tmp_path):
    from PIL import Image

    photo = tmp_path / "photo.png"
    Image.new("RGB", (32, 32), (90, 120, 60)).save(photo)
    area = tmp_path / "area.geojson"
    ring = [[-60, -10], [-50, -10], [-50, 0], [-60, -10]]
    area.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    arguments = ["locate", photo, "--demo", "--k", 1, "--levels", "4,6", "--json", "--within"]
    answer = json.loads(run(*arguments, area).stdout)
    assert answer["within"] == "area.geojson"
    tile = Tile(*(answer["candidates"][0][key] for key in "zxy"))
    assert tuple(tile[1:]) in {tuple(row) for row in parse_region(str(area)).tiles(6).tolist()}
    assert json.loads(run(*arguments, "-60,-10,-50,0").stdout)["within"] == "-60,-10,-50,0"
    refused(run(*arguments, "Atlantis"), "'Atlantis' is no region: a region is a box west,south,east,north")


def test_a_region_beyond_the_map_has_no_tiles(tmp_path):
    file = tmp_path / "cap.geojson"
    file.write_text(json.dumps({"type": "Polygon", "coordinates": [[[0, 86], [10, 86], [10, 89], [0, 86]]]}))
    with pytest.raises(SourceError, match=r"no tile of zoom 4, the first level within cap\.geojson"):
        find(AddressTiles(), (4, 6), 2.0, 3.0, within=parse_region(str(file)))
