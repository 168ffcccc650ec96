"""Tile sources that are files, decoding, and how a source is opened."""

import gzip
import io
import sqlite3
import struct
import threading
import time
import zlib
from contextlib import closing

import numpy as np
import pytest
from made_tiles import check_small_world, picture, read_all, tile_picture
from PIL import Image

from geoengine.engine.errors import SourceError, TileError
from geoengine.engine.sources import WORLD_BOUNDS, open_source
from geoengine.engine.sources.decode import decode_tile
from geoengine.engine.sources.mbtiles import IDENTITY_KEY
from geoengine.engine.sources.streaming import CHUNK, stream
from geoengine.engine.tiles import all_xy

# --- MBTiles -----------------------------------------------------------------------------------------------


def write_mbtiles(path, tiles, **metadata):
    """`tiles` maps (z, x, y), rows counted from the north, to bytes."""
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE metadata (name text, value text)")
        database.execute(
            "CREATE TABLE tiles (zoom_level integer, tile_column integer, tile_row integer, tile_data blob)"
        )
        database.execute("CREATE UNIQUE INDEX tile_index ON tiles (zoom_level, tile_column, tile_row)")
        database.executemany("INSERT INTO metadata VALUES (?, ?)", metadata.items())
        rows = ((z, x, 2**z - 1 - y, data) for (z, x, y), data in tiles.items())
        database.executemany("INSERT INTO tiles VALUES (?, ?, ?, ?)", rows)
    return path


@pytest.fixture
def world_mbtiles(tmp_path):
    tiles = {
        (z, x, y): tile_picture(z, x, y, size=32) for z in (3, 4) for x in range(2**z) for y in range(2**z)
    }
    return write_mbtiles(tmp_path / "world.mbtiles", tiles, format="png", minzoom="3", maxzoom="4")


def test_mbtiles_gives_every_tile_once_in_its_place(world_mbtiles):
    with closing(open_source(str(world_mbtiles))) as source:
        check_small_world(source, "world.mbtiles")


def test_mbtiles_without_an_index_is_given_one(world_mbtiles):
    with closing(sqlite3.connect(world_mbtiles)) as database, database:
        database.execute("DROP INDEX tile_index")
        database.execute("INSERT INTO tiles SELECT * FROM tiles WHERE zoom_level = 4 AND tile_row = 3")
    with closing(open_source(str(world_mbtiles))) as source:
        plan = source._rows(f"EXPLAIN QUERY PLAN {source._query}", (4, 0, 0))
        assert not any("SCAN" in row[-1] for row in plan)
        check_small_world(source, "world.mbtiles")


def test_mbtiles_bounds(tmp_path):
    red = {(0, 0, 0): picture("red")}
    stated = {"a": "5.9,45.8,10.5,47.8", "b": "1,2,3", "c": "0,0,0,0", "d": "west", "e": "-200,0,10,10"}
    for name, bounds in stated.items():
        with closing(
            open_source(str(write_mbtiles(tmp_path / f"{name}.mbtiles", red, bounds=bounds)))
        ) as source:
            assert source.bounds == ((5.9, 45.8, 10.5, 47.8) if name == "a" else WORLD_BOUNDS)


def test_identities_tell_pictures_apart(tmp_path):
    red, blue = {(0, 0, 0): picture("red")}, {(0, 0, 0): picture("blue")}
    paths = [write_mbtiles(tmp_path / f"{i}.mbtiles", tiles) for i, tiles in enumerate((red, red, blue))]
    paths += [write_mbtiles(tmp_path / "3.mbtiles", red, **{IDENTITY_KEY: "of-the-source"})]
    for name, colour in (("4", "red"), ("5", "red"), ("6", "blue")):
        paths.append(write_folder(tmp_path / name, {"0/0/0.png": picture(colour, size=len(colour))}))
    identities = []
    for spec in (*map(str, paths), "planet"):
        with closing(open_source(spec)) as source:
            identities.append(source.identity)
    assert identities[0] == identities[1] != identities[2]
    assert identities[3] == "of-the-source"
    assert identities[4] == identities[5] != identities[6]
    assert len(set(identities)) == 6


def test_mbtiles_zooms_outside_its_range_are_missing(tmp_path):
    tiles = {(z, 0, 0): tile_picture(z, 0, 0) for z in range(2, 7)}
    stated = write_mbtiles(tmp_path / "stated.mbtiles", tiles, minzoom="3", maxzoom="5")
    unstated = write_mbtiles(tmp_path / "unstated.mbtiles", tiles, minzoom="three")
    for path, zooms in ((stated, {3, 4, 5}), (unstated, {2, 3, 4, 5, 6})):
        with closing(open_source(str(path))) as source:
            assert {z for z in range(9) if read_all(source, z, [(0, 0)])} == zooms
            assert (source.min_zoom, source.max_zoom) == (min(zooms), max(zooms))


