"""Embeddings kept in memory between the searches of one process."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from fakes import AddressTiles, HostEncoders, Oracle

from geoengine.engine.index.known_rows import KnownRows
from geoengine.engine.index.memory_rows import MemoryRows
from geoengine.engine.search import SearchConfig, search


def ids(*numbers):
    return np.array(numbers, dtype=np.uint64)


def rows_of(zoom, tiles):
    return np.stack([tiles * 0 + zoom, tiles], axis=1).astype(np.float16)


def look_up(store, zoom, *numbers):
    into = np.full((len(numbers), 2), -1, dtype=np.float16)
    found = store.look_up(zoom, ids(*numbers), into)
    return found.tolist(), into[:, 1].tolist()


def test_what_was_kept_is_found_at_its_own_zoom():
    store = MemoryRows(2, 1000)
    store.keep(4, ids(1, 5, 9), rows_of(4, ids(1, 5, 9)))
    assert look_up(store, 4, 9, 2, 1) == ([True, False, True], [9, -1, 1])
    assert look_up(store, 6, 9) == ([False], [-1])
    assert look_up(store, 4) == ([], [])
    store.keep(4, ids(5), rows_of(4, ids(7)))
    assert look_up(store, 4, 5) == ([True], [7])
    assert len(store) == 3


def test_the_least_used_go_when_it_is_full():
    store = MemoryRows(2, 4 * 3)
    for number in (1, 2, 3):
        store.keep(4, ids(number), rows_of(4, ids(number)))
    look_up(store, 4, 1)
    store.keep(4, ids(8, 9), rows_of(4, ids(8, 9)))
    assert look_up(store, 4, 1, 2, 3, 8, 9) == ([True, False, False, True, True], [1, -1, -1, 8, 9])
    many = ids(*range(100, 140))
    store.keep(6, many, rows_of(6, many))
    assert len(store) == 3
    assert look_up(store, 6, 137, 138, 139)[1] == [137, 138, 139]


def test_threads_see_whole_rows():
    store = MemoryRows(2, 4 * 64)

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(200):
            tiles = np.unique(rng.integers(0, 200, 16)).astype(np.uint64)
            store.keep(4, tiles, rows_of(4, tiles))
            found, there = look_up(store, 4, *tiles.tolist())
            assert all(not f or t == tile for f, t, tile in zip(found, there, tiles.tolist(), strict=True))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(store) == 64


def test_a_second_search_reads_nothing_and_finds_the_same():
    oracle, source = Oracle((2, 4, 6)), AddressTiles()
    known = KnownRows(12, None, MemoryRows(12, 1 << 20))
    query = oracle.photos([12.5], [41.9])
    first, second = (
        search(query, source, HostEncoders(oracle.encode), SearchConfig(k=3, levels=(2, 4, 6)), known=known)
        for _ in range(2)
    )
    assert [level.beam for level in first[0]] == [level.beam for level in second[0]]
    assert sum(len(tiles) for _, tiles in source.reads) == sum(level.candidates for level in first[0])
    assert all(level.known == level.candidates for level in second[0])
