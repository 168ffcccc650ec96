"""`geoengine bench table1`: processes that locate, the paper's procedure beside them, and what is refused."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import refused, run
from made_sets import jpeg, write_table
from tiny_bundle import IMAGE_SIZE, write_tiny_bundle, write_tiny_tiles

from geoengine.bench.suite import paper, table1
from geoengine.bench.suite.locating import Order, Tiles, locating
from geoengine.bench.suite.network import ServedTiles, pool_bodies, serving
from geoengine.bench.suite.table1_inputs import accuracy_note, opened_photos, random_index
from geoengine.bench.suite.workload import PooledTiles, tile_pool
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.engine import GeoEngine
from geoengine.engine.errors import GeoEngineError
from geoengine.engine.photos import Photo
from geoengine.engine.search import SearchConfig
from geoengine.engine.sources import open_source
from geoengine.engine.tiles import all_xy

LEVELS = (1, 3)
PHOTO = Photo("grey", np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 120, np.uint8))
SPREAD = {"median": 10.0, "least": 9.0, "most": 12.0, "rounds": 3}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny bundle, its tiles, and photos with a table of their places."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny_bundle(folder / "engines", world="earth", levels=LEVELS)
    write_tiny_tiles(folder / "tiles", zooms=LEVELS)
    (folder / "photos").mkdir()
    rows = ["path,lat,lon"]
    for number in range(3):
        (folder / "photos" / f"{number}.jpg").write_bytes(jpeg(25 * number))
        rows.append(f"{number}.jpg,{8 * number - 33},{37 * number - 150}")
    write_table(folder / "photos" / "places.csv", "\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder with the suite's tiles."""
    folder = tmp_path_factory.mktemp("cache")
    tile_pool(folder / "bench")
    return folder


@pytest.fixture(autouse=True)
def one_thread(monkeypatch, cache):
    monkeypatch.setenv("GEOENGINE_CACHE", str(cache))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def order(world, **other):
    settings = {
        "bundle": world / "engines",
        "tiles": Tiles(spec=str(world / "tiles")),
        "backend": "onnxruntime-cpu",
        "precision": None,
        "k": 2,
    }
    return Order(**{**settings, **other})


def command(world, out, *more):
    own = ["--bundle", world / "engines", "--tiles", world / "tiles", "--photos", world / "photos"]
    return ["bench", "table1", *own, "--budget", 0.2, "--count", 2, "--out", out, *more]


def by_position(batches):
    return {
        position: tile
        for batch in batches
        for position, tile in zip(batch.positions.tolist(), batch.pixels, strict=True)
    }


def tiny_tower(width=6):
    """A tower that is a mean over the picture's parts, with what open_clip would do first."""

    class Mean(torch.nn.Module):
        def forward(self, pictures):
            return pictures.reshape(len(pictures), -1)[:, : 8 * width].reshape(-1, width, 8).mean(-1)

    def transform(picture):
        return torch.from_numpy(np.array(picture, dtype=np.float32)) - 127

    return paper.Tower(Mean(), transform, "cpu")


def test_a_process_locates_cold_warm_and_with_an_index(world, tmp_path):
    bundle = EngineBundle.open(world / "engines")
    shares = []
    with locating(order(world, folder=tmp_path)) as locator:
        assert locator.about["backend"] == "onnxruntime-cpu" and not locator.about["on_gpu"]
        first = locator.locate(PHOTO, None, shares.append)
        second = locator.locate(PHOTO, None, shares.append)
        peak_mib = locator.peak_mib()
    with GeoEngine.open(bundle.path, str(world / "tiles"), backend="onnxruntime-cpu") as engine:
        [alone] = engine.locate([PHOTO], config=SearchConfig(k=2, levels=LEVELS))
    assert first["point"] == list(alone.point)
    for figures in (first, second):  # the second photo knows nothing of the first one's tiles
        assert (figures["cold"]["tiles"], figures["cold"]["distinct"]) == (4 + 32, 4 + 32)
        assert figures["warm"] > 0 and figures["indexed"] is None
    assert shares == [1.0, 1.0]
    assert peak_mib > 20


