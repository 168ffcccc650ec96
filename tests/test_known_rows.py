"""Searches that know some tiles before they read them: from an index, or from earlier searches."""

import logging
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from fakes import AddressTiles, HostEncoders, Oracle, addresses

from geoengine.engine.bundle import EngineBundle
from geoengine.engine.index import known_rows as known_rows_module
from geoengine.engine.index.building import build_index
from geoengine.engine.index.known_rows import KnownRows, RowCache
from geoengine.engine.index.segments import tile_ids
from geoengine.engine.index.tile_index import Maker
from geoengine.engine.regions import parse_region
from geoengine.engine.search import SearchConfig, search
from geoengine.engine.tiles import LngLat, LngLatBbox, all_xy, descendants, parent, tile_at

LEVELS = (4, 6, 8, 10)
D = 4 * len(LEVELS)
MAKER = Maker(
    encoder="e", source="addresses", width=D, model="m", backend="b", variant="v", tiles="t",
    attribution="", world="earth",
)  # fmt: skip
LNG, LAT = np.array([7.5, -120.3, 151.2, 7.51]), np.array([46.9, 38.5, -33.9, 46.91])


class CountingEncoders(HostEncoders):
    """The oracle's encoders; `count` pictures went through them."""

    name, variant = "made", "fp32"

    def __init__(self, levels=LEVELS):
        self.count = 0
        oracle = Oracle(levels)

        def encode(encoder, pixels):
            self.count += len(pixels)
            return oracle.encode(encoder, pixels)

        super().__init__(encode)


def find(known, source=None, *, k=3, levels=LEVELS, within=None, places=slice(None)):
    """Levels of each photo, the source that was read, and the number of pictures that were encoded."""
    source, encoders = source or AddressTiles(), CountingEncoders()
    config = SearchConfig(k=k, levels=levels, within=within)
    photos = Oracle(LEVELS).photos(LNG[places], LAT[places])
    return search(photos, source, encoders, config, known=known), source, encoders.count


def without_counts(found):
    return [[replace(level, known=0) for level in levels] for levels in found]


def cached(folder):
    return KnownRows(D, None, RowCache(folder, MAKER))


# --- rows kept from searches ------------------------------------------------------------------------------


def test_what_was_seen_once_is_neither_read_nor_encoded_again(tmp_path):
    cold, source, count = find(cached(tmp_path))
    assert count > 300 and len(source.reads) == 4
    assert {level.known for levels in cold for level in levels} == {0}
    warm, source, count = find(cached(tmp_path))  # another object: as another process would
    assert (source.reads, count) == ([], 0)
    assert without_counts(warm) == without_counts(cold)
    assert all(level.known == level.candidates for levels in warm for level in levels)


def test_the_answers_are_those_of_a_search_without_a_cache(tmp_path):
    plain, _, _ = find(None)
    kept, _, _ = find(cached(tmp_path))
    for levels, others in zip(plain, kept, strict=True):
        assert [level.beam[0].tile for level in levels] == [level.beam[0].tile for level in others]
        for level, other in zip(levels, others, strict=True):
            scores, half = ([s.score for s in one.beam] for one in (level, other))
            np.testing.assert_allclose(scores, half, atol=2e-3)


def test_a_second_photo_nearby_reads_only_what_is_new(tmp_path):
    _, _, first = find(cached(tmp_path), places=[0])
    [levels], source, count = find(cached(tmp_path), places=[3])
    assert levels[-1].beam[0].tile == tile_at(LngLat(7.51, 46.91), 10)
    assert count < first / 5
    for zoom, read in source.reads:
        level = next(level for level in levels if level.zoom == zoom)
        assert len(read) == level.candidates - level.known


def test_tiles_that_are_missing_are_asked_for_again(tmp_path):
    """A server that fails for a moment must not make holes that last."""
    [levels], _, _ = find(cached(tmp_path), AddressTiles(missing=lambda z, x, y: x % 2 == 0), places=[0])
    assert levels[0].missing == 128
    [levels], source, _ = find(cached(tmp_path), places=[0])
    assert (levels[0].missing, levels[0].known, len(source.reads[0][1])) == (0, 128, 128)


