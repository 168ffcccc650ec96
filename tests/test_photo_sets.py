"""Photos listed in folders, tables and tars: what is found, and what is said of damaged ones."""

import itertools
import os
import pickle
import subprocess
import sys
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_sets import jpeg, write_table, write_tar

from geoengine.engine.errors import MissingExtraError, PhotoError
from geoengine.engine.photo_sets import PhotoSetError, open_photo_set
from geoengine.engine.tiles import LngLat

PARIS = LngLat(2.35, 48.85)


def keys(photo_set):
    return [entry.key for entry in photo_set]


# --- tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        "IMG_ID,AUTHOR,LAT,LON",
        "id,uploader,lat,lng",
        "image,user_id,latitude,longitude",
        "Path,Author,Lat,Long",
        "filename,owner,Latitude,lon",
        "key,photographer, lat ,LNG",
    ],
)
@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_columns_have_many_names(tmp_path, head, mark):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(jpeg())
    text = f"{head}\na/1.jpg,ann,48.85,2.35\n".replace(",", mark)
    for name in ("photos.csv", "photos.tsv"):
        [entry] = open_photo_set(write_table(tmp_path / name, text), need_place=True)
        assert (entry.key, entry.author, entry.place, entry.row) == ("a/1.jpg", "ann", PARIS, 2)
        assert entry.read() == jpeg()


def test_photos_lie_in_the_folder_that_is_given(tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / "all" / "2.JPG").write_bytes(jpeg(2))
    table = write_table(tmp_path / "t.csv", "IMG_ID,LAT,LON\n34/8d/1.jpg,1,2\n1,1,2\n2.JPG,1,2\ngone,1,2\n")
    entries = list(open_photo_set(table, photos=tmp_path / "all"))
    assert [entry.read() for entry in entries[:3]] == [jpeg(1), jpeg(1), jpeg(2)]
    with pytest.raises(PhotoError, match="all/gone: there is no such file"):
        entries[3].read()


def test_addresses_are_kept_for_those_who_fetch_them(tmp_path):
    (tmp_path / "here.jpg").write_bytes(jpeg())
    table = write_table(
        tmp_path / "t.csv", "id,file,url\n1,here.jpg,https://h.example/1\n2,gone.jpg,https://h.example/2\n"
    )
    here, gone = open_photo_set(table)
    assert here.read() == jpeg()
    assert (gone.url, gone.file) == ("https://h.example/2", None)
    with pytest.raises(PhotoError, match=r"2: only its address https://h\.example/2 is known; download"):
        gone.read()


def test_a_list_of_ids_and_addresses_needs_no_names(tmp_path):
    table = write_table(
        tmp_path / "mp16_urls.csv", "a/1.jpg,http://h.example/1\na/2.jpg,http://h.example/2\n"
    )
    entries = list(open_photo_set(table))
    assert [(entry.key, entry.url, entry.row) for entry in entries] == [
        ("a/1.jpg", "http://h.example/1", 1),
        ("a/2.jpg", "http://h.example/2", 2),
    ]


def test_quoted_cells_empty_lines_and_a_byte_order_mark(tmp_path):
    table = tmp_path / "t.csv"
    table.write_bytes('\ufeffid,lat,lon,title\r\n1,48.85,2.35,"a\r\nb, c"\r\n\r\n2,48.85,2.35,ü\r\n'.encode())
    photo_set = open_photo_set(table, need_place=True)
    assert [(entry.key, entry.row) for entry in photo_set] == [("1", 3), ("2", 5)]
    assert photo_set.count() == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "id,lat\n1,2\n",
            r"no column for the longitude \(lon, lng, LON or longitude\); its columns are id, lat",
        ),
        ("lat,lon\n1,2\n", r"no column for the photo \(key, id"),
        ("a,b\n1,2\n", "for the photo .* and none for the latitude .* and none for the longitude"),
        ("", "expected column names in its first row; it is empty"),
        ("id,lat,lon\n1,1,2\n2,95.5,2\n", r"t\.csv, row 3: the latitude 95.5 is not from -90 to 90"),
        ("id,lat,lon\n1,151.2,-33.9\n", "row 2: the latitude 151.2 .*; are latitude and longitude swapped"),
        ("id,lat,lon\n1,1,-180.5\n", r"row 2: the longitude -180.5 is not from -180 to 180$"),
        ("id,lat,lon\n1,,2\n", "row 2: there is no latitude"),
        ("id,lat,lon\n1,1,east\n", "row 2: the longitude 'east' is not a number of degrees"),
        ("id,lat,lon\n1,nan,2\n", "row 2: the latitude nan is not from"),
        ("id,lat,lon\n1,1\n", "row 2: it has 2 cells, expected 3"),
        ("id,lat,lon\n,1,2\n", "row 2: it names no photo"),
        ('id,lat,lon\n"1,1,2\n', "a row cannot be read"),
    ],
)
def test_what_is_wrong_with_a_table(tmp_path, text, message):
    with pytest.raises(PhotoSetError, match=message):
        list(open_photo_set(write_table(tmp_path / "t.csv", text), need_place=True))


