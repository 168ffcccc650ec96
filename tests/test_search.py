"""Algorithm 1, with encoders that know where a tile is and tiles whose pixels are their address."""

import threading

import mercantile
import numpy as np
import pytest
from fakes import AddressTiles, HostEncoders, Oracle, addresses

from geoengine.engine import search as search_module
from geoengine.engine.errors import GeoEngineError, SourceError, TileError
from geoengine.engine.readahead import ReadAhead
from geoengine.engine.search import SearchConfig
from geoengine.engine.sources import TileBatch
from geoengine.engine.tiles import LEVELS, Tile, children, descendants, xy_at


def search(photos, source, encode, config, *, batch=32, **callbacks):
    """A search whose encoders are a function (encoder, uint8[n, S, S, 3]) -> float32[n, d]."""
    return search_module.search(photos, source, HostEncoders(encode, batch), config, **callbacks)


def random_places(count, seed):
    rng = np.random.default_rng(seed)
    return rng.uniform(-180, 180, count), np.degrees(np.arcsin(rng.uniform(-0.996, 0.996, count)))


def random_photos(count, d=8, seed=0):
    rows = np.random.default_rng(seed).normal(size=(count, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def hashed_encode(encoder, pixels, d=8):
    """A fake encoder without any meaning: a random unit vector for each address."""
    rows = [np.random.default_rng(address.tolist()).normal(size=d) for address in np.abs(addresses(pixels))]
    out = np.array(rows, dtype=np.float32).reshape(-1, d)
    return out / np.linalg.norm(out, axis=1, keepdims=True)


# --- the true tile is found -------------------------------------------------------------------------------


def test_true_tile_of_1000_random_places_at_k_1():
    lng, lat = random_places(1000, seed=5)
    oracle = Oracle()
    found = search(oracle.photos(lng, lat), AddressTiles(chunk=5000), oracle.encode, SearchConfig(k=1))
    for levels, a, b in zip(found, lng, lat, strict=True):
        true = mercantile.tile(a, b, 16)
        assert levels[-1].beam[0].tile == (16, true.x, true.y)
        assert [level.zoom for level in levels] == list(LEVELS)
        assert [level.candidates for level in levels] == [256] + [16] * 6


EDGES = [
    (180.0, 85.06),
    (-180.0, -85.06),
    (179.9999, 85.0),
    (-179.9999, 85.051),
    (-180.0, 12.3),
    (180.0, -0.01),
    (0.01, 89.9),
    (-0.01, -89.9),
]


@pytest.mark.parametrize("k", [1, 5])
def test_true_tile_at_the_poles_edges_and_the_antimeridian(k):
    lng, lat = np.array(EDGES).T
    oracle = Oracle()
    found = search(oracle.photos(lng, lat), AddressTiles(), oracle.encode, SearchConfig(k=k))
    for levels, (a, b) in zip(found, EDGES, strict=True):
        for level in levels:
            assert level.beam[0].tile[1:] == tuple(xy_at(a, b, level.zoom)[0])


@pytest.mark.parametrize("levels", [(4,), (4, 8, 16), (0, 1, 2, 3, 7)])
def test_any_levels(levels):
    lng, lat = random_places(2, seed=1)
    oracle = Oracle(levels)
    config = SearchConfig(k=1, levels=levels)
    found = search(oracle.photos(lng, lat), AddressTiles(chunk=5000), oracle.encode, config)
    for photo_levels, a, b in zip(found, lng, lat, strict=True):
        assert [level.zoom for level in photo_levels] == list(levels)
        assert photo_levels[-1].beam[0].tile[1:] == tuple(xy_at(a, b, levels[-1])[0])


# --- Algorithm 1, written down a second time --------------------------------------------------------------


def brute_force(query, encode, k, levels, missing=lambda tile: False):
    """One photo, one tile at a time, with Python's stable sort."""
    candidates = [Tile(levels[0], x, y) for x in range(2 ** levels[0]) for y in range(2 ** levels[0])]
    result = []
    for zoom in levels:
        if zoom != levels[0]:
            candidates = [child for tile, _ in result[-1][3] for child in descendants(tile, zoom)]
        there = [tile for tile in candidates if not missing(tile)]
        scored = [(tile, float(encode(f"z{zoom:02d}", picture(tile))[0] @ query)) for tile in there]
        kept = sorted(scored, key=lambda pair: -pair[1])[:k]
        if not kept:
            break
        result.append((zoom, len(there), len(candidates) - len(there), kept))
    return result


def picture(tile):
    return np.array([tile], dtype=np.int32).view(np.uint8).reshape(1, 2, 2, 3)


def assert_same_levels(levels, expected):
    assert [(level.zoom, level.candidates, level.missing) for level in levels] == [e[:3] for e in expected]
    for level, (_, _, _, kept) in zip(levels, expected, strict=True):
        assert [scored.tile for scored in level.beam] == [tile for tile, _ in kept]
        assert [scored.score for scored in level.beam] == pytest.approx([s for _, s in kept], abs=1e-6)


@pytest.mark.parametrize(("k", "levels"), [(1, (1, 2)), (3, (2, 4, 5)), (16, (2, 4)), (1000, (1, 3, 4))])
def test_equals_brute_force(k, levels):
    queries = random_photos(3)
    found = search(queries, AddressTiles(), hashed_encode, SearchConfig(k=k, levels=levels))
    for photo_levels, query in zip(found, queries, strict=True):
        assert_same_levels(photo_levels, brute_force(query, hashed_encode, k, levels))


def test_k_beyond_the_candidates_keeps_them_all():
    (levels,) = search(random_photos(1), AddressTiles(), hashed_encode, SearchConfig(k=40, levels=(1, 3)))
    assert [len(level.beam) for level in levels] == [4, 40]
    (levels,) = search(random_photos(1), AddressTiles(), hashed_encode, SearchConfig(k=900, levels=(1, 3)))
    assert [len(level.beam) for level in levels] == [4, 64]


def test_ties_keep_exactly_k_in_candidate_order():
    def flat(encoder, pixels):
        return np.tile(np.float32([0.6, 0.8]), (len(pixels), 1))

    config = SearchConfig(k=5, levels=(1, 3))
    (levels,) = search(np.float32([[0.6, 0.8]]), AddressTiles(shuffle=3, chunk=2), flat, config)
    assert [s.tile for s in levels[0].beam] == [Tile(1, x, y) for x in (0, 1) for y in (0, 1)]
    assert [s.tile for s in levels[1].beam] == list(children(Tile(1, 0, 0)))[:5]


def test_candidates_follow_the_beam_not_the_map():
    def east_first(encoder, pixels):
        z, x, _ = addresses(pixels).T
        angle = np.where(z == 1, 1 - x, 0.5)  # zoom 1: the eastern column wins; zoom 3: all tie
        return np.column_stack([np.cos(angle), np.sin(angle)]).astype(np.float32)

    config = SearchConfig(k=3, levels=(1, 3))
    (levels,) = search(np.float32([[1, 0]]), AddressTiles(shuffle=1, chunk=5), east_first, config)
    assert [s.tile for s in levels[0].beam] == [Tile(1, 1, 0), Tile(1, 1, 1), Tile(1, 0, 0)]
    assert [s.tile for s in levels[1].beam] == list(children(Tile(1, 1, 0)))[:3]


# --- several photos, equal tiles, arrival order -----------------------------------------------------------


def test_several_photos_equal_single_calls():
    queries = random_photos(7, seed=4)
    config = SearchConfig(k=4, levels=(3, 5, 7))
    together = search(queries, AddressTiles(), hashed_encode, config)
    for query, levels in zip(queries, together, strict=True):
        (alone,) = search(query[None], AddressTiles(), hashed_encode, config)
        assert alone == levels


def test_photos_share_tiles_and_each_address_is_read_once():
    queries = random_photos(7, seed=4)
    source = AddressTiles()
    found = search(queries, source, hashed_encode, SearchConfig(k=4, levels=(3, 5, 7)))
    assert [z for z, _ in source.reads] == [3, 5, 7]
    for (_, reads), index in zip(source.reads, range(3), strict=True):
        assert len(set(reads)) == len(reads)
        if index:
            wanted = {d[1:] for levels in found for s in levels[index - 1].beam for d in children(s.tile)}
            assert set(reads) == wanted


def test_no_photos_read_nothing():
    source = AddressTiles()
    assert search(np.empty((0, 8), np.float32), source, hashed_encode, SearchConfig()) == []
    assert source.reads == []


def test_equal_pictures_are_encoded_once():
    source = AddressTiles(ocean=lambda z, x, y: (x + y) % 3 > 0, chunk=7)
    encoded = []

    def encode(encoder, pixels):
        assert 0 < len(pixels) <= 32
        encoded.extend(map(tuple, addresses(pixels).tolist()))
        return hashed_encode(encoder, pixels)

    (levels,) = search(random_photos(1), source, encode, SearchConfig(k=9, levels=(4, 6)))
    assert len(encoded) == len(set(encoded))
    assert {a for a in encoded if a[0] == 4 and a[1] >= 0} == {
        (4, x, y) for x in range(16) for y in range(16) if (x + y) % 3 == 0
    }
    assert sum(a[1:] == (-1, -1) for a in encoded) == 2  # the ocean, once a level
    assert [level.candidates for level in levels] == [256, 144]  # and all of its tiles are still scored


def test_chunks_of_one_buffer_give_each_tile_its_own_embedding():
    config = SearchConfig(k=6, levels=(2, 4))
    (levels,) = search(random_photos(1), AddressTiles(chunk=3, shuffle=9), hashed_encode, config, batch=5)
    assert_same_levels(levels, brute_force(random_photos(1)[0], hashed_encode, 6, (2, 4)))


@pytest.mark.parametrize(("shuffle", "chunk"), [(0, 1), (1, 13), (2, 1000)])
def test_arrival_order_does_not_matter(shuffle, chunk):
    def half_equal(encoder, pixels):  # with ties
        _, x, y = addresses(pixels).T
        angle = (x // 2 + y // 2) % 5
        return np.column_stack([np.cos(angle), np.sin(angle)]).astype(np.float32)

    queries = random_photos(3, d=2)
    config = SearchConfig(k=6, levels=(3, 5, 6))
    in_order = search(queries, AddressTiles(), half_equal, config)
    assert search(queries, AddressTiles(shuffle=shuffle, chunk=chunk), half_equal, config) == in_order


# --- missing tiles ----------------------------------------------------------------------------------------


def test_missing_tiles_are_skipped_and_counted():
    def missing(z, x, y):
        return (3 * x + y) % 4 == 1

    queries = random_photos(3, seed=8)
    found = search(queries, AddressTiles(missing=missing), hashed_encode, SearchConfig(k=5, levels=(2, 4, 6)))
    for levels, query in zip(found, queries, strict=True):
        expected = brute_force(query, hashed_encode, 5, (2, 4, 6), lambda t: (3 * t.x + t.y) % 4 == 1)
        assert_same_levels(levels, expected)
        assert [level.missing for level in levels] == [4, 20, 20]
        assert [level.coverage for level in levels] == [0.75] * 3


def test_a_photo_without_tiles_ends_and_the_others_go_on():
    def missing(z, x, y):
        return (z >= 5) & (x < 2 ** (z - 1))  # no deep tiles in the west

    lng, lat = np.array([-100.0, 100.0, -20.0]), np.array([10.0, -40.0, 60.0])
    oracle = Oracle((1, 3, 5, 7))
    source = AddressTiles(missing=missing)
    found = search(oracle.photos(lng, lat), source, oracle.encode, SearchConfig(k=1, levels=(1, 3, 5, 7)))
    assert [[level.zoom for level in levels] for levels in found] == [[1, 3], [1, 3, 5, 7], [1, 3]]
    assert [z for z, _ in source.reads] == [1, 3, 5, 7]
    assert len(source.reads[-1][1]) == 16


def test_when_all_photos_end_nothing_deeper_is_read():
    source = AddressTiles(missing=lambda z, x, y: np.full(len(x), z > 4))
    (levels,) = search(random_photos(1), source, hashed_encode, SearchConfig(k=2))
    assert [level.zoom for level in levels] == [4]
    assert [z for z, _ in source.reads] == [4, 6]


def test_no_tile_at_the_first_level():
    source = AddressTiles(missing=lambda z, x, y: np.full(len(x), True))
    with pytest.raises(SourceError, match=r"addresses has no tile of zoom 4, the first level"):
        search(random_photos(1), source, hashed_encode, SearchConfig())


# --- progress, errors, threads ----------------------------------------------------------------------------


def test_levels_are_told_as_they_are_ranked():
    told = [[], []]
    found = search(
        random_photos(2),
        AddressTiles(),
        hashed_encode,
        SearchConfig(k=2, levels=(2, 4)),
        on_level=lambda photo, level: told[photo].append(level),
    )
    assert [tuple(levels) for levels in told] == found


def test_progress_of_every_level():
    calls = []
    source = AddressTiles(missing=lambda z, x, y: (z == 4) & (x == 0), chunk=20)
    config = SearchConfig(k=2, levels=(2, 4))
    search(random_photos(1), source, hashed_encode, config, progress=lambda *call: calls.append(call))
    assert calls[0] == (0, 2, 0, 16)
    assert (0, 2, 16, 16) in calls
    assert calls[-1] == (1, 4, 32, 32)
    done = [done for index, _, done, _ in calls if index == 1]
    assert done == sorted(done)


def read_ahead_threads():
    return [thread for thread in threading.enumerate() if thread.name == "geoengine-read-ahead"]


@pytest.mark.parametrize("error", [ValueError("the encoder broke"), KeyboardInterrupt()])
def test_an_encoder_that_raises_reaches_the_caller_and_leaves_no_thread(error):
    def encode(encoder, pixels):
        if encoder == "z04":
            raise error
        return hashed_encode(encoder, pixels)

    with pytest.raises(type(error)) as caught:
        search(random_photos(1), AddressTiles(chunk=1), encode, SearchConfig(k=3, levels=(2, 4)))
    assert caught.value is error
    assert read_ahead_threads() == []


def test_a_source_that_raises_reaches_the_caller():
    class Broken(AddressTiles):
        def read(self, z, xy):
            yield from super().read(z, xy[:20])
            raise SourceError("the host is gone")

    with pytest.raises(SourceError, match="the host is gone"):
        search(random_photos(1), Broken(), hashed_encode, SearchConfig(levels=(3,)))
    assert read_ahead_threads() == []


def test_pictures_of_another_shape_are_refused():
    class Ragged(AddressTiles):
        def read(self, z, xy):
            yield TileBatch(np.array([0]), np.zeros((1, 2, 2, 3), np.uint8))
            yield TileBatch(np.array([1]), np.zeros((1, 3, 3, 3), np.uint8))

    with pytest.raises(SourceError, match=r"shape \(1, 3, 3, 3\) instead of uint8 \(1, 2, 2, 3\)"):
        search(random_photos(1), Ragged(), hashed_encode, SearchConfig(levels=(1,)))


def test_read_ahead_keeps_order_and_stays_close():
    produced = []

    def produce():
        for i in range(20):
            produced.append(i)
            yield i

    with ReadAhead(produce, depth=2) as ahead:
        for i in range(20):
            assert ahead.take() == i
            assert max(produced) <= i + 4  # two waiting, one offered, one taken
        with pytest.raises(StopIteration):
            ahead.take()
    assert produced == list(range(20))


def test_leaving_read_ahead_closes_the_producer_on_its_thread():
    closed_on, iterators = [], []

    def numbers():
        try:
            yield from range(1000)
        finally:
            closed_on.append(threading.current_thread().name)

    def produce():
        iterators.append(numbers())  # held, so that it does not just end with its last reference
        return iterators[0]

    with ReadAhead(produce, depth=1) as ahead:
        assert ahead.take() == 0
    assert closed_on == ["geoengine-read-ahead"]
    assert read_ahead_threads() == []


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"k": 0}, GeoEngineError, "k must be at least 1, got 0"),
        ({"top": 0}, GeoEngineError, "top must be at least 1, got 0"),
        ({"levels": ()}, TileError, "at least one zoom"),
        ({"levels": (4, 4)}, TileError, "increase strictly, got 4, 4"),
        ({"levels": (6, 4)}, TileError, "increase strictly, got 6, 4"),
        ({"levels": (-1, 4)}, TileError, "zoom -1 does not exist"),
        ({"levels": (4, 31)}, TileError, "zoom 31 does not exist"),
    ],
)
def test_a_config_that_cannot_be_searched(settings, error, match):
    with pytest.raises(error, match=match):
        SearchConfig(**settings)
