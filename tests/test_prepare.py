"""Preparing a data set from a list of photos: what is kept and split, and gone on with after a kill."""

import csv
import gc
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_photos import GPS, MODEL, ORIENTATION
from made_prepared import HEAD, dropped, listed, photo_server, photos_of, prepared, tree
from made_sets import distinct_photo, write_table, write_tar
from PIL import Image
from typer.testing import CliRunner

from geoengine.cli import app
from geoengine.engine.photo_sets import PhotoSetError, open_photo_set
from geoengine.engine.photo_sets.names import names_of
from geoengine.engine.render.files import OutputError
from geoengine.engine.tiles import LngLat
from geoengine.training.mp16.job import PrepareConfig, PrepareJob
from geoengine.training.mp16.names import Split, key_of, split_of


@pytest.fixture
def server():
    with photo_server() as server:
        yield server


# --- what is kept ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_photos_become_shards_that_others_can_read(server, tmp_path):
    import webdataset

    outcomes, left = prepared(listed(server, tmp_path, 30), tmp_path / "out", shard_size=10)
    assert (outcomes, left) == ({"kept": 30}, 0)
    found = photos_of(tmp_path / "out")
    split, metadata, jpeg = found["p/7.jpg"]
    assert split == split_of("ann7", "p/7.jpg")
    assert metadata == {
        "latitude": 7.0,
        "longitude": 7.0,
        "author": "ann7",
        "id": "p/7.jpg",
        "url": f"{server.address}/p/7.jpg",
        "width": 128,
        "height": 96,
    }
    assert Image.open(io.BytesIO(jpeg)).size == (128, 96)
    splits = json.loads((tmp_path / "out" / "splits.json").read_text())
    assert {name: part["photos"] for name, part in splits["splits"].items()} == {
        split: sum(kept[0] == split for kept in found.values()) for split in Split
    }
    assert splits["splits"]["train"]["shards"][:2] == ["train/000000.tar", "train/000001.tar"]
    assert splits["outcomes"] == {"kept": 30}
    shards = [str(tmp_path / "out" / shard) for shard in splits["splits"]["train"]["shards"]]
    keys = [sample["__key__"] for sample in webdataset.WebDataset(shards, shardshuffle=False)]
    gc.collect()  # it leaves closing its files to that
    photo_set = open_photo_set(tmp_path / "out" / "train", need_place=True)
    assert [entry.key for entry in photo_set] == keys
    assert len(keys) == splits["splits"]["train"]["photos"]
    with (tmp_path / "out" / "train.csv").open(newline="") as file:
        assert [key_of(row["id"]) for row in csv.DictReader(file)] == keys


def test_an_uploader_is_on_one_side(tmp_path):
    for n in range(50):
        assert len({split_of(f"ann{n}", f"photo{m}") for m in range(20)}) == 1
    assert split_of("12@N00", "1") == split_of("12%40N00", "2")
    alone = [split_of("", f"photo{n}") for n in range(12_000)]
    assert [alone.count(split) / 1000 for split in Split] == pytest.approx([10, 1, 1], abs=0.1)


def test_metadata_is_stripped_and_the_photo_upright(server, tmp_path):
    exif = Image.Exif()
    exif[MODEL], exif[ORIENTATION] = "a camera", 6
    exif[GPS] = {1: "N", 2: (48.0, 51.0, 0.0), 3: "E", 4: (2.0, 21.0, 0.0)}
    table = listed(server, tmp_path, 1)
    server.files["/p/0.jpg"] = distinct_photo(0, height=800, width=1200, exif=exif, comment=b"my house")
    prepared(table, tmp_path / "out", side=100)
    [(_, metadata, jpeg)] = photos_of(tmp_path / "out").values()
    image = Image.open(io.BytesIO(jpeg))
    assert image.size == (metadata["width"], metadata["height"]) == (100, 150)
    assert not image.getexif()
    assert b"camera" not in jpeg
    assert b"my house" not in jpeg


def test_duplicates_are_dropped_by_content_and_by_looks(server, tmp_path):
    table = listed(server, tmp_path, 8)
    server.files["/p/3.jpg"] = server.files["/p/1.jpg"]
    server.files["/p/5.jpg"] = distinct_photo(2, height=300, width=400, quality=60)
    outcomes, _ = prepared(table, tmp_path / "out")
    assert outcomes == {"kept": 6, "duplicate": 2}
    assert dropped(tmp_path / "out") == {
        "p/3.jpg": ("duplicate", "it is, or looks, the same as p/1.jpg"),
        "p/5.jpg": ("duplicate", "it is, or looks, the same as p/2.jpg"),
    }