def test_text_in_another_encoding(tmp_path):
    table = tmp_path / "t.csv"
    table.write_bytes("id,lat,lon\nü,1,2\n".encode("latin-1"))
    with pytest.raises(PhotoSetError, match="not UTF-8 text"):
        list(open_photo_set(table))


def test_places_matter_only_to_those_who_need_them(tmp_path):
    table = write_table(tmp_path / "t.csv", "id,lat,lon\n1,,\n2,151,2\n3,48.85,2.35\n")
    assert [entry.place for entry in open_photo_set(table)] == [None, None, PARIS]
    assert [entry.place for entry in open_photo_set(write_table(tmp_path / "u.csv", "id\n1\n"))] == [None]


# --- Parquet -----------------------------------------------------------------------------------------------


def test_parquet_tables(tmp_path):
    (tmp_path / "1.jpg").write_bytes(jpeg())
    table = pa.table({"IMG_ID": ["1", "2"], "LAT": [48.85, 1.0], "LON": [2.35, 2.0], "AUTHOR": [7, None]})
    pq.write_table(table, tmp_path / "t.parquet")
    photo_set = open_photo_set(tmp_path / "t.parquet", need_place=True)
    first, second = photo_set
    assert (first.key, first.place, first.author, first.row) == ("1", PARIS, "7", 1)
    assert first.read() == jpeg()
    assert (second.author, second.row, photo_set.count()) == ("", 2, 2)


def test_parquet_files_with_pictures_in_them(tmp_path):
    pictures = [{"bytes": jpeg(shade), "path": f"{shade}.jpg"} for shade in range(3)]
    pq.write_table(pa.table({"image": pictures}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"jpg": [jpeg(0), jpeg(1)]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"image": [jpeg(0)], "id": [9]}), tmp_path / "c.parquet")
    entries = list(open_photo_set(tmp_path / "a.parquet"))
    assert [(entry.key, entry.read()) for entry in entries] == [(f"{n}.jpg", jpeg(n)) for n in range(3)]
    assert [entry.read() for entry in open_photo_set(tmp_path / "b.parquet")] == [jpeg(0), jpeg(1)]
    assert keys(open_photo_set(tmp_path / "b.parquet")) == ["000000001", "000000002"]
    assert keys(open_photo_set(tmp_path / "[bc].parquet")) == ["000000001", "000000002", "9"]


def test_a_damaged_parquet_file(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"id": list(range(1000))}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(PhotoSetError, match=r"t\.parquet: the Parquet file is damaged"):
        open_photo_set(path)


def test_parquet_without_its_extra(tmp_path, monkeypatch):
    pq.write_table(pa.table({"id": [1]}), tmp_path / "t.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'geoengine\[parquet\]'"):
        open_photo_set(tmp_path / "t.parquet")


# --- folders -----------------------------------------------------------------------------------------------


