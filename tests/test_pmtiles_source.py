"""PMTiles archives as a tile source."""

import gzip
import random
import struct
import threading
from contextlib import closing

import numpy as np
import pytest
from made_tiles import check_small_world, picture, read_all, tile_picture
from pmtiles.tile import Compression, TileType, zxy_to_tileid
from pmtiles.writer import Writer

from geoengine.engine.errors import SourceError, TileError
from geoengine.engine.sources import WORLD_BOUNDS, open_source
from geoengine.engine.tiles import all_xy

# Where the header has the offset and length of each section, and some of its bytes.
ROOT, METADATA, LEAVES, TILES = 8, 24, 40, 56
VERSION, INTERNAL_COMPRESSION, TILE_COMPRESSION, TILE_TYPE, MIN_ZOOM, MAX_ZOOM = 7, 97, 98, 99, 100, 101
MIN_LON = 102


def write_pmtiles(path, tiles, *, tile_type=TileType.PNG, compression=Compression.NONE, metadata=None):
    """`tiles` maps (z, x, y), rows counted from the north, to bytes."""
    with path.open("wb") as file:
        writer = Writer(file)
        for tile_id, data in sorted((zxy_to_tileid(*tile), data) for tile, data in tiles.items()):
            writer.write_tile(tile_id, data)
        writer.finalize({"tile_type": tile_type, "tile_compression": compression}, metadata or {})
    return path


def patch(path, offset, data):
    whole = bytearray(path.read_bytes())
    whole[offset : offset + len(data)] = data
    path.write_bytes(whole)
    return path


def section(path, where):
    """The offset and length of a section."""
    return struct.unpack_from("<QQ", path.read_bytes(), where)


def replace_section(path, where, data):
    """Append `data` to the file and let the header point there."""
    end = path.stat().st_size
    path.write_bytes(path.read_bytes() + data)
    return patch(path, where, struct.pack("<QQ", end, len(data)))


def write_with_leaves(path):
    """Zoom 7 but for one tile; lengths at random make its root directory overflow, so that it gets leaves."""
    dice = random.Random(0)
    tiles = {
        (7, x, y): tile_picture(7, x, y, kind="JPEG", size=1) + bytes(dice.randrange(300))
        for x, y in all_xy(7).tolist()
        if (x, y) != (77, 33)
    }
    write_pmtiles(path, tiles, tile_type=TileType.JPEG)
    assert section(path, LEAVES)[1] > 0
    return path


@pytest.fixture
def world(tmp_path):
    tiles = {
        (z, x, y): tile_picture(z, x, y, size=32) for z in (3, 4) for x in range(2**z) for y in range(2**z)
    }
    return write_pmtiles(tmp_path / "world.pmtiles", tiles)


def test_every_tile_once_in_its_place(world):
    with closing(open_source(str(world))) as source:
        check_small_world(source, "world.pmtiles")


@pytest.mark.parametrize("compression", [Compression.NONE, Compression.GZIP])
@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("JPEG", {}), ("WEBP", {"lossless": True})])
def test_kinds_of_tiles(tmp_path, kind, options, compression):
    pack = gzip.compress if compression is Compression.GZIP else bytes
    tiles = {
        (2, x, y): pack(tile_picture(2, x, y, kind=kind, size=64, **options)) for x, y in all_xy(2).tolist()
    }
    path = write_pmtiles(tmp_path / "a.PMTiles", tiles, tile_type=TileType[kind], compression=compression)
    with closing(open_source(str(path))) as source:
        assert source.tile_size == 64
        assert read_all(source, 2, all_xy(2), tolerance=4) == list(range(16))


def test_tiles_not_in_the_archive_and_those_that_hold_no_picture_are_missing(tmp_path):
    whole = tile_picture(4, 0, 0)
    contents = [whole, gzip.compress(whole), b"garbage", whole[:-20], gzip.compress(whole)[:-20]]
    path = write_pmtiles(tmp_path / "a.pmtiles", {(4, 0, y): data for y, data in enumerate(contents)})
    with closing(open_source(str(path))) as source:
        batches = list(source.read(4, np.array([(x, y) for x in (0, 15) for y in range(16)])))
        assert sorted(p for batch in batches for p in batch.positions) == [0, 1]


def test_one_picture_may_stand_for_many_tiles(tmp_path):
    sea, land = picture("blue", size=16), picture("red", size=16)
    tiles = dict.fromkeys(((3, x, y) for x in range(8) for y in range(8)), sea) | {(3, 5, 2): land}
    with closing(open_source(str(write_pmtiles(tmp_path / "a.pmtiles", tiles)))) as source:
        red = {
            tuple(all_xy(3)[position].tolist()): bool(pixels[0, 0, 0])
            for batch in source.read(3, all_xy(3))
            for position, pixels in zip(batch.positions, batch.pixels, strict=True)
        }
    assert red == {(x, y): (x, y) == (5, 2) for x in range(8) for y in range(8)}