def test_mbtiles_attribution_is_plain_text(tmp_path):
    html = "<a href='https://x.org'>&copy;  Some\nbody</a> <script>1</script>"
    path = write_mbtiles(tmp_path / "a.mbtiles", {(0, 0, 0): picture("red")}, attribution=html)
    with closing(open_source(str(path))) as source:
        assert source.attribution == "© Some body 1"


def test_mbtiles_whose_metadata_is_null(tmp_path):
    path = write_mbtiles(tmp_path / "a.mbtiles", {(0, 0, 0): picture("red")}, attribution=None, minzoom=None)
    with closing(open_source(str(path))) as source:
        assert (source.attribution, source.min_zoom) == ("", 0)


def test_mbtiles_tiles_that_hold_no_picture_are_missing(tmp_path):
    whole = tile_picture(4, 0, 0)
    contents = [
        whole,
        gzip.compress(whole),
        b"",
        None,
        b"garbage",
        whole[:-20],
        gzip.compress(whole)[:-20],
        "text",
    ]
    contents += [b"\x1f\x8bgarbage", gzip.compress(b""), gzip.compress(gzip.compress(whole))]
    tiles = {(4, 0, y): data for y, data in enumerate(contents)}
    path = write_mbtiles(tmp_path / "a.mbtiles", tiles)
    with closing(open_source(str(path))) as source:
        batches = list(source.read(4, np.array([(0, y) for y in range(len(contents) + 1)])))
        assert sorted(p for batch in batches for p in batch.positions) == [0, 1]


def test_mbtiles_may_begin_with_empty_tiles(tmp_path):
    tiles = {(4, 0, y): b"" for y in range(15)} | {(4, 15, 15): tile_picture(4, 15, 15, size=64)}
    with closing(open_source(str(write_mbtiles(tmp_path / "a.mbtiles", tiles)))) as source:
        assert source.tile_size == 64
        assert read_all(source, 4, all_xy(4)) == [255]


def test_mbtiles_is_closed_once_and_for_all(world_mbtiles):
    source = open_source(str(world_mbtiles))
    source.close()
    source.close()
    with pytest.raises(SourceError, match="closed database"):
        list(source.read(4, all_xy(4)))


def test_mbtiles_is_opened_for_reading_only(tmp_path):
    folder = tmp_path / "a #1? 100%"
    folder.mkdir()
    path = write_mbtiles(folder / "b c.mbtiles", {(0, 0, 0): tile_picture(0, 0, 0)})
    before = path.read_bytes()
    with closing(open_source(str(path))) as source:
        assert read_all(source, 0, [(0, 0)]) == [0]
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            source._database.execute("DELETE FROM tiles")
        assert [file.name for file in folder.iterdir()] == ["b c.mbtiles"]
    assert path.read_bytes() == before


def test_mbtiles_can_be_read_from_another_thread(world_mbtiles):
    found = []
    with closing(open_source(str(world_mbtiles))) as source:
        thread = threading.Thread(target=lambda: found.append(read_all(source, 4, all_xy(4))))
        thread.start()
        thread.join()
    assert found == [list(range(256))]


def test_files_that_are_no_mbtiles(tmp_path):
    def refused(name, message):
        with pytest.raises(SourceError, match=message):
            open_source(str(tmp_path / name))

    refused("nowhere.mbtiles", r"nowhere\.mbtiles: there is no such file")
    (tmp_path / "text.mbtiles").write_text("not a database, but long enough to be taken for one" * 50)
    refused(
        "text.mbtiles", r"text\.mbtiles: this is no MBTiles file, or a damaged one \(file is not a database\)"
    )
    (tmp_path / "empty.mbtiles").touch()
    refused("empty.mbtiles", r"empty\.mbtiles: this is no MBTiles file, .*no such table")
    write_mbtiles(tmp_path / "none.mbtiles", {})
    refused("none.mbtiles", r"none\.mbtiles: this file holds no tiles")
    vector = {(0, 0, 0): gzip.compress(b"\x1a\x08vector tile")}
    write_mbtiles(tmp_path / "pbf.mbtiles", vector, format="pbf")
    refused("pbf.mbtiles", r"pbf\.mbtiles: this file holds vector tiles, but pictures are needed")
    write_mbtiles(tmp_path / "odd.mbtiles", vector)
    refused("odd.mbtiles", r"odd\.mbtiles: this file holds tiles that are not PNG, JPEG or WebP pictures")