def test_evaluation_photos_are_kept_out_by_name_and_by_looks(server, tmp_path):
    held_out = tmp_path / "im2gps"
    held_out.mkdir()
    (held_out / "Paris_00012_2345678901_abcdef1234_12_55@N00.jpg").write_bytes(distinct_photo(900))
    (held_out / "other.jpg").write_bytes(distinct_photo(4, height=240, width=320, quality=50))
    (tmp_path / "ids.txt").write_text("777777777_0123456789_9_12@N01.jpg\n")
    rows = [
        ("34/8d/2345678901.jpg", 1),
        ("7", 2),
        ("copy", 4),
        ("good", 5),
        ("x_777777777.jpg", 6),
    ]
    for _, n in rows:
        server.files[f"/p/{n}.jpg"] = distinct_photo(n)
    table = write_table(
        tmp_path / "list.csv",
        HEAD + "".join(f"{photo_id},a,1,2,{server.address}/p/{n}.jpg\n" for photo_id, n in rows),
    )
    options = {"held_out": (str(held_out), str(tmp_path / "ids.txt"))}
    outcomes, _ = prepared(table, tmp_path / "out", **options)
    assert outcomes == {"kept": 2, "evaluation": 3}
    assert set(photos_of(tmp_path / "out")) == {"7", "good"}
    assert {path for path in server.tiles_asked() if path.startswith("/p/")} == {
        f"/p/{n}.jpg" for n in (2, 4, 5)
    }
    with pytest.raises(OutputError, match=r"begun with other settings \(--exclude\)"):
        prepared(table, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("34/8d/9055806529.jpg", {"9055806529"}),
        ("3f_9c_9698384042.jpg", {"3f_9c_9698384042", "9698384042"}),
        (
            "Rome_00007_123456789_0a1b2c3d4e_5_66%40N00.jpg",
            {"rome_00007_123456789_0a1b2c3d4e_5_66@n00", "123456789"},
        ),
        ("http://farm6.example/5466/9055806529_af0311aa02_z.jpg", {"9055806529_af0311aa02_z", "9055806529"}),
        ("IMG_0001.JPG", {"img_0001"}),
        ("", set()),
    ],
)
def test_the_names_of_a_flickr_photo(text, names):
    assert names_of(text) == names


# --- where photos come from --------------------------------------------------------------------------------


def test_ids_and_addresses_are_joined(server, tmp_path):
    for n in range(3):
        server.files[f"/p/{n}.jpg"] = distinct_photo(n)
    urls = "".join(f"a/b/{n}.jpg,{server.address}/p/{n}.jpg\n" for n in range(2))
    table = write_table(
        tmp_path / "places.csv", "IMG_ID,AUTHOR,LAT,LON\na_b_0.jpg,a,1,2\na/b/1.jpg,b,3,4\nc,c,5,6\n"
    )
    options = {"urls": str(write_table(tmp_path / "urls.csv", urls))}
    outcomes, left = prepared(table, tmp_path / "out", **options)
    assert (outcomes, left) == ({"kept": 2, "failed": 1}, 1)
    assert dropped(tmp_path / "out") == {"c": ("failed", "it is not here and has no address")}


def test_photos_that_are_here_are_not_downloaded(tmp_path):
    (tmp_path / "photos").mkdir()
    for n in range(4):
        (tmp_path / "photos" / f"{n}.jpg").write_bytes(distinct_photo(n))
    (tmp_path / "photos" / "bad.jpg").write_bytes(distinct_photo(9)[:900])
    (tmp_path / "photos" / "dot.jpg").write_bytes(distinct_photo(9, height=1, width=1))
    rows = "".join(f"x/{name}.jpg,a,1,2\n" for name in (*range(4), "bad", "dot"))
    table = write_table(tmp_path / "list.csv", "image,author,latitude,longitude\n" + rows)
    outcomes, _ = prepared(table, tmp_path / "out", photos=tmp_path / "photos")
    assert outcomes == {"kept": 4, "unreadable": 2}
    reasons = dropped(tmp_path / "out")
    assert "damaged or cut short" in reasons["x/bad.jpg"][1]
    assert reasons["x/dot.jpg"][1] == "the photo has only 1 x 1 pixels"


