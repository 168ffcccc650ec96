"""Descriptions of tile servers, presets, sources put together, and servers that want a session."""

import json
import logging
from contextlib import closing

import numpy as np
import pytest
from made_tiles import read_all, tile_picture
from test_sources import write_mbtiles
from tile_server import Server, send

from geoengine.engine.errors import SourceError
from geoengine.engine.sources import WORLD_BOUNDS, open_source
from geoengine.engine.sources.description import (
    CachePolicy,
    FilePart,
    SourceDescription,
    parse_parts,
    presets,
    read_preset,
)
from geoengine.engine.sources.http import identity_of, template_of
from geoengine.engine.tiles import all_xy


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("GEOENGINE_CACHE", "off")
    with Server() as server:
        yield server


def parse(text, folder=None):
    return parse_parts(text, "mine.toml", folder)


def test_a_description_holds_what_toml_says():
    [part] = parse(
        """
        [[source]]
        template = "https://{s}.host/{z}/{x}/{y}.png?key={env:KEY}"
        name = "Mine"
        attribution = "© me"
        terms = "https://host/terms"
        subdomains = ["t0", "t1"]
        headers = { Referer = "https://me" }
        min_zoom = 4
        max_zoom = 12
        bounds = [5, 45.5, 11, 48]
        tile_size = 512
        placeholders = ["00ff"]
        cache = "forever"
        prefetch = true
        rate_per_s = 10
        """
    )
    assert part == SourceDescription(
        template="https://{s}.host/{z}/{x}/{y}.png?key={env:KEY}",
        name="Mine",
        attribution="© me",
        terms="https://host/terms",
        subdomains=("t0", "t1"),
        headers={"Referer": "https://me"},
        min_zoom=4,
        max_zoom=12,
        bounds=(5.0, 45.5, 11.0, 48.0),
        tile_size=512,
        placeholders=("00ff",),
        cache=CachePolicy.FOREVER,
        prefetch=True,
        rate_per_s=10.0,
    )


def entry(line):
    return f'[[source]]\ntemplate = "https://host/{{z}}/{{x}}/{{y}}"\n{line}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[source", r"mine\.toml: this is not valid TOML \("),
        ("", r"expected a table \[\[source\]\] for each tile source, and nothing else"),
        ("a = 1\n" + entry(""), r"expected a table \[\[source\]\]"),
        ("[[source]]\nname = 'x'", "source 1: expected one of template, preset and file"),
        ("[[source]]\npreset = 'gibs'\nfile = 'a'", "source 1: expected one of template, preset and file"),
        ("[[source]]\npreset = 'bing'", r"there is no preset 'bing' of tile sources; there are eox, gibs, "),
        ("[[source]]\npreset = 'gibs'\nmin_zoom = 9", "the preset has no zoom between 9 and 30"),
        ("[[source]]\nfile = 'a.mbtiles'\ncache = 'none'", "a file takes min_zoom and max_zoom only"),
        (entry("maxzoom = 3"), "source 1: unknown key 'maxzoom'; there are name, attribution, terms, "),
        (entry("max_zoom = '3'"), "max_zoom must be a whole number, got '3'"),
        (entry("rate_per_s = true"), "rate_per_s must be a number, got True"),
        (entry("prefetch = 1"), "prefetch must be true or false, got 1"),
        (entry("name = 1"), "name must be a text, got 1"),
        (entry("subdomains = 'abc'"), "subdomains must be a list of texts, got 'abc'"),
        (entry("subdomains = []"), "subdomains must name at least one"),
        (entry("headers = { A = 1 }"), "headers must be a table of texts"),
        (entry("bounds = [1, 2, 3]"), "bounds must be .west, south, east, north. in degrees, got"),
        (entry("bounds = [3, 2, 1, 4]"), "bounds needs west < east and south < north"),
        (entry("cache = 'always'"), "cache must be one of none, header, forever, got 'always'"),
        (entry("min_zoom = 5") + "\n" + entry("max_zoom = 5"), "zoom 5 is in two sources"),
    ],
)
def test_what_is_no_description(text, message):
    with pytest.raises(SourceError, match=message):
        parse(text)


def test_presets_are_open_imagery_and_say_so():
    assert {"gibs", "eox", "usgs", "open", "open-us"} == set(presets())
    for name in presets():
        zooms = []
        for part in read_preset(name):
            assert part.name and part.attribution and part.terms.startswith("https://")
            assert part.template.startswith("https://") and part.rate_per_s > 0
            template_of(part).check_address()
            zooms += range(part.min_zoom, part.max_zoom + 1)
        assert zooms == list(range(zooms[-1] + 1))  # without a gap
    assert "google" not in str([read_preset(name) for name in presets()]).lower()


