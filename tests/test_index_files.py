"""Files of a tile index: what is written is read back, and what is damaged is refused."""

import numpy as np
import pytest

from geoengine.engine.index.errors import IndexFileError
from geoengine.engine.index.segments import (
    Segment,
    find,
    merge_segments,
    tile_ids,
    tiles_of_ids,
    write_segment,
)
from geoengine.engine.tiles import Tile, all_xy, descendants_xy, quadkey


def unit_rows(count, d=6, seed=0):
    rows = np.random.default_rng(seed).normal(size=(count, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def ids_of(*numbers):
    return np.array(numbers, dtype=np.uint64)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "z05.rows"
    write_segment(path, 5, ids_of(3, 9, 1000), ids_of(4, 1023), 6, [unit_rows(2), unit_rows(1, seed=1)])
    return path


def test_a_tiles_id_is_its_quadkey_as_a_number():
    rng = np.random.default_rng(2)
    for z in (1, 7, 16, 30):
        xy = rng.integers(0, 1 << z, (50, 2))
        ids = tile_ids(xy)
        assert ids.dtype == np.uint64
        assert ids.tolist() == [int(quadkey(Tile(z, x, y)), 4) for x, y in xy.tolist()]
        np.testing.assert_array_equal(tiles_of_ids(ids), xy)


def test_tiles_in_a_tile_lie_side_by_side():
    ids = np.sort(tile_ids(descendants_xy([(5, 9)], 4, 7)))
    assert (np.diff(ids) == 1).all() and len(ids) == 64
    assert len(np.unique(tile_ids(all_xy(5)))) == 1024


def test_a_segment_is_read_where_it_lies(file):
    segment = Segment.open(file)
    assert segment.zoom == 5 and segment.rows.shape == (3, 6) and segment.rows.dtype == np.float16
    assert (segment.ids.tolist(), segment.missing.tolist()) == ([3, 9, 1000], [4, 1023])
    np.testing.assert_array_equal(segment.rows, np.concatenate([unit_rows(2), unit_rows(1, seed=1)]))
    assert isinstance(segment.rows, np.memmap) and segment.rows.flags.aligned
    segment.check()
    assert [path.name for path in file.parent.iterdir()] == ["z05.rows"]


def test_an_empty_segment(tmp_path):
    write_segment(tmp_path / "a", 3, ids_of(), ids_of(1), 6, [])
    segment = Segment.open(tmp_path / "a")
    segment.check()
    assert segment.rows.shape == (0, 6) and segment.missing.tolist() == [1]


@pytest.mark.parametrize("cut", [0, 40, 64, 80, 100])
def test_a_file_cut_short_is_refused_when_it_is_opened(file, cut):
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(IndexFileError, match=r"no file of a tile index|damaged: it has \d+ bytes instead of"):
        Segment.open(file)


def test_a_file_of_something_else_is_refused(file):
    file.write_bytes(b"PK" + file.read_bytes()[2:])
    with pytest.raises(IndexFileError, match="no file of a tile index"):
        Segment.open(file)


def test_a_changed_byte_is_found_by_the_check(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(IndexFileError, match="its SHA-256 is not the one in its header"):
        Segment.open(file).check()


@pytest.mark.parametrize(
    ("ids", "rows", "sentence"),
    [
        ([9, 3], unit_rows(2), "not those of zoom 5, in order"),
        ([3, 3], unit_rows(2), "not those of zoom 5, in order"),
        ([3, 1024], unit_rows(2), "not those of zoom 5, in order"),
        ([3, 4], unit_rows(2) * np.float16(1.1), "not of length 1"),
        ([3, 4], unit_rows(2) * np.float16("nan"), "not of length 1"),
    ],
)
def test_the_check_finds_rows_that_cannot_be_right(tmp_path, ids, rows, sentence):
    write_segment(tmp_path / "a", 5, ids_of(*ids), ids_of(), 6, [rows])
    with pytest.raises(IndexFileError, match=sentence):
        Segment.open(tmp_path / "a").check()


def test_a_write_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(IndexFileError, match="cannot be written"):
        write_segment(tmp_path / "no" / "a", 5, ids_of(), ids_of(), 6, [])

    def broken():
        yield unit_rows(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_segment(tmp_path / "a", 5, ids_of(1, 2), ids_of(), 6, broken())
    assert list(tmp_path.iterdir()) == []


def test_merging_keeps_each_tile_once_and_the_first_of_two(tmp_path):
    rng = np.random.default_rng(4)
    segments, expected = [], {}
    for number in range(4):
        ids = np.sort(rng.choice(20_000, 6000, replace=False)).astype(np.uint64)
        rows = unit_rows(len(ids), d=2, seed=number)
        write_segment(tmp_path / str(number), 9, ids, ids_of(20_000 + number, 30_000), 2, [rows])
        segments.append(Segment.open(tmp_path / str(number)))
        for tile, row in zip(ids.tolist(), rows, strict=True):
            expected.setdefault(tile, row)
    merge_segments(tmp_path / "all", segments)
    merged = Segment.open(tmp_path / "all")
    merged.check()
    assert merged.ids.tolist() == sorted(expected)
    np.testing.assert_array_equal(merged.rows, [expected[tile] for tile in sorted(expected)])
    assert merged.missing.tolist() == [20_000, 20_001, 20_002, 20_003, 30_000]


def test_finding_ids():
    assert find(ids_of(2, 5, 9), ids_of(9, 1, 2, 10)).tolist() == [2, -1, 0, -1]
    assert find(ids_of(), ids_of(1)).tolist() == [-1]
