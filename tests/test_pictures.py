"""Pictures on their way to the encoder: nothing waits for the last tile, nothing is lost at a deadline."""

import dataclasses
import io
import json
import threading
import time
from contextlib import ExitStack, closing

import jsonschema
import numpy as np
import pytest
from fakes import AddressTiles, HostEncoders, Oracle, addresses
from made_results import made_location
from made_tiles import tile_picture
from tile_server import Server, send

from geoengine.engine.errors import SourceError
from geoengine.engine.pictures import hand_on
from geoengine.engine.render.json_lines import json_object, schema_text
from geoengine.engine.render.table import table_text
from geoengine.engine.search import SearchConfig, search
from geoengine.engine.sources import TileBatch
from geoengine.engine.sources.cache import TileCache
from geoengine.engine.sources.description import SourceDescription
from geoengine.engine.sources.http import HttpSource
from geoengine.engine.sources.mbtiles import IDENTITY_KEY
from geoengine.engine.tiles import Tile, all_xy

LATEST_S = 20  # only a test that fails waits for so long


class Held(AddressTiles):
    """Gives tiles one by one, and those in the east only when it is told to."""

    def __init__(self):
        super().__init__(chunk=1)
        self.go_on = threading.Event()
        self.closed = threading.Event()

    def read(self, z, xy):
        west = np.flatnonzero(xy[:, 0] < 1 << (z - 1))
        east = np.flatnonzero(xy[:, 0] >= 1 << (z - 1))
        try:
            for positions in (west, east):
                for batch in super().read(z, xy[positions]):
                    yield TileBatch(positions[batch.positions], batch.pixels)
                if positions is west:
                    assert self.go_on.wait(LATEST_S)
        finally:
            self.closed.set()


def collect(source, zoom, xy, *, batch=32, then=lambda count: None, **options):
    """The addresses that were handed on, in what lots, and what became of the tiles."""
    lots = []

    def append(pixels, digests):
        assert len({*digests}) == len(digests) == len(pixels)
        lots.append([tuple(row) for row in addresses(pixels.copy()).tolist()])
        then(sum(map(len, lots)))

    arrived = hand_on(source, zoom, xy, append, batch=batch, progress=lambda done: None, **options)
    return lots, arrived


def test_the_encoder_does_not_wait_for_the_last_tile():
    """Half of a level comes only after the encoder has had the other half."""
    source = Held()
    lots, arrived = collect(
        source, 4, all_xy(4), batch=1000, then=lambda count: count == 128 and source.go_on.set()
    )
    assert sum(map(len, lots)) == 256 and not arrived.late
    flat = [tile for lot in lots for tile in lot]
    assert [flat[row] for row in arrived.rows] == [(4, *xy) for xy in all_xy(4).tolist()]


def test_what_waits_is_handed_on_in_full_batches():
    started = threading.Event()

    class Quick(AddressTiles):
        def read(self, z, xy):
            yield from super().read(z, xy[:1])
            for batch in super().read(z, xy[1:]):
                yield TileBatch(batch.positions + 1, batch.pixels)
                started.set()

    lots, _ = collect(
        Quick(chunk=64),
        4,
        all_xy(4),
        batch=32,
        then=lambda count: started.wait(LATEST_S) and time.sleep(0.02),
    )
    assert {len(lot) for lot in lots[1:-2]} == {32}


def test_a_deadline_ends_a_level_with_what_has_come():
    source = Held()
    lots, arrived = collect(source, 4, all_xy(4), until=time.monotonic() + 0.3)
    came = arrived.rows >= 0
    assert arrived.late and sum(map(len, lots)) == came.sum() > 0
    assert (all_xy(4)[came, 0] < 8).all()
    assert not source.closed.is_set(), "nobody waited for the tile that is under way"
    source.go_on.set()
    assert source.closed.wait(LATEST_S), "and its thread ends when it has come"