def test_tars_and_parquet_files_are_taken_as_they_come(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    samples = {str(n): {"jpg": distinct_photo(n), "json": {"lat": 1, "lon": n}} for n in range(3)}
    write_tar(tmp_path / "a.tar", samples)
    columns = {"jpg": [distinct_photo(n) for n in range(3)], "lat": [1.0] * 3, "lon": [2.0] * 3}
    pq.write_table(pa.table(columns | {"id": ["a", "b", "c"]}), tmp_path / "a.parquet")
    for name in ("a.tar", "a.parquet"):
        out = tmp_path / f"out-{name}"
        assert prepared(tmp_path / name, out) == ({"kept": 3}, 0)
        assert len(photos_of(out)) == 3


def test_only_a_region_and_only_so_many(server, tmp_path):
    table = listed(server, tmp_path, 40)
    outcomes, left = prepared(table, tmp_path / "out", within="9.5,-10,19.5,80", limit=4)
    assert (outcomes["kept"], left) == (4, 0)
    assert set(photos_of(tmp_path / "out")) == {f"p/{n}.jpg" for n in range(10, 14)}
    outcomes, _ = prepared(table, tmp_path / "out", within="9.5,-10,19.5,80")
    assert outcomes["kept"] == 10
    with pytest.raises(PhotoSetError, match="none of its 40 photos is in the region"):
        prepared(table, tmp_path / "none", within="-20,-20,-10,-10")


# --- interruptions -----------------------------------------------------------------------------------------


def test_a_job_killed_again_and_again_gives_the_same_data_set(server, tmp_path):
    table = listed(server, tmp_path, 40)
    server.files["/p/31.jpg"] = server.files["/p/3.jpg"]
    server.always["p/17"] = 404
    prepared(table, tmp_path / "whole", shard_size=7)
    script = Path(__file__).with_name("kill_prepare.py")
    command = [sys.executable, script, table, tmp_path / "out", "1", "13", "27"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert done.stdout.split() == [str(int(signal.SIGKILL))] * 3 + ["0"]
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_shard_that_the_ledger_does_not_know_is_written_again(server, tmp_path, monkeypatch):
    table = listed(server, tmp_path, 20)
    prepared(table, tmp_path / "whole", shard_size=5)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("geoengine.training.mp16.ledger.Ledger.sharded", killed)
        with pytest.raises(KeyboardInterrupt):
            prepared(table, tmp_path / "out", shard_size=5)
    assert prepared(table, tmp_path / "out", shard_size=5) == ({"kept": 20}, 0)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_two_runs_at_once_are_refused(server, tmp_path):
    table = listed(server, tmp_path, 1)
    job = PrepareJob(PrepareConfig(metadata=str(table)), tmp_path / "out")
    with pytest.raises(OutputError, match="another run is writing there"):
        PrepareJob(PrepareConfig(metadata=str(table)), tmp_path / "out")
    job.close()


def test_a_full_disk_ends_the_run_and_not_the_job(server, tmp_path, monkeypatch):
    table = listed(server, tmp_path, 20)
    prepared(table, tmp_path / "whole", shard_size=5)

    def full(_):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OutputError, match=r"000000\.tar: cannot be written \(No space left on device\)"):
            prepared(table, tmp_path / "out", shard_size=5)
    assert not list(tmp_path.glob("out/*/*"))
    prepared(table, tmp_path / "out", shard_size=5)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


# --- the command -------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, ["prepare", "mp16", *map(str, arguments)])


def test_the_command_fetches_photos_and_their_tiles(server, tmp_path):
    table = listed(server, tmp_path, 5)
    source = write_table(
        tmp_path / "tiles.toml",
        f'[[source]]\ntemplate = "{server.address}/t/{{z}}/{{x}}/{{y}}.png"\nprefetch = true\n',
    )
    done = run(table, "--out", tmp_path / "out", "--rate", 2000, "--tiles", source, "--yes")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out'}\n"
    assert "5 photos listed, 5 wanted, 0 of them here" in done.stderr
    assert "no evaluation photos are kept out: name those of IM2GPS" in done.stderr
    assert "5 kept; dropped.csv says why" in done.stderr
    from geoengine.engine.sources.mbtiles import MBTilesSource
    from geoengine.engine.tiles import LEVELS, xy_at

    pack = MBTilesSource(tmp_path / "out" / "tiles.mbtiles")
    for z in LEVELS:
        xy = xy_at(np.arange(5), np.arange(5), z)
        assert sum(len(batch.positions) for batch in pack.read(z, xy)) == 5
    pack.close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,lat\n1,2\n", "no column for the longitude"),
        ("id,lat,lon,url\n1,2,3,u\n2,120,3,u\n", "row 3: the latitude 120 .* swapped"),
        ("id,lat,lon\n1,2,3\n", "none of its photos is here or has an address: give --photos"),
    ],
)
def test_what_is_wrong_with_a_list(tmp_path, text, message):
    import re

    done = run(write_table(tmp_path / "t.csv", text), "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_what_the_command_refuses(server, tmp_path):
    table = listed(server, tmp_path, 1)
    template = f"{server.address}/{{z}}/{{x}}/{{y}}.png"
    assert (
        "allows its tiles to be fetched in bulk"
        in run(table, "--out", tmp_path / "o", "--tiles", template).stderr
    )
    assert "must be at least 1" in run(table, "--out", tmp_path / "o", "--side", 0).stderr
    assert "more than 0 requests" in run(table, "--out", tmp_path / "o", "--rate", 0).stderr
    assert "there is no such file" in run(tmp_path / "gone.csv", "--out", tmp_path / "o").stderr
    (tmp_path / "file").write_text("")
    assert "the folder cannot be made" in run(table, "--out", tmp_path / "file").stderr


def test_the_tiles_of_photos_and_of_their_siblings():
    from geoengine.engine.tiles import Tile, children, parent, tile_at
    from geoengine.training.mp16.tiles import tiles_of

    places = [(2.35, 48.85), (2.35001, 48.85001), (-179.9, -60.0)]
    for z in (4, 10, 16):
        own = {tile_at(LngLat(*place), z) for place in places}
        assert {Tile(z, x, y) for x, y in tiles_of(places, z, siblings=False).tolist()} == own
        wider = {child for tile in own for child in children(parent(tile))}
        assert {Tile(z, x, y) for x, y in tiles_of(places, z, siblings=True).tolist()} == wider