def test_the_index_leaves_only_the_deeper_levels(cache, tmp_path):
    folder = write_tiny_bundle(tmp_path / "engines", levels=(4, 6, 10), sides=(8, 256))
    bundle = EngineBundle.open(folder)
    with closing(PooledTiles(tile_pool(), bundle.world)) as tiles:
        about = {"backend": "onnxruntime-cpu", "precision": "fp32"}
        index = random_index(tmp_path / "index", bundle, tiles, about)
        assert random_index(tmp_path / "index", bundle, tiles, about) == index
    with locating(order(tmp_path, tiles=Tiles(), k=1, folder=tmp_path)) as locator:
        figures = locator.locate(PHOTO, index, lambda share: None)
    assert figures["cold"]["tiles"] == 256 + 16 + 256
    assert figures["indexed"]["tiles"] == 256 + 4096 + 256
    assert figures["indexed"]["distinct"] == 256


def test_paused_time_does_not_count(world, tmp_path, monkeypatch):
    from geoengine.bench.suite import locating as module

    class Pipe:
        def __init__(self):
            self.sent = []

        def send(self, what):
            self.sent.append(what)

        def recv(self):
            time.sleep(0.3)

    monkeypatch.setattr(module, "PAUSE_AFTER_S", 0.0)
    pipe = Pipe()
    with GeoEngine.open(world / "engines", str(world / "tiles"), backend="onnxruntime-cpu") as engine:
        figures = module._Photos(engine, order(world, folder=tmp_path), pipe).locate(0, PHOTO, None)
    assert pipe.sent == [0.5, 1.0, 1.0], "after each level, and at the end"
    assert figures["cold"]["seconds"] < 0.6, "two pauses of 0.3 s lay within it"


def test_what_a_process_raises_arrives(world, tmp_path):
    with (
        pytest.raises(GeoEngineError, match="unknown backend 'abacus'"),
        locating(order(world, folder=tmp_path, backend="abacus")),
    ):
        pass


def test_a_process_that_dies_is_reported(world, tmp_path):
    with locating(order(world, folder=tmp_path)) as locator:
        os.kill(locator._process.pid, signal.SIGKILL)
        with pytest.raises(GeoEngineError, match="k=2 ended with status -9"):
            locator.locate(PHOTO, None, lambda share: None)


def test_rows_that_could_not_be_kept_are_an_error(world, tmp_path):
    (tmp_path / "k2-0").write_text("a file where the folder of rows should be")
    expected = pytest.raises(GeoEngineError, match="rows of tiles were not kept")
    with locating(order(world, folder=tmp_path)) as locator, expected:
        locator.locate(PHOTO, None, lambda share: None)


def test_served_tiles_are_those_of_the_pool(cache):
    pool = tile_pool()
    xy = np.array([[0, 0], [513, 77], [1023, 1023]])
    with serving(pool_bodies(pool), 1.0) as port, closing(ServedTiles(port, "earth")) as served:
        fetched = by_position(served.read(10, xy))
    with closing(PooledTiles(pool, "earth")) as tiles:
        for batch in tiles.read(10, xy):
            for position, tile in zip(batch.positions.tolist(), batch.pixels, strict=True):
                np.testing.assert_array_equal(fetched.pop(position), tile)
    assert not fetched


def test_a_server_answers_after_its_time(cache):
    with serving(pool_bodies(tile_pool()), 150.0) as port, closing(ServedTiles(port, "earth")) as served:
        start = time.perf_counter()
        list(served.read(3, np.array([[1, 1]])))
        assert time.perf_counter() - start >= 0.15


def test_the_papers_procedure_is_algorithm_1(world):
    tower, k = tiny_tower(), 2
    with closing(open_source(str(world / "tiles"))) as source:
        procedure = paper.Procedure(tower, source, PHOTO, k, LEVELS)
        asked, read = [], source.read

        def watched(z, xy):
            asked.append((z, *xy[0].tolist()))
            return read(z, xy)

        source.read = watched
        for _ in range(4 + 32 + 4):
            next(procedure._steps)
    query = tower.embed(PHOTO.pixels)
    with closing(open_source(str(world / "tiles"))) as source:
        pictures = by_position(source.read(1, all_xy(1)))
    cosines = {tuple(all_xy(1)[p].tolist()): float(query @ tower.embed(px)) for p, px in pictures.items()}
    best = sorted(cosines, key=cosines.get, reverse=True)[:k]
    assert [tile[0] for tile in asked] == [1] * 4 + [3] * 32 + [1] * 4, "and then once more"
    assert {(x >> 2, y >> 2) for _, x, y in asked[4:36]} == set(best)