def test_other_encoders_or_tiles_have_rows_of_their_own(tmp_path):
    find(cached(tmp_path))
    for changed in ({"encoder": "x"}, {"source": "x"}, {"variant": "x"}, {"backend": "x"}):
        _, _, count = find(KnownRows(D, None, RowCache(tmp_path, replace(MAKER, **changed))), places=[0])
        assert count > 256
    _, _, count = find(KnownRows(D, None, RowCache(tmp_path, replace(MAKER, tiles="renamed"))))
    assert count == 0


def some_rows(count, seed):
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(1 << 20, count, replace=False)).astype(np.uint64)
    rows = rng.normal(size=(count, D))
    return ids, (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def open_cache(folder):
    cache = RowCache(folder, MAKER)
    cache.refresh()
    return cache


def assert_has(cache, ids, rows):
    into = np.zeros_like(rows)
    assert cache.look_up(10, ids, into).all()
    np.testing.assert_array_equal(into, rows)


def test_many_small_files_become_few(tmp_path):
    cache, other = open_cache(tmp_path), open_cache(tmp_path)
    parts = [some_rows(50, seed) for seed in range(70)]
    for ids, rows in parts:
        cache.keep(10, ids, rows)
        other.refresh()
    assert len(list(cache.folder.rglob("*.rows"))) < 40
    files = {segment.path for segment in other._index.segments[10]}
    assert files == set(cache.folder.rglob("*.rows")), "it holds on to no file that is gone"
    for known in (cache, other, open_cache(tmp_path)):
        found = known.look_up(10, np.concatenate([ids for ids, _ in parts]), np.zeros((3500, D), np.float16))
        assert found.all()
        assert_has(known, *parts[0])


def test_the_oldest_rows_go_when_there_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(known_rows_module, "MOST_BYTES", 40 * 50 * D * 2)
    cache = open_cache(tmp_path)
    for seed in range(200):
        cache.keep(10, *some_rows(50, seed))
    total = sum(file.stat().st_size for file in cache.folder.rglob("*.rows"))
    assert total < 2.2 * 40 * 50 * (D * 2 + 8)
    assert_has(cache, *some_rows(50, 199))


@pytest.mark.parametrize(
    "damage", [lambda file: file.write_bytes(b""), lambda file: file.write_bytes(bytes(99))]
)
def test_a_damaged_file_is_dropped_and_the_others_are_used(tmp_path, caplog, damage):
    cache = open_cache(tmp_path)
    for seed in (1, 2):
        cache.keep(10, *some_rows(50, seed))
    first = min(cache.folder.rglob("*.rows"), key=lambda file: file.stat().st_mtime_ns)
    damage(first)
    again = open_cache(tmp_path)
    assert "no file of a tile index" in caplog.text and not first.exists()
    assert_has(again, *some_rows(50, 2))


def test_a_cache_that_cannot_be_used_costs_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    known = cached(tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        found, _, count = find(known)
        find(known)
    assert count > 300 and found[0][-1].beam
    assert caplog.text.count("the search goes on without its row cache") == 1


def test_a_disk_that_fills_up_costs_one_warning(tmp_path, caplog, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    known = cached(tmp_path)
    monkeypatch.setattr(known_rows_module, "write_segment", full)
    found, _, _ = find(known)
    assert found[0][-1].beam
    assert caplog.text.count("No space left on device") == 1


KEEP_FOREVER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_known_rows as t
cache = t.open_cache(Path(sys.argv[2]))
for seed in range(int(sys.argv[3]), 1_000_000, 2):
    cache.keep(10, *t.some_rows(50, seed))
    cache.refresh()
    print(seed, flush=True)
"""


def test_processes_share_a_cache_and_may_be_killed(tmp_path):
    """Two write and join files at once, and are killed: what they said to have kept is there, and sound."""
    command = [sys.executable, "-c", KEEP_FOREVER, os.path.dirname(__file__), str(tmp_path)]
    writers = [
        subprocess.Popen([*command, str(first)], stdout=subprocess.PIPE, text=True) for first in (0, 1)
    ]
    kept = []
    try:
        for _ in range(60):
            kept += [int(writer.stdout.readline()) for writer in writers]
    finally:
        for writer in writers:
            writer.kill()
        for writer in writers:
            kept += [int(line) for line in writer.stdout.read().splitlines() if line.isdigit()][:-1]
            writer.wait()
            writer.stdout.close()
    cache = open_cache(tmp_path)
    for level in cache._index.segments.values():
        for segment in level:
            segment.check()
    for seed in kept:
        ids, rows = some_rows(50, seed)
        assert cache.look_up(10, ids, np.zeros_like(rows)).all()


# --- an index ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle():
    opened = EngineBundle.open("planet", verify=False)
    return replace(opened, manifest=replace(opened.manifest, embed_dim=D, weights="a" * 64))


@pytest.fixture(scope="module")
def index(bundle, tmp_path_factory):
    return build_index(
        tmp_path_factory.mktemp("index"), bundle, AddressTiles(), CountingEncoders(), zooms=(4, 6)
    )


def test_indexed_levels_are_scored_whole_and_not_read(index):
    found, source, _ = find(KnownRows(D, index, None))
    assert [zoom for zoom, _ in source.reads] == [8, 10]
    for levels, lng, lat in zip(found, LNG, LAT, strict=True):
        assert [level.candidates for level in levels] == [256, 4096, 48, 48]
        assert [level.exhaustive for level in levels] == [True, True, False, False]
        assert [level.known for level in levels] == [256, 4096, 0, 0]
        assert levels[-1].beam[0].tile == tile_at(LngLat(lng, lat), 10)
        below = {tile[1:] for scored in levels[1].beam for tile in descendants(scored.tile, 8)}
        assert {scored.tile[1:] for scored in levels[2].beam} <= below


def test_a_whole_level_finds_what_a_beam_has_lost(bundle, tmp_path):
    """The tile of zoom 4 with the best tile of zoom 6 in it is not the best one of zoom 4."""
    rng = np.random.default_rng(0)
    query = rng.normal(size=(1, D)).astype(np.float32)
    query /= np.linalg.norm(query)

    def encode(encoder, pixels):
        rows = np.stack([np.random.default_rng(a.tolist()).normal(size=D) for a in addresses(pixels)])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    encoders = HostEncoders(encode)
    encoders.name, encoders.variant = "made", "fp32"
    index = build_index(tmp_path, bundle, AddressTiles(), encoders, zooms=(4, 6))
    config = SearchConfig(k=2, levels=(4, 6), top=2)
    [levels] = search(query, AddressTiles(), encoders, config, known=KnownRows(D, index, None))
    [beam] = search(query, AddressTiles(), encoders, config)
    every = encode("z06", np.column_stack([np.full(4096, 6), all_xy(6)]).astype(np.int32).view(np.uint8))
    best = all_xy(6)[np.argmax(every @ query[0])]
    assert levels[1].beam[0].tile[1:] == tuple(best)
    assert levels[1].beam[0].score > beam[1].beam[0].score
    lost = parent(levels[1].beam[0].tile, 4)
    assert lost not in {scored.tile for scored in levels[0].beam}
    [ancestor] = [scored for scored in levels[0].ancestors if scored.tile == lost]
    alone = encode("z04", np.array([lost], np.int32).view(np.uint8).reshape(1, 2, 2, 3))
    assert ancestor.score == pytest.approx(float(alone[0] @ query[0]), abs=2e-3)


def test_levels_above_the_deepest_index_are_searched_only_with_one(bundle, tmp_path):
    index = build_index(tmp_path, bundle, AddressTiles(), CountingEncoders(), zooms=(6,))
    found, source, _ = find(KnownRows(D, index, None))
    assert [[level.zoom for level in levels] for levels in found] == [[6, 8, 10]] * 4
    assert [zoom for zoom, _ in source.reads] == [8, 10]


@pytest.mark.parametrize("land", [False, True])
def test_an_index_of_a_source_with_bounds_is_whole_for_that_source(bundle, tmp_path, land):
    def bounded():
        source = AddressTiles()
        source.bounds = LngLatBbox(-10.0, 35.0, 30.0, 60.0)
        return source

    source = bounded()
    index = build_index(tmp_path, bundle, source, CountingEncoders(), zooms=(4, 6), land=land)
    asked = {tile for zoom, read in source.reads if zoom == 6 for tile in read}
    assert asked <= {tuple(row) for row in parse_region("-10,35,30,60").tiles(6).tolist()}
    [levels], source, _ = find(KnownRows(D, index, None), bounded(), places=[0])
    assert [level.exhaustive for level in levels] == [True, True, False, False]
    assert levels[-1].beam[0].tile == tile_at(LngLat(LNG[0], LAT[0]), 10)
    within = parse_region("-20,40,20,50")
    [levels], _, _ = find(KnownRows(D, index, None), bounded(), places=[0], within=within)
    assert [level.exhaustive for level in levels] == [True, True, False, False]
    assert levels[1].candidates <= len(parse_region("-10,40,20,50").tiles(6))


def test_a_region_of_an_index(index):
    within = parse_region("-130,30,-110,45")
    [levels], _, _ = find(KnownRows(D, index, None), places=[1], within=within)
    assert levels[1].exhaustive and levels[1].candidates == len(within.tiles(6))
    inside = {tuple(row) for row in within.tiles(6).tolist()}
    assert {scored.tile[1:] for scored in levels[1].beam} <= inside
    assert levels[-1].beam[0].tile == tile_at(LngLat(LNG[1], LAT[1]), 10)


def test_an_index_of_another_region_still_spares_reading(bundle, tmp_path):
    area = parse_region("0,40,20,50")
    index = build_index(tmp_path, bundle, AddressTiles(), CountingEncoders(), zooms=(6, 8), area=area)
    [levels], source, _ = find(KnownRows(D, index, None), places=[0])
    assert not any(level.exhaustive for level in levels)
    assert [zoom for zoom, _ in source.reads] == [4, 6, 8, 10]
    inside = {tuple(row) for row in area.tiles(6).tolist()}
    assert not set(source.reads[1][1]) & inside and levels[1].known > 0
    assert levels[-1].beam[0].tile == tile_at(LngLat(LNG[0], LAT[0]), 10)


def test_tiles_that_the_index_knows_to_be_missing_are_not_asked_for(bundle, tmp_path):
    area = parse_region("0,40,20,50")

    def missing(z, x, y):
        return (z == 6) & (x % 2 == 0)

    index = build_index(
        tmp_path, bundle, AddressTiles(missing=missing), CountingEncoders(), zooms=(6,), area=area
    )
    [levels], source, _ = find(KnownRows(D, index, None), AddressTiles(missing=missing), places=[0])
    asked = {tile for zoom, read in source.reads if zoom == 6 for tile in read}
    assert not asked & {tuple(row) for row in area.tiles(6).tolist()} and levels[1].missing > 0


def test_index_and_cache_together(index, tmp_path):
    known = KnownRows(D, index, RowCache(tmp_path, MAKER))
    cold, source, _ = find(known)
    assert [zoom for zoom, _ in source.reads] == [8, 10]
    warm, source, count = find(KnownRows(D, index, RowCache(tmp_path, MAKER)))
    assert (source.reads, count) == ([], 0)
    assert without_counts(warm) == without_counts(cold)
    assert tile_ids(all_xy(4)).max() == 255
