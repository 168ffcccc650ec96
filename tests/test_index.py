"""Building tile indexes: complete, resumable, and refused where they do not fit."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from fakes import AddressTiles, HostEncoders, addresses

from geoengine.engine.bundle import EngineBundle
from geoengine.engine.index import building as building_module
from geoengine.engine.index.building import build_index, merge_indexes
from geoengine.engine.index.errors import TileIndexError
from geoengine.engine.index.sampling import compare_sample
from geoengine.engine.index.segments import tile_ids
from geoengine.engine.index.tile_index import TileIndex
from geoengine.engine.regions import parse_region
from geoengine.engine.regions.countries import Land
from geoengine.engine.tiles import all_xy

D = 6


class Encoder(HostEncoders):
    """A backend whose embeddings are drawn from the tile's address; may fail after some pictures."""

    name, variant, batch = "made", "fp32", 32

    def __init__(self, fails_after=None):
        self.encoded, self.fails_after = [], fails_after

    def encode(self, encoder, pixels):
        if self.fails_after is not None and len(self.encoded) >= self.fails_after:
            raise KeyboardInterrupt
        self.encoded += map(tuple, addresses(pixels).tolist())
        return embeddings(encoder, addresses(pixels))


def embeddings(encoder, tiles):
    rows = np.stack([np.random.default_rng([int(encoder[1:]), *np.abs(t)]).normal(size=D) for t in tiles])
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def bundle():
    opened = EngineBundle.open("planet", verify=False)
    return replace(opened, manifest=replace(opened.manifest, embed_dim=D, weights="a" * 64))


def with_weights(bundle, weights):
    return replace(bundle, manifest=replace(bundle.manifest, weights=weights))


def some_missing(z, x, y):
    return (x + 2 * y) % 7 == 0


def assert_level(index, zoom, xy, *, missing=some_missing):
    lacks = missing(zoom, xy[:, 0], xy[:, 1])
    [segment] = index.segments[zoom]
    segment.check()
    assert segment.ids.tolist() == sorted(tile_ids(xy[~lacks]).tolist())
    assert segment.missing.tolist() == sorted(tile_ids(xy[lacks]).tolist())
    there = xy[~lacks][np.argsort(tile_ids(xy[~lacks]))]
    expected = embeddings(f"z{zoom:02d}", np.column_stack([np.full(len(there), zoom), there]))
    np.testing.assert_array_equal(segment.rows, expected.astype(np.float16))


def test_an_index_has_every_tile_or_knows_that_it_is_missing(tmp_path, bundle):
    calls = []
    source = AddressTiles(missing=some_missing, shuffle=3)
    index = build_index(
        tmp_path, bundle, source, Encoder(), zooms=(4, 6), progress=lambda *call: calls.append(call)
    )
    for zoom in (4, 6):
        assert_level(index, zoom, all_xy(zoom))
    assert index.description.complete == (4, 6)
    assert calls[0] == (4, 0, 256) and (4, 256, 256) in calls and calls[-1] == (6, 4096, 4096)
    assert sorted(path.name for path in tmp_path.rglob("*.rows")) == ["z04.rows", "z06.rows"]


def test_an_index_of_land_within_a_region(tmp_path, bundle):
    area = parse_region("-50,20,20,60")
    index = build_index(tmp_path, bundle, AddressTiles(), Encoder(), zooms=(6,), area=area, land=True)
    wanted = area.tiles(6)[Land().intersects(6, area.tiles(6))]
    assert 10 < len(wanted) < len(area.tiles(6))
    assert_level(index, 6, wanted, missing=lambda z, x, y: np.zeros(len(x), bool))
    assert [str(known) for known in index.description.areas] == ["land within -50,20,20,60"]


