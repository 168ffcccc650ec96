"""The benchmark suite's files of results, its machine, its times, and the tiles that it measures with."""

import errno
import json
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest

from geoengine.bench.suite import machine, results, timing, workload
from geoengine.bench.suite.results import Results, ResultsError
from geoengine.engine.render.files import OutputError
from geoengine.engine.sources.mbtiles import MBTilesSource

MACHINE = {
    "name": "made-2-cores",
    "cpu": "Made",
    "cores": 2,
    "gpu": None,
    "driver": None,
    "python": "3.11.7",
    "packages": {"numpy": "2.0"},
    "commit": "abc",
}


@pytest.fixture(autouse=True)
def described(monkeypatch):
    """The machine as the run finds it; a test may change it between runs."""
    now = json.loads(json.dumps(MACHINE))
    monkeypatch.setattr(results, "describe", lambda: json.loads(json.dumps(now)))
    return now


def interrupted(folder, **settings):
    with Results.start(folder, "made", settings or {"k": [1, 2]}) as run:
        run.state(warm=True)
        run.add("k=1", seconds=1.5)
    return run


def refused(folder, message, settings=None):
    """Expect that a run is refused."""
    with (
        pytest.raises(ResultsError, match=message),
        Results.start(folder, "made", settings or {"k": [1, 2]}),
    ):
        pass


def test_an_interrupted_run_keeps_its_rows(tmp_path):
    first = interrupted(tmp_path)
    assert first.path == tmp_path / "made-2-cores" / "made.json"
    with Results.start(tmp_path, "made", {"k": (1, 2)}) as again:  # JSON knows no tuples
        assert again.known("k=1") and not again.known("k=2")
        again.add("k=2", seconds=2.5)
        again.finish()
    document = results.read(again.path)
    assert document["complete"] and document["facts"] == {"warm": True}
    assert document["rows"] == [{"key": "k=1", "seconds": 1.5}, {"key": "k=2", "seconds": 2.5}]


def test_a_finished_run_is_replaced_by_the_first_row_and_not_before(tmp_path):
    run = interrupted(tmp_path)
    run.finish()
    with Results.start(tmp_path, "made", {"k": [8]}) as new:
        assert not new.known("k=1")
        new.state(warm=False)
        assert results.read(run.path)["complete"], "interrupted before it measured anything"
        new.add("k=8", seconds=1)
    document = results.read(run.path)
    assert [row["key"] for row in document["rows"]] == ["k=8"] and not document["complete"]
    assert document["facts"] == {"warm": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"commit": "def"}, r"other commit \(abc, now def\).*--again"),
        ({"packages": {"numpy": "2.1"}}, r"other packages \(numpy: 2.0, now 2.1\)"),
        ({"packages": {}}, r"other packages \(numpy: 2.0, now None\)"),
        ({"cpu": "Other"}, r"other cpu \(Made, now Other\)"),
    ],
)
def test_rows_of_another_state_do_not_join(tmp_path, described, change, message):
    interrupted(tmp_path)
    described.update(change)
    refused(tmp_path, message)


def test_other_settings_are_refused_with_a_remedy(tmp_path):
    run = interrupted(tmp_path)
    refused(tmp_path, r"other settings \(k: \[1, 2\], now \[4\]\).*--again", {"k": [4]})
    with Results.start(tmp_path, "made", {"k": [4]}, again=True) as anew:
        assert anew.document["rows"] == []
    assert len(results.read(run.path)["rows"]) == 1, "kept until there is a new row"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 0}, "results of schema 0, and this version reads 1: measure again with --again"),
        ({"rows": {}}, "lacks rows"),
        ({"rows": [1]}, "rows without a key"),
        ({"machine": {}}, "does not name its machine"),
    ],
)
def test_results_of_another_form_are_refused(tmp_path, change, message):
    path = interrupted(tmp_path).path
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ResultsError, match=message):
        results.read(path)
    refused(tmp_path, message)
    with Results.start(tmp_path, "made", {"k": [1, 2]}, again=True) as run:
        run.add("k=1")
    assert results.read(path)["schema"] == results.SCHEMA


@pytest.mark.parametrize("text", ['{"schema": 1, "rows"', "[]", "\0", "[" * 100_000])
def test_damaged_files_are_refused(tmp_path, text):
    path = interrupted(tmp_path).path
    path.write_text(text)
    with pytest.raises(ResultsError, match=r"made\.json"):
        results.read(path)