def test_the_papers_procedure_works_for_its_time(world):
    with closing(open_source(str(world / "tiles"))) as source:
        procedure = paper.Procedure(tiny_tower(), source, PHOTO, 2, LEVELS)
        assert procedure.measured() is None
        procedure.work(0.0)
        assert procedure.tiles == 0
        procedure.work(0.1)
        procedure.work(0.1)
    measured = procedure.measured()
    assert measured["tiles"] > 1 and measured["seconds"] >= 0.2


def test_the_papers_encoder_is_of_the_bundles_size():
    from geoengine.training.planet import VISION

    tower = paper.open_tower(EngineBundle.open("planet").manifest, on_gpu=False)
    weights = sum(parameter.numel() for parameter in tower.module.parameters())
    assert weights == sum(parameter.numel() for parameter in VISION.build().parameters())
    embedding = tower.embed(np.full((256, 256, 3), 90, np.uint8))
    assert embedding.shape == (VISION.output_dim,) and float(embedding.norm()) == pytest.approx(1, abs=1e-5)
    assert tower.about()["device"] == "cpu"


def test_rows_tables_and_going_on(world, tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "open_tower", lambda manifest, on_gpu: tiny_tower())
    done = run(*command(world, tmp_path, "--k", 1))
    assert done.exit_code == 0, done.stderr
    assert "Accuracy: - (no accuracy: the encoders' weights are random" in done.stdout
    [file] = tmp_path.glob("*/table1.json")
    document = json.loads(file.read_text())
    [row] = document["rows"]
    assert document["complete"] and row["key"] == "k=1"
    assert (row["photos"], row["tiles"], row["distinct"]) == (2, 20, 20)
    assert row["paper"]["seconds"] >= 0.2
    per_tile_s = row["paper"]["seconds"] / row["paper"]["tiles"]
    assert row["paper"]["extrapolated_s"] == pytest.approx(20 * per_tile_s)
    assert row["published_s"] is None and row["indexed"] is None and row["accuracy"] is None
    again = json.loads(run(*command(world, tmp_path, "--k", 1, 2, "--json")).stdout)
    assert [row["key"] for row in again["rows"]] == ["k=1", "k=2"]
    again["rows"].pop()
    again["complete"] = False
    kept = again["rows"][0]["cold"]["median"] = 123.0
    file.write_text(json.dumps(again))
    resumed = json.loads(run(*command(world, tmp_path, "--k", 1, 2, "--json")).stdout)
    assert [row["cold"]["median"] == kept for row in resumed["rows"]] == [True, False]


def test_without_pytorch_the_own_times_are_measured(world, tmp_path, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        paper.importlib.util, "find_spec", lambda name: None if name == "torch" else there(name)
    )
    done = run(*command(world, tmp_path, "--k", 16, "--count", 1))
    assert done.exit_code == 0, done.stderr
    assert "not installed: pip install 'geoengine[export]'" in done.stdout
    assert "| 16 | 518 |" in done.stdout.replace("|   ", "| ")


def test_a_model_that_open_clip_lacks_is_said(world, tmp_path):
    done = run(*command(world, tmp_path, "--k", 1))
    assert done.exit_code == 0, done.stderr
    assert "The paper's procedure could not be run: unknown model 'tiny'" in done.stdout


def test_accuracy_of_photos_with_places(world):
    planet = EngineBundle.open("planet")
    drawn = opened_photos(None, planet, 2)
    assert len(drawn.places) == 2 and accuracy_note(planet, drawn, "planet") == ""
    assert "show no place" in accuracy_note(planet, drawn, None)
    listed = opened_photos(str(world / "photos"), planet, 2)
    assert [place.lat for place in listed.places] == [-33.0, -25.0]
    run_ = SimpleNamespace(photos=drawn, accuracy_note="")
    figures = table1._accuracy(run_, [{"point": list(place)} for place in drawn.places])
    assert figures["photos"] == 2 and figures["within_km"]["1"]["share"] == 1.0