@pytest.mark.parametrize("encoded", [1, 70, 300])
def test_an_interrupted_build_goes_on(tmp_path, bundle, monkeypatch, encoded):
    monkeypatch.setattr(building_module, "TILES_PER_PART", 100)
    source = AddressTiles(missing=some_missing)
    first = Encoder(fails_after=encoded)
    with pytest.raises(KeyboardInterrupt):
        build_index(tmp_path, bundle, source, first, zooms=(4, 6))
    assert 4 not in TileIndex(tmp_path).description.complete or encoded == 300
    second = Encoder()
    index = build_index(tmp_path, bundle, source, second, zooms=(4, 6))
    for zoom in (4, 6):
        assert_level(index, zoom, all_xy(zoom))
    total = sum(len(segment.ids) for level in index.segments.values() for segment in level)
    rest = total - len(first.encoded)
    assert rest <= len(second.encoded) <= rest + building_module.TILES_PER_PART


def test_more_levels_are_added_and_what_is_there_is_not_built_again(tmp_path, bundle):
    build_index(tmp_path, bundle, AddressTiles(), Encoder(), zooms=(4,))
    encoder = Encoder()
    index = build_index(tmp_path, bundle, AddressTiles(), encoder, zooms=(4, 6))
    assert {tile[0] for tile in encoder.encoded} == {6}
    assert index.description.complete == (4, 6)


def test_what_a_killed_process_left_half_written_is_swept_up(tmp_path, bundle):
    (tmp_path / "parts").mkdir()
    old, young = tmp_path / "parts" / ".z04-0.rows.ab.tmp", tmp_path / ".z04.rows.cd.tmp"
    for file in (old, young):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    build_index(tmp_path, bundle, AddressTiles(), Encoder(), zooms=(4,))
    assert not old.exists() and young.exists()


BUILD_AND_WAIT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_index as t
from dataclasses import replace
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.index import building
building.TILES_PER_PART = 64
class Slow(t.Encoder):
    def encode(self, encoder, pixels):
        time.sleep(0.02)
        print("encoded", flush=True)
        return super().encode(encoder, pixels)
