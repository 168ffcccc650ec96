"""`geoengine tiles`: info, verify, prune and fetch."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest
from command_line import refused, run
from made_tiles import picture, read_all, tile_picture
from test_sources import write_mbtiles
from test_tile_cache import FOREVER, METADATA, fill, rows
from tile_server import Server

from geoengine.engine.sources import open_source
from geoengine.engine.sources.cache import TileCache
from geoengine.engine.sources.decode import decode_tile
from geoengine.engine.tiles import LngLatBbox, Tile, all_xy, xy_in_bbox


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("GEOENGINE_CACHE", str(tmp_path / "cache"))
    with Server() as server:
        yield server


@pytest.fixture
def allowed(server, tmp_path):
    path = tmp_path / "server.toml"
    path.write_text(
        f"""
        [[source]]
        template = "{server.address}/{{z}}/{{x}}/{{y}}.png?key=typed-secret"
        attribution = "© somebody"
        terms = "https://host/terms"
        prefetch = true
        backoff_s = 0.01
        max_zoom = 8
        """
    )
    return path


# --- info --------------------------------------------------------------------------------------------------


def test_info_of_a_file(tmp_path):
    tiles = {(z, 0, 0): tile_picture(z, 0, 0) for z in (2, 4)}
    path = write_mbtiles(tmp_path / "a.mbtiles", tiles, attribution="© me", format="png")
    result = run("tiles", "info", path)
    assert result.exit_code == 0, result.stderr
    lines = dict(line.split(":", 1) for line in result.stdout.splitlines())
    assert {name: value.strip() for name, value in lines.items()} | {"identity": "", "file": ""} == {
        "name": "a.mbtiles",
        "zooms": "2 to 4",
        "tile size": "256 pixels",
        "bounds": "-180.0000, -85.0511, 180.0000, 85.0511",
        "attribution": "© me",
        "identity": "",
        "file": "",
        "tiles": "2 (zoom 2: 1, zoom 4: 1)",
        "format": "png",
    }


def test_info_of_a_server_asks_it_nothing(server, allowed):
    result = run("tiles", "info", allowed)
    assert result.exit_code == 0, result.stderr
    for text in ("© somebody", "https://host/terms", "bulk fetching:  allowed", "not there yet", "0 to 8"):
        assert text in result.stdout
    assert "typed-secret" not in result.stdout
    assert server.requests == []
    with closing(open_source(str(allowed))) as source:
        read_all(source, 1, all_xy(1))
    assert "4 (zoom 1: 4)" in run("tiles", "info", allowed).stdout
    assert "not known" in run("tiles", "info", f"{server.address}/{{z}}/{{x}}/{{y}}").stdout


@pytest.mark.parametrize("spec", ["open-us", "planet"])
def test_info_of_presets_and_the_planet(spec):
    result = run("tiles", "info", spec)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("zooms:") == (3 if spec == "open-us" else 1)


def test_info_of_nothing():
    refused(run("tiles", "info", "nothing.mbtiles"), "nothing.mbtiles: there is no such file")


# --- verify and prune --------------------------------------------------------------------------------------


def test_verify_finds_damage_and_mends_caches(tmp_path):
    path = tmp_path / "a.mbtiles"
    with closing(TileCache(path, METADATA)) as cache:
        fill(cache, 20)
        cache.put(Tile(3, 1, 1), b"", FOREVER)
    assert run("tiles", "verify", path).stdout == "20 tiles, 0 damaged\n"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE tiles SET tile_data = substr(tile_data, 1, 30) WHERE tile_column = 3")
        database.execute("UPDATE tiles SET tile_data = 7 WHERE tile_column = 4")
        database.execute("UPDATE tiles SET tile_data = ? WHERE tile_column = 5", (picture("red"),))
    result = run("tiles", "verify", path)
    assert (result.exit_code, result.stdout) == (1, "20 tiles, 3 damaged\n")
    assert "geoengine: tile 10/3/3 is damaged\n" in result.stderr
    result = run("tiles", "verify", path, "--repair")
    assert (result.exit_code, result.stdout) == (1, "20 tiles, 3 damaged\n")
    result = run("tiles", "verify", path)
    assert (result.exit_code, result.stdout) == (0, "17 tiles, 0 damaged\n")


def test_verify_of_files_of_others(tmp_path):
    path = write_mbtiles(
        tmp_path / "a.mbtiles", {(0, 0, 0): picture("red"), (1, 0, 0): b"damaged", (1, 0, 1): b""}
    )
    result = run("tiles", "verify", path)
    assert (result.exit_code, result.stdout) == (1, "3 tiles, 1 damaged\n")
    before = path.read_bytes()
    refused_repair = run("tiles", "verify", path, "--repair")
    assert refused_repair.exit_code == 2
    assert "this is not a cache or pack of geoengine" in refused_repair.stderr
    assert path.read_bytes() == before
    (tmp_path / "b.mbtiles").write_bytes(b"no database" * 500)
    refused(run("tiles", "verify", tmp_path / "b.mbtiles"), "this is no MBTiles file, or a damaged one")


def test_prune_makes_a_cache_smaller(tmp_path):
    path = tmp_path / "a.mbtiles"
    with closing(TileCache(path, METADATA)) as cache:
        fill(cache, 300, size=90)
        cache.put(Tile(3, 1, 1), picture("red"), time.time() - 1)
    assert run("tiles", "prune", path).stdout.startswith("1 tiles deleted, ")
    size = path.stat().st_size
    assert run("tiles", "prune", path, "--unused-for", "1").stdout.startswith("0 tiles deleted, ")
    result = run("tiles", "prune", path, "--to", "100kB")
    assert result.exit_code == 0, result.stderr
    left = int(rows(path, "SELECT count(*) FROM tiles")[0][0])
    assert result.stdout == f"{300 - left} tiles deleted, {(size - path.stat().st_size) / 1e6:.1f} MB freed\n"
    assert 0 < left < 250
    assert path.stat().st_size <= 100_000
    assert run("tiles", "prune", path, "--unused-for", "0").stdout.startswith(f"{left} tiles deleted")
    refused(run("tiles", "prune", path, "--to", "many"), "a size must be a number with a unit")
    other = write_mbtiles(tmp_path / "b.mbtiles", {(0, 0, 0): picture("red")})
    refused(run("tiles", "prune", other), "this is not a cache or pack of geoengine, and is left as it is")


# --- fetch -------------------------------------------------------------------------------------------------


def fetch(source, out, *options):
    return run("tiles", "fetch", "--tiles", source, "--out", out, *options)


def test_fetch_writes_a_pack_of_a_region(server, allowed, tmp_path):
    out = tmp_path / "pack.mbtiles"
    server.always["4/8/5"] = 404
    options = ("--within", "5,45,11,48", "--zoom", "4-8")
    refused_without = fetch(allowed, out, *options)
    assert refused_without.exit_code == 2
    assert "nobody is there to agree: give --yes" in refused_without.stderr
    box = LngLatBbox(5, 45, 11, 48)
    tiles = {zoom: xy_in_bbox(box, zoom).tolist() for zoom in (4, 6, 8)}
    total = sum(map(len, tiles.values()))
    sampled = len(server.requests)
    assert 0 < sampled < total
    result = fetch(allowed, out, *options, "--yes")
    assert result.exit_code == 0, result.stderr
    assert f"{total} tiles, " in result.stderr
    assert "credit: © somebody" in result.stderr
    assert "terms: https://host/terms" in result.stderr
    assert result.stdout.startswith(f"{out}: {total} tiles, ")
    assert len(server.requests) == total
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pack.mbtiles", "server.toml"]
    with closing(open_source(str(out))) as pack, closing(open_source(str(allowed))) as source:
        assert pack.identity == source.identity
        for zoom, xy in tiles.items():
            assert read_all(pack, zoom, xy) == [i for i, tile in enumerate(xy) if (zoom, *tile) != (4, 8, 5)]
    assert b"typed-secret" not in out.read_bytes()
    again = fetch(allowed, out, *options)
    assert again.exit_code == 0, again.stderr
    assert f"{total} tiles, 0 to fetch" in again.stderr
    assert len(server.requests) == total


def test_fetch_goes_on_where_it_was_killed(server, allowed, tmp_path):
    out = tmp_path / "pack.mbtiles"
    words = [
        "geoengine",
        "tiles",
        "fetch",
        "--tiles",
        str(allowed),
        "--zoom",
        "4",
        "--out",
        str(out),
        "--yes",
    ]
    command = f"import sys; sys.argv = {words!r}; from geoengine.cli import main; main()"
    server.always["*"] = lambda request: time.sleep(0.02) or server.send_tile(request)
    with subprocess.Popen(
        [sys.executable, "-c", command], env=os.environ, stderr=subprocess.DEVNULL
    ) as process:
        while len(server.requests) < 120 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    kept = rows(out, "SELECT tile_data FROM tiles")
    assert all(decode_tile(data) is not None for (data,) in kept)
    before = len(server.requests)
    result = fetch(allowed, out, "--zoom", "4", "--yes")
    assert result.exit_code == 0, result.stderr
    assert len(server.requests) - before == 256 - len(kept) < 256
    with closing(open_source(str(out))) as pack:
        assert read_all(pack, 4, all_xy(4)) == list(range(256))


def test_fetch_of_land(server, allowed, tmp_path):
    result = fetch(
        allowed, tmp_path / "pack.mbtiles", "--land", "--within", "-60,30,-10,50", "--zoom", "6", "--yes"
    )
    assert result.exit_code == 0, result.stderr
    assert 0 < len(server.requests) < len(xy_in_bbox(LngLatBbox(-60, 30, -10, 50), 6))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("eox", (), "nothing says that this server allows .* prefetch = true; its terms: https://s2maps.eu/"),
        (
            "http://127.0.0.1:9/{z}/{x}/{y}",
            (),
            "nothing says that this server allows its tiles to be fetched",
        ),
        ("http://127.0.0.1:9/a.pmtiles", (), "these tiles are in one PMTiles file: download that"),
        ("open", ("--zoom", "8,9"), "come from several sources (0-8, 9-13): fetch each into its own pack"),
        ("gibs", ("--zoom", "8,10"), "the source has zooms 0 to 8, not 10"),
        ("gibs", ("--zoom", "10"), "the source has none of these zooms"),
        ("gibs", ("--out", "pack.png"), "a pack is an MBTiles file"),
        ("gibs", ("--within", "nowhere"), "'nowhere' is no region"),
        ("nothing.mbtiles", (), "these tiles are in a file already"),
    ],
)
def test_fetch_refuses(tmp_path, source, options, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = fetch(source, "pack.mbtiles", "--zoom", "4", *options)
    sentence, _, rest = message.partition(" .* ")
    refused(result, sentence)
    assert rest in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_fetch_does_not_write_into_other_files(server, allowed, tmp_path):
    out = write_mbtiles(tmp_path / "pack.mbtiles", {(0, 0, 0): picture("red")}, name="mine")
    before = out.read_bytes()
    refused(fetch(allowed, out, "--zoom", "2", "--yes"), "this file holds tiles of another source")
    assert out.read_bytes() == before
    assert server.requests == []