def test_identities_are_those_of_the_pictures():
    def identity(template, **fields):
        description = SourceDescription(template=template, **fields)
        return identity_of(description, template_of(description))

    url = "https://host/{z}/{x}/{y}"
    assert identity(url) == identity(url, name="a", rate_per_s=3, headers={"A": "b"}, max_zoom=3)
    assert identity(f"{url}?layer=a&key=1") == identity(f"{url}?layer=a&key=2")
    assert identity(f"https://me:secret@host/{url[13:]}") == identity(f"https://host/{url[13:]}")
    others = [url, f"{url}.png", f"{url}?layer=a", f"{url}?layer=b", url.replace("host", "other")]
    assert len({identity(other) for other in others}) == len(others)
    assert len({identity(url), identity(url, tile_size=512), identity(url, placeholders=("00",))}) == 3


def test_several_sources_are_one(server, tmp_path):
    tiles = {(z, x, y): tile_picture(z, x, y) for z in (1, 2, 3) for x in range(2**z) for y in range(2**z)}
    write_mbtiles(tmp_path / "coarse.mbtiles", tiles, attribution="© file", bounds="-180,-85,180,80")
    path = tmp_path / "mine.toml"
    path.write_text(
        f"""
        [[source]]
        template = "{server.address}/{{z}}/{{x}}/{{y}}.png"
        attribution = "© server"
        min_zoom = 4
        max_zoom = 5

        [[source]]
        file = "coarse.mbtiles"
        max_zoom = 2
        """
    )
    with closing(open_source(str(path))) as source:
        assert (source.min_zoom, source.max_zoom, source.storable) == (1, 5, True)
        assert source.name == f"coarse.mbtiles + {server.address}/{{z}}/{{x}}/{{y}}.png"
        assert source.attribution == "© file; © server"
        assert source.bounds == (-180, -85, 180, 80)
        assert source.tile_size == 256
        assert read_all(source, 2, all_xy(2)) == list(range(16))
        assert read_all(source, 3, all_xy(3)) == []
        first = next(iter(source.read(4, all_xy(4)[:1])))
        assert first.pixels.shape == (1, 16, 16, 3)
        identity = source.identity
    path.write_text(path.read_text().replace("max_zoom = 2", "max_zoom = 1"))
    with closing(open_source(str(path))) as source:
        assert source.identity != identity


def test_files_are_looked_for_beside_the_description(tmp_path):
    [part] = parse("[[source]]\nfile = 'a/b.mbtiles'\nmax_zoom = 3", tmp_path)
    assert part == FilePart(path=tmp_path / "a/b.mbtiles", max_zoom=3)
    with pytest.raises(SourceError, match=r"nothing\.toml: the file cannot be read"):
        open_source(str(tmp_path / "nothing.toml"))


def test_a_preset_is_a_source():
    with closing(open_source("open-us")) as source:
        assert (source.min_zoom, source.max_zoom, source.bounds) == (0, 16, WORLD_BOUNDS)
        assert "NASA" in source.attribution
        assert "CC BY 4.0" in source.attribution


# --- Google ------------------------------------------------------------------------------------------------

GOOGLE = """
[[source]]
adapter = "google"
template = "{address}/v1/2dtiles/{{z}}/{{x}}/{{y}}?session={{session}}&key={{env:MAPS_KEY}}"
cache = "none"
"""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("", "terms forbid to analyse, index or keep .* https://.* accept_terms = true if you have a perm"),
        ("accept_terms = true\nprefetch = true", 'need cache = "none" and prefetch = false'),
    ],
)
def test_google_is_refused_unless_its_terms_are_accepted(tmp_path, more, message):
    path = tmp_path / "google.toml"
    path.write_text(GOOGLE.format(address="https://tile.googleapis.com") + more)
    with pytest.raises(SourceError, match=message):
        open_source(str(path))


def test_google_gives_tiles_for_a_session(server, tmp_path, monkeypatch, caplog):
    def give_session(request):
        asked.append(
            (
                request.command,
                request.path,
                json.loads(request.rfile.read(int(request.headers["Content-Length"]))),
            )
        )
        send(request, 200, {}, json.dumps({"session": "s3ss/ion"}).encode())

    asked = []
    server.always["v1/createSession"] = give_session
    monkeypatch.setenv("MAPS_KEY", "s3cret-key")
    monkeypatch.delenv("GEOENGINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "google.toml"
    path.write_text(GOOGLE.format(address=server.address) + "accept_terms = true")
    with caplog.at_level(logging.DEBUG), closing(open_source(str(path))) as source:
        assert not source.storable
        (batch,) = source.read(1, np.array([(1, 0)]))
        assert batch.positions.tolist() == [0]
        assert "key" not in source.name.lower().replace("env:maps_key", "")
    assert asked == [
        (
            "POST",
            "/v1/createSession?key=s3cret-key",
            {"mapType": "satellite", "language": "en-US", "region": "US"},
        )
    ]
    assert server.requests[-1].path == "/v1/2dtiles/1/1/0?session=s3ss%2Fion&key=s3cret-key"
    assert not (tmp_path / "cache").exists()
    logged = "\n".join(record.getMessage() for record in caplog.records)
    assert "https://developers.google.com/maps/documentation/tile/policies" in logged
    assert "s3cret" not in logged and "s3ss" not in logged