def test_an_mbtiles_file_damaged_inside_is_a_source_error(world_mbtiles):
    with closing(open_source(str(world_mbtiles))) as source:
        data = bytearray(world_mbtiles.read_bytes())
        data[4096 * 4 :] = b"\xff" * (len(data) - 4096 * 4)
        world_mbtiles.write_bytes(data)
    with closing(sqlite3.connect(world_mbtiles)) as database, pytest.raises(sqlite3.DatabaseError):
        database.execute("SELECT sum(length(tile_data)) FROM tiles").fetchall()
    message = r"world\.mbtiles: this is no MBTiles file, or a damaged one"
    with pytest.raises(SourceError, match=message), closing(open_source(str(world_mbtiles))) as source:
        read_all(source, 4, all_xy(4))


# --- folders -----------------------------------------------------------------------------------------------


def write_folder(path, tiles):
    for name, data in tiles.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def test_folder_gives_its_tiles(tmp_path):
    kinds = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
    tiles = {
        f"3/1/{y}.{suffix}": tile_picture(3, 1, y, kind=kind)
        for y, (suffix, kind) in enumerate(kinds.items())
    }
    tiles |= {"3/1/4.png": b"", "3/1/5.png": b"garbage", "3/1/6.txt": b"text", "readme.txt": b"text"}
    write_folder(tmp_path / "pack", tiles)
    (tmp_path / "pack/3/1/7.png").mkdir()
    (tmp_path / "pack/2").touch()
    with closing(open_source(str(tmp_path / "pack"))) as source:
        assert (source.name, source.world, source.attribution, source.tile_size) == ("pack", "earth", "", 256)
        asked = [(1, y) for y in range(8)] + [(2, 0)]
        assert read_all(source, 3, asked, tolerance=4) == [0, 1, 2, 3]
        assert read_all(source, 2, [(0, 0)]) == []


def test_folder_without_tiles(tmp_path):
    for tiles in ({"readme.txt": b"text"}, {"4/8/5.png": b"garbage"}, {"a/b/c.png": tile_picture(0, 0, 0)}):
        folder = write_folder(tmp_path / str(len(list(tmp_path.iterdir()))), tiles)
        with pytest.raises(
            SourceError, match=r"this folder has no tiles that can be read, in files like 4/8/5\.png"
        ):
            open_source(str(folder))


def test_folder_tile_that_may_not_be_read(tmp_path, monkeypatch):
    source = open_source(str(write_folder(tmp_path, {"0/0/0.png": tile_picture(0, 0, 0)})))

    def denied(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "read_bytes", denied)
    with pytest.raises(SourceError, match=r"0/0/0\.png: the tile cannot be read \(Permission denied\)"):
        list(source.read(0, all_xy(0)))


# --- decoding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("JPEG", {"quality": 95}), ("WEBP", {"lossless": True})]
)
def test_kinds_of_tiles(kind, options):
    pixels = decode_tile(picture((200, 100, 50), kind, size=8, **options))
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert np.abs(pixels.astype(int) - (200, 100, 50)).max() <= 3


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_pixels_of_every_mode():
    grey = Image.new("L", (4, 4), 77)
    assert (decode_tile(encoded(grey)) == 77).all()
    assert (decode_tile(encoded(Image.new("1", (4, 4), 1))) == 255).all()
    assert (decode_tile(encoded(Image.fromarray(np.full((4, 4), 77 * 256 + 200, np.uint16)))) == 77).all()
    assert (decode_tile(encoded(Image.new("RGB", (4, 4), (9, 8, 7)).quantize(2))) == (9, 8, 7)).all()
    assert (decode_tile(encoded(Image.new("RGBA", (4, 4), (100, 0, 200, 0)))) == 255).all()
    assert (decode_tile(encoded(Image.new("RGBA", (4, 4), (100, 0, 200, 51)))) == (224, 204, 244)).all()
    assert (decode_tile(encoded(Image.new("RGBA", (4, 4), (100, 0, 200, 255)))) == (100, 0, 200)).all()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert (decode_tile(encoded(palette, transparency=0)) == (9, 8, 7)).all()
    assert (decode_tile(encoded(palette, transparency=1)) == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_tiles_cut_short_are_missing(kind, capfd):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, kind)
    whole = buffer.getvalue()
    assert decode_tile(whole) is not None
    assert decode_tile(whole + b"\0\0\n") is not None
    for part in (0.1, 0.5, 0.9, 0.99):
        assert decode_tile(whole[: int(len(whole) * part)]) is None
    assert capfd.readouterr().err == ""  # where the decoders complain