def test_an_archive_with_leaf_directories(tmp_path):
    path = write_with_leaves(tmp_path / "a.pmtiles")
    with closing(open_source(str(path))) as source:
        asked = [(x, y) for x in range(70, 80) for y in range(30, 40)] + [(0, 0), (127, 127), (127, 0)]
        present = [i for i, tile in enumerate(asked) if tile != (77, 33)]
        assert read_all(source, 7, asked, tolerance=4) == present


def test_zooms_outside_the_range_of_the_header_are_missing(tmp_path):
    tiles = {(z, 0, 0): tile_picture(z, 0, 0) for z in range(2, 7)}
    path = write_pmtiles(tmp_path / "a.pmtiles", tiles)
    for zooms in ({2, 3, 4, 5, 6}, {3, 4, 5}):
        patch(patch(path, MIN_ZOOM, bytes([min(zooms)])), MAX_ZOOM, bytes([max(zooms)]))
        with closing(open_source(str(path))) as source:
            assert {z for z in range(9) if read_all(source, z, [(0, 0)])} == zooms
            assert (source.min_zoom, source.max_zoom) == (min(zooms), max(zooms))


def test_bounds_are_those_of_the_header(world):
    for corners, expected in (((5.9, 45.8, 10.5, 47.8),) * 2, ((0, 0, 0, 0), WORLD_BOUNDS)):
        patch(world, MIN_LON, struct.pack("<4i", *(round(degrees * 1e7) for degrees in corners)))
        with closing(open_source(str(world))) as source:
            assert source.bounds == pytest.approx(expected)


def test_identities_tell_archives_apart(tmp_path):
    def identity(name, **tile):
        path = write_pmtiles(tmp_path / name, {(1, 0, 0): tile_picture(1, 0, 0, **tile)})
        with closing(open_source(str(path))) as source:
            return source.identity

    assert identity("a.pmtiles") == identity("b.pmtiles") != identity("c.pmtiles", size=20)


def test_name_and_attribution_are_plain_text(tmp_path):
    red = {(0, 0, 0): picture("red")}
    html = "<a href='https://x.org'>&copy;  Some\nbody</a> <script>1</script>"
    path = write_pmtiles(
        tmp_path / "a.pmtiles", red, metadata={"attribution": html, "name": " My <b>map</b>"}
    )
    with closing(open_source(str(path))) as source:
        assert (source.name, source.attribution) == ("My map", "© Some body 1")
    for metadata in ({"attribution": None, "name": None}, {"attribution": "", "name": ""}):
        path = write_pmtiles(tmp_path / "b.pmtiles", red, metadata=metadata)
        with closing(open_source(str(path))) as source:
            assert (source.name, source.attribution) == ("b.pmtiles", "")


def test_it_is_closed_once_and_for_all(world):
    source = open_source(str(world))
    source.close()
    source.close()
    with pytest.raises(SourceError, match=r"world\.pmtiles: the file is closed"):
        list(source.read(4, all_xy(4)))