def test_folders_are_searched_to_the_bottom(tmp_path):
    for name in ("b/2.png", "b/10.jpg", "a.jpg", "b/c/d.webp", ".hidden/x.jpg", "b/.y.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jpeg())
    (tmp_path / "b" / "back").symlink_to(tmp_path)
    photo_set = open_photo_set(tmp_path)
    assert keys(photo_set) == ["a.jpg", "b/10.jpg", "b/2.png", "b/c/d.webp"]
    assert photo_set.count() == 4
    assert [entry.row for entry in photo_set] == [1, 2, 3, 4]
    assert next(iter(photo_set)).read() == jpeg()


def test_one_photo(tmp_path):
    for name in ("a.jpg", "a.jpg~", "photo"):
        (tmp_path / name).write_bytes(jpeg())
        [entry] = open_photo_set(tmp_path / name)
        assert (entry.key, entry.read(), entry.place) == (name, jpeg(), None)
    with pytest.raises(PhotoSetError, match="a photo alone has no known place"):
        open_photo_set(tmp_path / "a.jpg", need_place=True)


def test_the_one_table_in_a_folder_gives_the_places(tmp_path):
    (tmp_path / "1.jpg").write_bytes(jpeg())
    with pytest.raises(PhotoSetError, match=r"places must come from one .* it has none"):
        open_photo_set(tmp_path, need_place=True)
    write_table(tmp_path / "meta.csv", "image,lat,lon\n1.jpg,48.85,2.35\n")
    [entry] = open_photo_set(tmp_path, need_place=True)
    assert (entry.place, entry.read()) == (PARIS, jpeg())
    write_table(tmp_path / "more.csv", "image,lat,lon\n1.jpg,48.85,2.35\n")
    with pytest.raises(PhotoSetError, match=r"it has meta\.csv, more\.csv"):
        open_photo_set(tmp_path, need_place=True)


def test_a_folder_of_tars_stands_for_them(tmp_path):
    for split in ("test", "train"):
        (tmp_path / split).mkdir()
        for number in range(2):
            place = {"latitude": 48.85, "longitude": 2.35, "author": "ann"}
            write_tar(
                tmp_path / split / f"{number}.tar", {f"{split}{number}": {"jpg": jpeg(), "json": place}}
            )
    (tmp_path / "splits.json").write_text("{}")
    photo_set = open_photo_set(tmp_path / "train", need_place=True)
    assert [(entry.key, entry.place, entry.author) for entry in photo_set] == [
        ("train0", PARIS, "ann"),
        ("train1", PARIS, "ann"),
    ]
    with pytest.raises(PhotoSetError, match=r"several splits; name one of them: .*/test, .*/train"):
        open_photo_set(tmp_path)


# --- tars --------------------------------------------------------------------------------------------------


def test_tars_are_read_in_place(tmp_path):
    samples = {
        "a/1": {
            "json": {"lat": 48.85, "lon": 2.35, "url": "https://h.example/1"},
            "txt": b"-",
            "jpg": jpeg(1),
        },
        "a/2": {"txt": b"no photo"},
        "3": {"png": jpeg(3)},
    }
    write_tar(tmp_path / "t-007.tar", samples)
    write_tar(tmp_path / "t-008.tar", {"4": {"jpg": jpeg(4)}})
    first, third = open_photo_set(tmp_path / "t-007.tar")
    assert (first.key, first.place, first.url, first.row) == ("a/1", PARIS, "https://h.example/1", 1)
    assert (first.data, third.data, third.row) == (None, None, 3)
    assert pickle.loads(pickle.dumps(first)).read() == jpeg(1)
    assert third.read() == jpeg(3)
    for pattern in ("t-{007..008}.tar", "t-00{7,8}.tar", "t-*.tar"):
        assert keys(open_photo_set(str(tmp_path / pattern))) == ["a/1", "3", "4"]
    with pytest.raises(PhotoSetError, match=r"there is no file .*t-009\.tar"):
        open_photo_set(str(tmp_path / "t-{007..009}.tar"))


def test_a_tar_that_ends_early_is_told_wherever_it_ends(tmp_path):
    whole = write_tar(tmp_path / "t.tar", {str(n): {"jpg": jpeg(n), "json": {"lat": 1}} for n in range(3)})
    data, cut = whole.read_bytes(), tmp_path / "cut.tar"
    end = max(entry.offset + entry.size for entry in open_photo_set(whole))
    for length in (0, 100, 512, 700, end // 2, end // 2 // 512 * 512, end - 1, -(-end // 512) * 512 + 1024):
        cut.write_bytes(data[:length])
        with pytest.raises(PhotoSetError, match=r"cut\.tar: the tar ends early or is damaged"):
            list(open_photo_set(cut))
    cut.write_bytes(b"\x1f\x8b" + data)
    with pytest.raises(PhotoSetError, match="compressed; unpack"):
        open_photo_set(cut)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"lat": 91, "lon": 2}, r"t\.tar, sample 1: the latitude 91"),
        ({"lat": 151, "lon": -33}, "swapped"),
        ({}, "sample 1: there is no longitude"),
        ([1], r"1\.json must be a JSON object"),
        (b"{", r"1\.json is not valid JSON"),
    ],
)
def test_what_is_wrong_with_a_sample(tmp_path, metadata, message):
    write_tar(tmp_path / "t.tar", {"1": {"jpg": jpeg(), "json": metadata}})
    with pytest.raises(PhotoSetError, match=message):
        open_photo_set(tmp_path / "t.tar", need_place=True)