def test_a_slow_encoder_meets_the_deadline_too():
    lots, arrived = collect(
        AddressTiles(chunk=1),
        4,
        all_xy(4),
        batch=1,
        then=lambda count: time.sleep(0.05),
        until=time.monotonic() + 0.2,
    )
    assert arrived.late and 0 < sum(map(len, lots)) < 50
    assert (arrived.rows >= 0).sum() == sum(map(len, lots))


def test_a_deadline_that_is_met_changes_nothing():
    lots, arrived = collect(AddressTiles(), 3, all_xy(3), until=time.monotonic() + LATEST_S)
    assert not arrived.late and sum(map(len, lots)) == 64


# --- coarser tiles ----------------------------------------------------------------------------------------


class Drawn(AddressTiles):
    """Tiles of 64 pixels: a picture of the world whose colour says where it is; deep tiles are missing."""

    tile_size = 64

    def read(self, z, xy):
        self.reads.append((z, len(xy)))
        if z > self.max_zoom:
            raise AssertionError("asked for a zoom that it does not have")
        there = np.flatnonzero(~self.missing(z, xy[:, 0], xy[:, 1]))
        for position in there:
            x, y = xy[position]
            at = (np.arange(64) + 0.5) / 64
            east, south = np.meshgrid((x + at) / 2**z, (y + at) / 2**z)
            picture = np.stack([255 * east, 255 * south, np.full_like(east, 10 * z)], axis=-1)
            yield TileBatch(np.array([position]), picture.round().astype(np.uint8)[None])


def gather(source, zoom, xy, **options):
    pictures = []

    def append(pixels, digests):
        pictures.extend(pixels.copy())

    arrived = hand_on(source, zoom, xy, append, batch=32, progress=lambda done: None, **options)
    return [pictures[row] if row >= 0 else None for row in arrived.rows], arrived


@pytest.mark.parametrize("up", [1, 2, 3])
def test_a_tile_is_cut_out_of_a_coarser_one_and_enlarged(up):
    source, truth = Drawn(), Drawn()
    source.max_zoom = 3
    xy = np.array([(5, 3), (6, 3), (0, 0), (7, 7)]) * (1 << up) + 1
    enlarged, arrived = gather(source, 3 + up, xy, overzoom=True)
    assert arrived.enlarged.all() and [z for z, _ in source.reads] == [3]
    expected, _ = gather(truth, 3 + up, xy)
    for picture, true in zip(enlarged, expected, strict=True):
        assert picture.shape == (64, 64, 3)
        assert np.abs(picture[..., :2].astype(int) - true[..., :2]).max() <= 3
        assert (picture[..., 2] == 30).all()


def test_only_tiles_that_are_missing_are_enlarged():
    source = Drawn(missing=lambda z, x, y: (z == 4) & (x % 2 == 0))
    pictures, arrived = gather(source, 4, all_xy(4), overzoom=True)
    np.testing.assert_array_equal(arrived.enlarged, all_xy(4)[:, 0] % 2 == 0)
    assert {int(p[0, 0, 2]) for p, e in zip(pictures, arrived.enlarged, strict=True) if e} == {30}
    assert source.reads == [(4, 256), (3, 64)]


def test_without_overzoom_and_too_deep_tiles_stay_missing():
    source = Drawn()
    source.max_zoom = 3
    _, arrived = gather(source, 7, np.array([(5, 5)]), overzoom=True)
    assert (arrived.rows == -1).all() and source.reads == []
    source = Drawn(missing=lambda z, x, y: np.full(len(x), z == 4))
    _, arrived = gather(source, 4, np.array([(5, 5)]))
    assert (arrived.rows == -1).all() and not arrived.enlarged.any()


# --- searches ---------------------------------------------------------------------------------------------


def find(source, config, lng=20.0, lat=10.0):
    oracle = Oracle(config.levels)
    [levels] = search(oracle.photos([lng], [lat]), source, HostEncoders(oracle.encode), config)
    return levels