def test_photos_without_coordinates_have_no_accuracy(world, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(jpeg())
    planet = EngineBundle.open("planet")
    photos = opened_photos(str(tmp_path), planet, 5)
    assert photos.places == [] and len(photos.read) == 1
    assert "places must come from one .csv" in accuracy_note(planet, photos, "planet")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--k", 0], "k must be at least 1, got 0"),
        (["--k", 4, 4], "each k once"),
        (["--k", "many"], "beam widths are numbers"),
        (["--photos", "nowhere"], "nowhere: there is no such folder of photos"),
        (["--count", 0], "at least one photo"),
        (["--budget", 0], "more than 0 seconds"),
        (["--simulate-network", 5], "serves the suite's own tiles"),
        (["--backend", "abacus"], "unknown backend 'abacus'"),
        (["--backend", "onnxruntime-cpu", "--precision", "int8"], "int8"),
    ],
)
def test_what_is_refused(world, tmp_path, more, sentence):
    done = run(*command(world, tmp_path, *(["--k", 1] if "--k" not in more else []), *more))
    refused(done, sentence)
    assert not list(tmp_path.rglob("table1.json"))


def test_goals_are_stated_for_the_papers_model():
    row = {"key": "k=16", "k": 16, "photos": 3, "tiles": 1792, "distinct": 1792, "cold": SPREAD}
    row |= {"indexed": {**SPREAD, "median": 5.0}, "indexed_distinct": 1024, "warm": {**SPREAD, "median": 0.1}}
    row |= {"paper": {"tiles": 100, "seconds": 5.0, "searched": 1792, "extrapolated_s": 89.6}}
    row |= {"published_s": 518, "peak_mib": 1000.0, "accuracy": None}
    largest = row | {"key": "k=64", "k": 64, "peak_mib": 3000.0, "paper": None}
    facts = {"model": "ViT-B-32-quickgelu/none", "weights": "random", "world": "earth", "network_ms": None}
    facts |= {"tiles": "pool.mbtiles", "photos": "drawn photos", "accuracy_note": "no accuracy: drawn"}
    facts |= {"backend": "openvino", "precision": "int8", "on_gpu": False}
    facts |= {"paper": {"torch": "2", "threads": 2, "device": "cpu"}}
    machine = {"load": 0.4, "cores": 2}
    document = {"machine": machine, "facts": facts, "rows": [largest, row]}
    text = table1.tables(document)
    assert table1.speedups(row) == pytest.approx({"cold": 8.96, "indexed": 17.92, "warm": 896})
    for line in ("9.0 | met", "17.9 | met", "896.0 | met", "3.15 GB | not met", "| 51.8 |", "100 of 1792"):
        assert line in text, line
    assert "flatter us" not in text
    assert "flatter us" in table1.tables(document | {"machine": machine | {"load": 7.0}})
    slow = row | {"cold": {**SPREAD, "median": 20.0}}
    assert "4.5 | not met" in table1.tables(document | {"rows": [slow]})
    gpu = table1.tables(document | {"facts": facts | {"on_gpu": True}, "rows": [row]})
    assert "at most 100 ms | 10 s | not met" in gpu
    assert table1.key_figures(document)["k=16, times the paper's procedure"] == "9.0"
    assert table1.tables(document | {"facts": {}, "rows": []}) == "No k has been measured yet.\n"


INTERRUPTED = """
import os, signal, time
{imported}
call, calls = {owner}.{name}, []
def interrupted(*arguments, **options):
    result = call(*arguments, **options)
    calls.append(result)
    if len(calls) == {count}:
        os.killpg(0, signal.SIGINT)
        time.sleep(60)
    return result
{owner}.{name} = interrupted
from geoengine.cli import main
main()
"""


@pytest.mark.parametrize(
    ("imported", "owner", "name", "count"),
    [
        ("from geoengine.bench.suite.results import Results", "Results", "add", 1),
        ("from geoengine.bench.suite.locating import Locator", "Locator", "__init__", 2),
    ],
    ids=["after a row", "while the next process starts"],
)
def test_an_interrupted_run_keeps_its_rows(world, tmp_path, imported, owner, name, count):
    code = INTERRUPTED.format(imported=imported, owner=owner, name=name, count=count)
    arguments = [str(part) for part in command(world, tmp_path, "--k", 1, "--k", 3, "--budget", 60)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        timeout=120,
    )
    assert done.returncode == 130
    assert "1 so far; the same command goes on there" in done.stderr and "Traceback" not in done.stderr
    [file] = tmp_path.glob("*/table1.json")
    document = json.loads(file.read_text(encoding="utf-8"))
    assert [row["key"] for row in document["rows"]] == ["k=1"] and not document["complete"]