def test_a_tile_of_absurd_size_is_missing():
    whole = picture("red", size=1)
    size = b"IHDR" + struct.pack(">II", 100_000, 100_000) + whole[24:29]
    assert decode_tile(whole[:12] + size + struct.pack(">I", zlib.crc32(size)) + whole[33:]) is None


def test_a_gzip_bomb_is_missing():
    padded = picture("red", "JPEG") + bytes(17 << 20)
    assert decode_tile(padded) is not None
    assert decode_tile(gzip.compress(padded)) is None


def test_tiles_of_another_size_are_resized(tmp_path):
    tiles = {f"1/0/{y}.png": tile_picture(1, 0, y, size=size) for y, size in enumerate((256, 512))}
    tiles["1/1/0.png"] = tile_picture(1, 1, 0, size=100)
    with closing(open_source(str(write_folder(tmp_path, tiles)))) as source:
        assert source.tile_size == 256
        assert read_all(source, 1, all_xy(1)) == [0, 1, 2]
    step = np.zeros((64, 64, 3), np.uint8)
    step[:, 32:] = 255
    (batch,) = stream(iter([(0, lambda: step)]), workers=1, tile_size=lambda _: 16)
    reduced = Image.fromarray(step).resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(batch.pixels[0], np.asarray(reduced))


def test_the_side_of_the_tiles_is_asked_for_once():
    asked = []
    jobs = [(i, lambda: np.zeros((4, 4, 3), np.uint8)) for i in range(100)]
    batches = list(stream(iter(jobs), workers=2, tile_size=lambda pixels: asked.append(pixels) or 4))
    assert sum(len(batch.positions) for batch in batches) == 100
    assert len(asked) == 1


def test_an_abandoned_stream_drops_the_jobs_that_wait():
    done = []

    def job():
        time.sleep(0.001)
        done.append(1)
        return np.zeros((4, 4, 3), np.uint8)

    batches = stream(((i, job) for i in range(1000)), workers=1, tile_size=lambda _: 4)
    next(batches)
    batches.close()
    assert len(done) < 2 * CHUNK
    time.sleep(0.1)
    assert len(done) < 2 * CHUNK


def test_what_a_job_raises_reaches_the_caller():
    def broken():
        raise SourceError("the disk is gone")

    pixels = np.zeros((4, 4, 3), np.uint8)
    jobs = [(i, broken if i == 70 else lambda: pixels) for i in range(200)]
    with pytest.raises(SourceError, match="the disk is gone"):
        list(stream(iter(jobs), workers=2, tile_size=lambda _: 4))


def test_jobs_are_drawn_a_few_batches_ahead_only():
    drawn = 0

    def jobs():
        nonlocal drawn
        for position in range(5000):
            drawn += 1
            yield position, lambda: np.zeros((4, 4, 3), np.uint8)

    batches = stream(jobs(), workers=2, tile_size=lambda _: 4)
    next(batches)
    assert drawn <= 6 * CHUNK
    batches.close()
    assert drawn <= 6 * CHUNK


# --- opening, and what all share ---------------------------------------------------------------------------


def test_open_source_knows_the_planet():
    with closing(open_source("planet")) as source:
        assert source.world == "planet"


def test_open_source_takes_quadkeys():
    with closing(open_source("https://host.example/{quadkey}.jpeg?g=1")) as source:
        assert source.name == "https://host.example/{quadkey}.jpeg"


def test_what_is_no_source(tmp_path):
    (tmp_path / "a.png").touch()
    for spec in ("nonsense", str(tmp_path / "a.png"), str(tmp_path / "nowhere")):
        with pytest.raises(
            SourceError,
            match=r"URL template .*, an \.mbtiles or \.pmtiles file, a folder .*, or the word planet",
        ):
            open_source(spec)


def test_tiles_that_cannot_exist_are_an_error(world_mbtiles, tmp_path):
    folder = open_source(str(write_folder(tmp_path / "pack", {"0/0/0.png": tile_picture(0, 0, 0)})))
    with closing(open_source(str(world_mbtiles))) as mbtiles:
        for source in (folder, mbtiles):
            with pytest.raises(TileError, match="tile 3/8/0 is outside zoom 3"):
                list(source.read(3, np.array([(8, 0)])))