# --- all of them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gone.csv", "gone", "t-*.tar", "t.tar.gz", "empty"])
def test_what_is_no_set_of_photos(tmp_path, name):
    (tmp_path / "t.tar.gz").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PhotoSetError, match=r"there is no such file|no photos that can be listed|no images"):
        open_photo_set(tmp_path / name)


def test_the_identity_is_that_of_what_is_listed(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "1.jpg").write_bytes(jpeg())
    write_table(tmp_path / "t.csv", "id\n1\n2\n")
    pq.write_table(pa.table({"id": [1, 2]}), tmp_path / "t.parquet")
    write_tar(tmp_path / "t.tar", {"1": {"jpg": jpeg()}})
    names = ["f", "f/1.jpg", "t.csv", "t.parquet", "t.tar"]
    before = [open_photo_set(tmp_path / name).identity for name in names]
    assert len(set(before)) == len(names)
    assert all(len(identity) == 64 for identity in before)
    os.rename(tmp_path / "f", tmp_path / "g")
    assert open_photo_set(tmp_path / "g").identity == before[0]
    (tmp_path / "g" / "2.jpg").write_bytes(jpeg())
    write_table(tmp_path / "t.csv", "id\n1\n3\n")
    pq.write_table(pa.table({"id": [1, 3]}), tmp_path / "t.parquet")
    write_tar(tmp_path / "t.tar", {"1": {"jpg": jpeg(9)}})
    after = [open_photo_set(tmp_path / name).identity for name in ("g", "t.csv", "t.parquet", "t.tar")]
    assert not set(after) & set(before)


@pytest.mark.parametrize("kind", ["csv", "parquet", "tar"])
def test_reading_takes_little_memory(tmp_path, kind):
    count, path = 20_000, tmp_path / f"t.{kind}"
    if kind == "csv":
        rows = (f"{n},48.85,2.35,{'x' * 200}" for n in range(count))
        write_table(path, "id,lat,lon,title\n" + "\n".join(rows) + "\n")
    elif kind == "parquet":
        pq.write_table(pa.table({"id": list(range(count)), "title": ["x" * 200] * count}), path)
    else:
        count = 3_000
        write_tar(path, {str(n): {"jpg": b"x" * 2000} for n in range(count)})
    next(iter(open_photo_set(path)))  # what it imports is not counted
    tracemalloc.start()
    assert sum(1 for _ in open_photo_set(path)) == count
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (8 << 20 if kind == "parquet" else 1 << 20)


def test_a_reading_can_stop_and_begin_again(tmp_path):
    photo_set = open_photo_set(write_table(tmp_path / "t.csv", "id\n1\n2\n3\n"))
    assert [entry.key for entry in itertools.islice(photo_set, 2)] == ["1", "2"]
    assert keys(photo_set) == ["1", "2", "3"]


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.jpg")
    write_table(tmp_path / "t.csv", "file\np.jpg\n")
    code = (
        "from geoengine.engine.photo_sets import open_photo_set\n"
        f"[entry] = open_photo_set({str(tmp_path / 't.csv')!r})\n"
        "try: entry.read()\nexcept Exception as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert "this is a device or pipe, not a photo" in done.stdout