def test_a_full_disk_keeps_the_rows_so_far(tmp_path, monkeypatch):
    run = interrupted(tmp_path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OutputError, match="No space left"):
            run.add("k=2", seconds=2)
    assert [row["key"] for row in results.read(run.path)["rows"]] == ["k=1"]
    assert sorted(file.name for file in run.path.parent.iterdir()) == [".made.lock", "made.json"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"), Results.start(tmp_path / "file", "made", {}):
        pass


def test_plots_are_files_beside(tmp_path):
    assert results.write_plots(tmp_path, {"made-curve": "<svg/>"}) == [tmp_path / "made-curve.svg"]
    assert (tmp_path / "made-curve.svg").read_text() == "<svg/>"


def test_the_machine_is_described():
    found = machine.describe()
    assert json.loads(json.dumps(found)) == found
    assert found["cores"] >= 1 and found["memory_gib"] > 0 and "numpy" in found["packages"]
    assert found["name"] == machine.folder_name(
        found["gpu"] or found["cpu"], None if found["gpu"] else found["cores"]
    )


@pytest.mark.parametrize(
    ("device", "cores", "name"),
    [
        ("AMD EPYC", 2, "amd-epyc-2-cores"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", 8, "intel-r-xeon-r-cpu-2-20ghz-8-cores"),
        ("NVIDIA H100 80GB HBM3", None, "nvidia-h100-80gb-hbm3"),
        ("../../etc", 1, "etc-1-cores"),
    ],
)
def test_folders_are_named_after_machines(device, cores, name):
    assert machine.folder_name(device, cores) == name


def test_a_gpu_gives_its_name_and_driver(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.1'\necho 'NVIDIA H200, 580.1'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = machine.describe()
    assert (found["gpu"], found["driver"], found["name"]) == ("NVIDIA H200", "580.1", "nvidia-h200")
    tool.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert machine.gpu_name() is None


def test_the_commit_is_that_of_the_package_and_of_nothing_around_it(tmp_path, monkeypatch):
    copy = tmp_path / "site" / "machine.py"
    copy.parent.mkdir()
    shutil.copy(machine.__file__, copy)
    monkeypatch.setattr(machine, "__file__", str(copy))
    assert machine._commit() is None, "no source tree"

    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "another project")
    assert machine._commit() is None
    monkeypatch.setenv("GEOENGINE_COMMIT", "told")
    assert machine._commit() == "told"
    git("add", ".")
    git("commit", "-m", "this project")
    commit = machine._commit()
    assert len(commit) == 10
    copy.write_text(copy.read_text() + "\n")
    assert machine._commit() == f"{commit}+changes"


def test_contenders_take_turns():
    order = []
    spreads = timing.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 4
    assert spreads["a"].rounds == 3


def test_a_spread_is_the_median_and_the_ends():
    spread = timing.Spread.of([3.0, 1.0, 2.0, 10.0])
    assert asdict(spread) == spread.to_dict() == {"median": 2.5, "least": 1.0, "most": 10.0, "rounds": 4}


def test_peak_memory_is_of_this_process():
    before = timing.peak_memory_mib()
    block = np.ones(64 << 20, np.uint8)
    assert timing.peak_memory_mib() >= before and block.all()
    code = "from geoengine.bench.suite.timing import peak_memory_mib as p; print(p())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(child.stdout) < 64, "what started it does not count"


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A pool of small plain pictures: what is in them does not matter here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            workload.planet, "tile", lambda z, x, y, size: np.full((size, size, 3), 16 * x + y, np.uint8)
        )
        return workload.tile_pool(tmp_path_factory.mktemp("pool"))


def test_pooled_tiles_are_different_pictures(pool):
    tiles = workload.PooledTiles(pool, "earth")
    rng = np.random.default_rng(0)
    asked = [(4, workload.all_xy(4)), (16, rng.integers(0, 1 << 16, (500, 2))), (17, np.array([[0, 0]] * 3))]
    pictures, addresses = set(), set()
    for z, xy in asked:
        positions = []
        for batch in tiles.read(z, xy.astype(np.int64)):
            positions += batch.positions.tolist()
            for position, picture in zip(batch.positions, batch.pixels, strict=True):
                assert picture.shape == (256, 256, 3)
                pictures.add(picture.tobytes())
                addresses.add((z, *xy[position]))
        assert sorted(positions) == list(range(len(xy)))
    assert len(pictures) == len(addresses) == 256 + 500 + 1
    again = next(iter(tiles.read(16, np.array([[5, 7]])))).pixels
    assert (again == next(iter(tiles.read(16, np.array([[5, 7]])))).pixels).all()
    tiles.close()


def test_pooled_tiles_are_a_source_of_their_own(pool):
    tiles, file = workload.PooledTiles(pool, "earth"), MBTilesSource(pool)
    assert tiles.identity != file.identity, "embeddings of one are not those of the other"
    assert (tiles.tile_size, tiles.min_zoom, tiles.max_zoom) == (256, 0, 18)
    assert tiles.bounds == file.bounds and tiles.storable
    tiles.close()
    file.close()


def test_the_pool_is_made_once_and_never_by_halves(pool, tmp_path, monkeypatch):
    before = pool.stat().st_mtime_ns
    monkeypatch.setattr(workload.planet, "tile", lambda *_, **__: pytest.fail("made again"))
    assert workload.tile_pool(pool.parent) == pool and pool.stat().st_mtime_ns == before

    def stopped(z, x, y, size):
        if x == 8:
            raise KeyboardInterrupt
        return np.zeros((size, size, 3), np.uint8)

    monkeypatch.setattr(workload.planet, "tile", stopped)
    with pytest.raises(KeyboardInterrupt):
        workload.tile_pool(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_pool_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"pool\.mbtiles: cannot be written"):
        workload.tile_pool(tmp_path / "file")

    def full(part):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(workload, "_fill", full)
    with pytest.raises(OutputError, match="disk is full"):
        workload.tile_pool(tmp_path)