opened = EngineBundle.open("planet", verify=False)
bundle = replace(opened, manifest=replace(opened.manifest, embed_dim=t.D, weights="a" * 64))
t.build_index(Path(sys.argv[2]), bundle, t.AddressTiles(missing=t.some_missing), Slow(), zooms=(6,))
"""


def test_a_killed_build_leaves_an_index_that_goes_on_and_holds_no_lock(tmp_path, bundle):
    """And while it runs, nobody else builds into its folder."""
    command = [sys.executable, "-c", BUILD_AND_WAIT, os.path.dirname(__file__), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        for _ in range(12):
            assert process.stdout.readline() == "encoded\n"
        with pytest.raises(TileIndexError, match="another process builds this index"):
            build_index(tmp_path, bundle, AddressTiles(missing=some_missing), Encoder(), zooms=(6,))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    parts = len(list((tmp_path / "parts").glob("z06-*.rows")))
    assert parts >= 2
    encoder = Encoder()
    index = build_index(tmp_path, bundle, AddressTiles(missing=some_missing), encoder, zooms=(6,))
    assert_level(index, 6, all_xy(6))
    assert len(encoder.encoded) <= len(index.segments[6][0].ids) - (parts - 1) * 50


def test_opening_reads_no_rows(tmp_path, bundle):
    index = build_index(tmp_path, bundle, AddressTiles(), Encoder(), zooms=(6,))
    [segment] = index.segments[6]
    with segment.path.open("r+b") as file:  # what is not read is not seen to be damaged
        file.seek(-100, os.SEEK_END)
        file.write(bytes(100))
    assert TileIndex(tmp_path).table(6, None).matrix.shape == (4096, D)


# --- which tables a search gets ---------------------------------------------------------------------------


def test_tables_of_an_index_of_the_world(tmp_path, bundle):
    index = build_index(tmp_path, bundle, AddressTiles(missing=some_missing), Encoder(), zooms=(6,))
    whole = index.table(6, None)
    assert whole.rows is None and len(whole.ids) + whole.missing == 4096
    area = parse_region("0,0,40,40")
    part = index.table(6, area)
    assert set(whole.ids[part.rows].tolist()) | set(tile_ids(area.tiles(6)).tolist()) == set(
        tile_ids(area.tiles(6)).tolist()
    )
    assert len(part.rows) + part.missing == len(area.tiles(6))
    assert index.table(4, None) is None


def test_tables_of_an_index_of_a_region(tmp_path, bundle):
    area = parse_region("0,0,40,40")
    index = build_index(tmp_path, bundle, AddressTiles(), Encoder(), zooms=(6,), area=area)
    assert index.table(6, None) is None, "it does not know the rest of the world"
    assert index.table(6, parse_region("30,30,50,50")) is None
    assert len(index.table(6, parse_region("10,10,20,20")).rows) == len(parse_region("10,10,20,20").tiles(6))
    assert len(index.table(6, area).rows) == len(area.tiles(6))


def test_tables_of_an_index_of_land(tmp_path, bundle):
    index = build_index(tmp_path, bundle, AddressTiles(), Encoder(), zooms=(6,), land=True)
    assert len(index.table(6, None).ids) == len(Land().tiles(6))
    area = parse_region("-30,-40,30,40")  # with sea
    table = index.table(6, area)
    assert 0 < len(table.rows) < len(area.tiles(6)) and table.missing == 0
    assert index.table(6, parse_region("-125,-50,-110,-45")) is None, "nothing but sea: the beam goes there"


# --- what is refused --------------------------------------------------------------------------------------


def test_an_index_of_other_encoders_or_tiles_is_refused_by_hash(tmp_path, bundle):
    index = build_index(tmp_path, bundle, AddressTiles(), Encoder(), zooms=(4,))
    index.check_fits(bundle, AddressTiles())
    renamed = AddressTiles()
    renamed.name = "another name"
    index.check_fits(bundle, renamed)
    with pytest.raises(TileIndexError, match=r"embeddings of another encoder: it was built with planet-vit"):
        index.check_fits(with_weights(bundle, "b" * 64), AddressTiles())
    other = AddressTiles()
    other.identity = "others"
    with pytest.raises(TileIndexError, match="embeddings of other tiles: it was built from addresses"):
        index.check_fits(bundle, other)


def test_a_folder_with_another_index_is_not_built_into(tmp_path, bundle):
    build_index(tmp_path, bundle, AddressTiles(), Encoder(), zooms=(4,))
    other = AddressTiles()
    other.identity = "others"
    half = Encoder()
    half.variant = "fp16"
    for changed, sentence in (
        ({"bundle": with_weights(bundle, "b" * 64)}, "an index of another encoder"),
        ({"source": other}, "an index of other tiles"),
        ({"backend": half}, "an index of another variant"),
        ({"land": True}, "holds an index of all tiles, not of land"),
        ({"area": parse_region("1,2,3,4")}, "not of all tiles within 1,2,3,4"),
    ):
        arguments = {"bundle": bundle, "source": AddressTiles(), "backend": Encoder(), "zooms": (4,)}
        with pytest.raises(TileIndexError, match=sentence):
            build_index(tmp_path, **(arguments | changed))


def test_zooms_and_sources_that_cannot_be_indexed(tmp_path, bundle):
    def build(source, zooms):
        build_index(tmp_path / "index", bundle, source, Encoder(), zooms=zooms)

    shallow = AddressTiles()
    shallow.max_zoom = 5
    with pytest.raises(TileIndexError, match="addresses has no tiles of zoom 6, only 0 to 5"):
        build(shallow, (6,))
    with pytest.raises(TileIndexError, match="no map encoder for zoom 5: the engine bundle has levels 4, 6"):
        build(AddressTiles(), (5,))
    private = AddressTiles()
    private.storable = False
    with pytest.raises(TileIndexError, match="the terms of addresses forbid"):
        build(private, (4,))
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "is no tile index"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"schema": 9}'), "reads schema 1, got 9"),
        (lambda folder: (folder / "manifest.json").write_text('{"schema": 1}'), "cannot be used"),
        (lambda folder: (folder / "z04.rows").unlink(), "z04.rows is missing"),
        (lambda folder: (folder / "z04.rows").write_bytes(b""), "is no file of a tile index"),
        (lambda folder: (folder / "z04.rows").rename(folder / "z06.rows"), "belongs to another tile index"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, bundle, damage, sentence):
    build_index(tmp_path, bundle, AddressTiles(), Encoder(), zooms=(4,))
    damage(tmp_path)
    with pytest.raises(TileIndexError, match=sentence):
        TileIndex(tmp_path)


def test_a_manifest_with_a_wrong_field_is_refused(tmp_path, bundle):
    build_index(tmp_path, bundle, AddressTiles(), Encoder(), zooms=(4,))
    data = json.loads((tmp_path / "manifest.json").read_text())
    data["maker"]["width"] = "6"
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(TileIndexError, match='"width" must be of type int'):
        TileIndex(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path, bundle):
    (tmp_path / "file").write_text("")
    with pytest.raises(TileIndexError, match="cannot be written"):
        build_index(tmp_path / "file" / "index", bundle, AddressTiles(), Encoder(), zooms=(4,))


def test_an_index_is_compared_with_the_tiles_of_today(tmp_path, bundle):
    index = build_index(tmp_path, bundle, AddressTiles(), Encoder(), zooms=(4, 6))
    compared, least = compare_sample(index, AddressTiles(), Encoder(), 40)
    assert compared == 80 and least > 0.999
    with pytest.raises(TileIndexError, match=r"has no tile 4/\d+/\d+ any more"):
        compare_sample(index, AddressTiles(missing=some_missing), Encoder(), 40)
    with pytest.raises(TileIndexError, match=r"tile 4/\d+/\d+ has another embedding now"):
        compare_sample(index, AddressTiles(ocean=some_missing), Encoder(), 40)


# --- merging ----------------------------------------------------------------------------------------------


def test_indexes_of_different_levels_are_merged(tmp_path, bundle):
    build_index(tmp_path / "a", bundle, AddressTiles(), Encoder(), zooms=(4,))
    build_index(tmp_path / "b", bundle, AddressTiles(), Encoder(), zooms=(6,))
    merged = merge_indexes(tmp_path / "both", [tmp_path / "a", tmp_path / "b"])
    assert merged.description.complete == (4, 6)
    for zoom in (4, 6):
        assert_level(merged, zoom, all_xy(zoom), missing=lambda z, x, y: np.zeros(len(x), bool))


def test_indexes_of_different_regions_are_merged(tmp_path, bundle):
    west, east = parse_region("0,0,20,20"), parse_region("20,0,40,20")
    for name, area, zooms in (("a", west, (6, 8)), ("b", east, (6,))):
        build_index(tmp_path / name, bundle, AddressTiles(), Encoder(), zooms=zooms, area=area)
    merged = merge_indexes(tmp_path / "both", [tmp_path / "a", tmp_path / "b"])
    assert merged.description.complete == (6,), "zoom 8 of the east is not there"
    assert len(merged.table(6, parse_region("5,5,35,15")).rows) == len(parse_region("5,5,35,15").tiles(6))
    assert merged.table(6, None) is None
    rows = np.zeros((1, D), np.float16)
    found, _ = merged.look_up(8, tile_ids(west.tiles(8)[:1]), rows)
    assert found.all() and np.linalg.norm(rows.astype(np.float32)) == pytest.approx(1, abs=1e-2)


def test_indexes_that_do_not_belong_together_are_not_merged(tmp_path, bundle):
    build_index(tmp_path / "a", bundle, AddressTiles(), Encoder(), zooms=(4,))
    build_index(tmp_path / "b", with_weights(bundle, "b" * 64), AddressTiles(), Encoder(), zooms=(4,))
    with pytest.raises(TileIndexError, match="are of another encoder each"):
        merge_indexes(tmp_path / "both", [tmp_path / "a", tmp_path / "b"])
    with pytest.raises(TileIndexError, match="the folder is not empty"):
        merge_indexes(tmp_path / "b", [tmp_path / "a"])