def test_it_can_be_read_from_several_threads(world):
    found = []
    with closing(open_source(str(world))) as source:
        threads = [
            threading.Thread(target=lambda: found.append(read_all(source, 4, all_xy(4)))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [list(range(256))] * 3


def test_tiles_that_cannot_exist_are_an_error(world):
    with closing(open_source(str(world))) as source, pytest.raises(TileError, match="tile 3/8/0 is outside"):
        list(source.read(3, np.array([(8, 0)])))


# --- files that are refused --------------------------------------------------------------------------------


def refused(path, message):
    with pytest.raises(SourceError, match=message) as caught:
        open_source(str(path))
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_pmtiles(tmp_path, world):
    refused(tmp_path / "nowhere.pmtiles", r"nowhere\.pmtiles: there is no such file")
    (tmp_path / "empty.pmtiles").touch()
    refused(tmp_path / "empty.pmtiles", r"the file cannot be opened \(cannot mmap an empty file\)")
    for content in (b"\xff", b"PMTile", b"not an archive, but long enough to be taken for one" * 50):
        (tmp_path / "text.pmtiles").write_bytes(content)
        refused(tmp_path / "text.pmtiles", r"text\.pmtiles: this is no PMTiles file")
    refused(patch(world, VERSION, b"\x02"), r"this is not version 3 of PMTiles, which alone is read")


@pytest.mark.parametrize("tile_type", [TileType.MVT, TileType.MLT])
def test_vector_tiles_are_refused(tmp_path, tile_type):
    tiles = {(0, 0, 0): gzip.compress(b"\x1a\x08vector tile")}
    path = write_pmtiles(tmp_path / "v.pmtiles", tiles, tile_type=tile_type, compression=Compression.GZIP)
    refused(path, r"v\.pmtiles: this file holds vector tiles, but pictures are needed$")


def test_tiles_that_are_no_pictures_are_refused(tmp_path, world):
    path = write_pmtiles(tmp_path / "odd.pmtiles", {(0, 0, 0): b"odd"}, tile_type=TileType.UNKNOWN)
    refused(path, r"odd\.pmtiles: this file holds tiles that are not PNG, JPEG or WebP pictures")
    replace_section(world, ROOT, gzip.compress(b"\0"))
    refused(world, r"world\.pmtiles: this file holds no tiles")


@pytest.mark.parametrize(
    ("offset", "compression"),
    [
        (INTERNAL_COMPRESSION, Compression.NONE),
        (INTERNAL_COMPRESSION, Compression.ZSTD),
        (TILE_COMPRESSION, Compression.BROTLI),
    ],
)
def test_compressions_other_than_gzip_are_refused(world, offset, compression):
    patch(world, offset, bytes([compression.value]))
    refused(world, rf"tiles gzip or none, but it has .*{compression.name.lower()}")


def test_archives_cut_short_are_refused(world):
    whole = world.read_bytes()
    for length in (*range(8, 127, 7), 127, 200, len(whole) // 2, len(whole) - 1):
        world.write_bytes(whole[:length])
        refused(world, r"is cut short|is damaged")
    refused(world, rf"this file is cut short, {len(whole) - 1} of its {len(whole)} bytes are there$")


def test_damaged_headers_directories_and_metadata_are_refused(world):
    whole = world.read_bytes()

    def damaged(offset, data, message):
        patch(world, offset, data)
        refused(world, rf"world\.pmtiles: this PMTiles file is damaged \({message}")
        world.write_bytes(whole)

    (root, _), (metadata, _) = section(world, ROOT), section(world, METADATA)
    damaged(TILE_TYPE, b"\xff", "255 is not a valid TileType")
    damaged(root, b"\0\0", "Not a gzipped file")
    damaged(root + 20, b"\xff" * 20, "")
    damaged(metadata, b"\0\0", "Not a gzipped file")
    damaged(metadata + 12, b"\xff" * 6, "")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [(b"[]", "its metadata is no JSON object"), (b"{", "Expecting"), (b"\xff", "'utf-8' codec|.*decode")],
)
def test_metadata_that_is_no_json_object_is_refused(world, metadata, message):
    replace_section(world, METADATA, gzip.compress(metadata))
    refused(world, rf"this PMTiles file is damaged \({message}")


@pytest.mark.parametrize(
    ("entry", "message"),
    [  # the number of entries, then the tile id, run length, length and offset + 1 of one
        ((1, 0, 1, 100, 1), "it points past its end"),
        ((1, 0, 1, 1, 0), "it points past its end"),
        ((9, 0, 1, 1, 1), "unexpectedly reached end of varint stream"),
    ],
)
def test_directories_that_lead_nowhere_are_refused(world, entry, message):
    replace_section(world, ROOT, gzip.compress(bytes(entry)))
    start = 0 if entry[-1] == 0 else world.stat().st_size
    patch(world, TILES, struct.pack("<QQ", start, 0))
    refused(world, rf"this PMTiles file is damaged \({message}\)")


def test_a_directory_that_is_its_own_leaf_is_refused(world):
    length = len(gzip.compress(bytes((1, 0, 0, 0, 1))))
    root = gzip.compress(bytes((1, 0, 0, length, 1)))
    replace_section(world, ROOT, root)
    patch(world, LEAVES, struct.pack("<QQ", *section(world, ROOT)))
    refused(world, r"this PMTiles file is damaged \(its directories are nested too deep\)")


def test_leaf_directories_damaged_inside_are_a_source_error(tmp_path):
    path = write_with_leaves(tmp_path / "a.pmtiles")
    leaves, length = section(path, LEAVES)
    patch(path, leaves + length - 200, bytes(200))
    message = r"a\.pmtiles: this PMTiles file is damaged"
    with closing(open_source(str(path))) as source, pytest.raises(SourceError, match=message):
        read_all(source, 7, all_xy(7), tolerance=4)


def test_random_damage_before_the_tiles_raises_nothing_else(tmp_path):
    tiles = {(2, x, y): tile_picture(2, x, y, size=4) for x, y in all_xy(2).tolist()}
    path = write_pmtiles(tmp_path / "a.pmtiles", tiles, metadata={"name": "a"})
    whole, (tiles_start, _) = path.read_bytes(), section(path, TILES)
    dice, opened = random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(dice.randrange(1, 4)):
            damaged[dice.randrange(tiles_start)] = dice.randrange(256)
        path.write_bytes(damaged)
        try:
            with closing(open_source(str(path))) as source:
                opened += 1
                list(source.read(2, all_xy(2)))
        except SourceError as error:
            assert "\n" not in str(error)
    assert 0 < opened < 300