def test_a_search_with_a_deadline_says_what_came_too_late():
    source = Held()
    levels = find(source, SearchConfig(k=2, levels=(4,), deadline_s=0.4), lng=-20.0)
    source.go_on.set()
    [level] = levels
    assert level.missing == 0 and level.late >= 128 and level.candidates + level.late == 256
    assert level.coverage == level.candidates / 256
    assert all(scored.tile.x < 8 for scored in level.beam)


def test_a_search_where_nothing_came_in_time():
    class Late(Held):
        def read(self, z, xy):
            assert self.go_on.wait(LATEST_S)
            return iter(())

    source = Late()
    with pytest.raises(
        SourceError, match=r"no tile of zoom 4, the first level, or none that came within 0\.1 s"
    ):
        find(source, SearchConfig(k=2, levels=(4,), deadline_s=0.1))
    source.go_on.set()


def test_overzoom_searches_levels_that_the_source_lacks():
    def encode(encoder, pixels):
        middle = pixels[:, 31:33, 31:33, :2].mean(axis=(1, 2)) / 255 - np.array([0.7, 0.3])
        close = 1 / (1e-2 + np.linalg.norm(middle, axis=1))
        rows = np.column_stack([close, np.full(len(close), 5.0)])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    source = Drawn()
    source.max_zoom = 4
    photo = np.array([[1.0, 0.0]], np.float32)
    config = SearchConfig(k=2, levels=(2, 4, 6, 8), overzoom=True)
    [levels] = search(photo, source, HostEncoders(encode), config)
    assert [level.zoom for level in levels] == [2, 4, 6], "zoom 8 is four zooms away"
    assert [level.enlarged for level in levels] == [0, 0, 32]
    x, y = levels[-1].beam[0].tile[1:]
    assert abs((x + 0.5) / 64 - 0.7) < 0.02 and abs((y + 0.5) / 64 - 0.3) < 0.02
    [levels] = search(photo, source, HostEncoders(encode), dataclasses.replace(config, overzoom=False))
    assert [level.zoom for level in levels] == [2, 4]


def test_results_say_what_was_late_enlarged_and_scored_whole():
    location = made_location()
    level = dataclasses.replace(location.levels[0], late=7, enlarged=3, exhaustive=True, known=254)
    location = dataclasses.replace(location, levels=(level, *location.levels[1:]))
    record = json_object(location)
    jsonschema.Draft202012Validator(json.loads(schema_text())).validate(record)
    first = record["levels"][0]
    assert (first["late"], first["enlarged"], first["exhaustive"], first["known"]) == (7, 3, True, 254)
    text = table_text([location], io.StringIO())
    assert "all tiles of zoom 4 were scored from the index" in text
    assert "tiles that came too late and were not scored: 7 of zoom 4" in text
    assert "tiles enlarged from coarser ones: 3 of zoom 4" in text


def test_a_late_tile_of_a_server_is_still_kept(tmp_path):
    """The search goes on without it; the next search has it."""
    go_on = threading.Event()

    def slowly(request):
        assert go_on.wait(LATEST_S)
        send(request, 200, {"Content-Type": "image/png"}, tile_picture(3, 7, 7, size=16))

    with Server() as server, ExitStack() as released:
        released.callback(go_on.set)
        server.always["3/7/7"] = slowly
        cache = TileCache(tmp_path / "tiles.mbtiles", {"name": "test", IDENTITY_KEY: "test"})
        description = SourceDescription(template=server.address + "/{z}/{x}/{y}.png", concurrency=4)
        with closing(HttpSource(description, cache)) as source:
            arrived = hand_on(
                source,
                3,
                all_xy(3),
                lambda pixels, digests: None,
                batch=32,
                progress=lambda done: None,
                until=time.monotonic() + 1,
            )
            assert arrived.late and arrived.rows[63] == -1 and arrived.rows.max() > 0
            go_on.set()
            end = time.monotonic() + LATEST_S
            while not (kept := cache.get([Tile(3, 7, 7)])) and time.monotonic() < end:
                time.sleep(0.02)
            assert kept
    assert server.tiles_asked()["/3/7/7.png"] == 1
