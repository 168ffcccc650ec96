"""Bulk runs and index builds on a real Ray cluster of several processes."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from command_line import refused, run
from made_photos import encoded
from tiny_bundle import write_tiny_bundle, write_tiny_tiles

from geoengine.engine import cluster as cluster_module
from geoengine.engine.bulk import spread
from geoengine.engine.bulk.engines import EngineSpec
from geoengine.engine.bulk.formats import ResultFiles, ResultFormat
from geoengine.engine.bulk.identity import bundle_identity
from geoengine.engine.bulk.items import Items
from geoengine.engine.bulk.jobs import JOB, JobOrder, Target, open_job
from geoengine.engine.bulk.parts import PartDone, Parts
from geoengine.engine.bulk.spread import TRIES, LocateWork, spread_job
from geoengine.engine.bulk.stream import PhotoSearch
from geoengine.engine.cluster import ClusterError, Workers
from geoengine.engine.errors import GeoEngineError
from geoengine.engine.photo_sets import PhotoSetError, open_photo_set
from geoengine.engine.photos import PhotoLimits
from geoengine.engine.scoring.kinds import Score
from geoengine.engine.search import SearchConfig

pytest.importorskip("ray")

PHOTOS, BROKEN = 16, 5
ENVIRONMENT = os.environ | {"GEOENGINE_CACHE": "off", "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
ENVIRONMENT |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def processes(word):
    """The processes whose command line has a word in it: their numbers and command lines."""
    for number in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{number}/cmdline", "rb") as file:
                text = file.read().replace(b"\0", b" ").decode()
            with open(f"/proc/{number}/environ", "rb") as file:
                environment = file.read()
        except OSError:
            continue
        if word in text or word.encode() in environment:
            yield int(number), text


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of a cluster with two cores, started by Ray's own command."""
    home, port = tmp_path_factory.mktemp("r"), free_port()
    mark = f"GEOENGINE_TEST_CLUSTER={home}"
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    start += ["--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={home}"]
    with open(home / "log", "w") as log:
        ray = subprocess.Popen(
            start,
            env=ENVIRONMENT | dict([mark.split("=", 1)]),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    until = time.monotonic() + 120
    while "Ray runtime started" not in (home / "log").read_text():
        assert ray.poll() is None and time.monotonic() < until, (home / "log").read_text()
        time.sleep(0.1)
    yield f"127.0.0.1:{port}"
    for number, _ in processes(mark):
        os.kill(number, signal.SIGKILL)
    ray.wait()


def geoengine(*arguments, before=""):
    """Begin the command in a process of its own, after a line of Python."""
    program = f"{before}\nfrom geoengine.cli import main; main()"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Tiny encoders, tiles of 8 x 8 pixels, and photos of which one cannot be read."""
    home = tmp_path_factory.mktemp("spread")
    write_tiny_bundle(home / "engines", world="earth", sides=(8,))
    write_tiny_tiles(home / "tiles")
    (home / "photos").mkdir()
    for number in range(PHOTOS):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
        data = b"no photo" if number == BROKEN else encoded(pixels, "PNG")
        (home / "photos" / f"{number:02d}.png").write_bytes(data)
    return home


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("GEOENGINE_CACHE", "off")


def engine_of(home):
    return ("--bundle", home / "engines", "--tiles", home / "tiles", "--threads", 1)


def workers():
    return [number for number, text in processes("ray::") if "GeoEngineWorker" in text]


def test_a_killed_worker_costs_no_photo_and_none_is_there_twice(cluster, home):
    out = home / "results.jsonl"
    command = ("locate", home / "photos", *engine_of(home), "--photos-per-part", 1, "--out")
    job = geoengine(*command, out, "--ray", cluster)
    parts, killed, until = home / "results.jsonl.job", None, time.monotonic() + 180
    while job.poll() is None and time.monotonic() < until:
        if killed is None and parts.exists() and list(parts.glob("part-*")):
            killed = workers()[0]
            os.kill(killed, signal.SIGKILL)
        time.sleep(0.005)
    output, errors = job.communicate(timeout=60)
    assert (job.returncode, output) == (1, ""), errors
    assert killed is not None, "a worker was killed while there was work left"
    failures = home / "results.failures.jsonl"
    told = f"{out}: {PHOTOS - 1} photos located; 1 could not be read, see {failures}"
    assert errors == f"geoengine: {told}\n"
    alone = home / "alone.jsonl"
    assert run(*command, alone).exit_code == 1
    assert out.read_bytes() == alone.read_bytes()
    assert len(out.read_text().splitlines()) == PHOTOS - 1
    assert [json.loads(line)["position"] for line in failures.read_text().splitlines()] == [BROKEN]


def test_an_index_of_a_cluster_is_that_of_one_machine(cluster, home):
    command = ("index", "build", *engine_of(home), "--zoom", "1,3", "--out")
    small_parts = "from geoengine.engine.index import building; building.TILES_PER_PART = 9"
    build = geoengine(*command, home / "spread", "--ray", cluster, before=small_parts)
    output, errors = build.communicate(timeout=180)
    assert (build.returncode, errors) == (0, "") and "64 embeddings, 0 tiles missing" in output
    assert run(*command, home / "alone").exit_code == 0
    for file in ("z01.rows", "z03.rows", "manifest.json"):
        assert (home / "spread" / file).read_bytes() == (home / "alone" / file).read_bytes()
    assert not list((home / "spread" / "parts").iterdir())


# --- without a cluster ---


@pytest.fixture
def listening():
    """A server that is none of Ray's: it says something else, or nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.mark.parametrize("command", ["locate", "build"])
def test_an_address_without_a_cluster_is_said_within_seconds(home, tmp_path, listening, monkeypatch, command):
    monkeypatch.setattr(cluster_module, "_ANSWER_S", 0.3)
    begun = {
        "locate": ("locate", home / "photos", *engine_of(home), "--out", tmp_path / "a.csv"),
        "build": ("index", "build", *engine_of(home), "--zoom", "1", "--out", tmp_path / "index"),
    }[command]
    refused(run(*begun, "--ray", f"127.0.0.1:{free_port()}"), "no Ray cluster answers at 127.0.0.1:")
    address = f"127.0.0.1:{listening.getsockname()[1]}"
    refused(run(*begun, "--ray", address), f"no Ray cluster answers at {address} (timed out)")

    def answer():
        connection, _ = listening.accept()
        connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")
        connection.close()

    connection, _ = listening.accept()  # of the command before
    connection.close()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(answer)
        refused(run(*begun, "--ray", address), "is no Ray cluster: give HOST:PORT of its head node")
    for text in ("ray://127.0.0.1:10001", "head", "head:port", ":6379"):
        refused(run(*begun, "--ray", text), f"{text!r} is no address of a Ray cluster")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_ray_needs_results_that_are_written(home):
    photos = ("locate", home / "photos", *engine_of(home))
    refused(run(*photos, "--ray", "local"), "--ray needs --out")
    refused(run(*photos, "--workers", 2, "--out", home / "x.csv"), "--workers needs --ray")
    refused(run(*photos, "--workers", 0, "--ray", "local", "--out", home / "x.csv"), "--workers must be at")


@pytest.mark.parametrize(
    ("resources", "count", "threads", "expected"),
    [
        ({"CPU": 8.0}, None, None, (8, 1, 0)),
        ({"CPU": 8.0}, None, 3, (2, 3, 0)),
        ({"CPU": 8.0}, 2, None, (2, 4, 0)),
        ({"CPU": 8.0}, 20, None, (8, 1, 0)),
        ({"CPU": 2.0}, None, 16, (1, 2, 0)),
        ({"CPU": 32.0, "GPU": 4.0}, None, None, (4, 1, 1)),
        ({"CPU": 32.0, "GPU": 4.0}, 2, 6, (2, 6, 1)),
        ({"CPU": 2.0, "GPU": 4.0}, None, 6, (4, 1, 1)),
    ],
)
def test_workers_are_what_the_cluster_has_room_for(resources, count, threads, expected):
    workers = Workers.of(resources, count=count, threads=threads)
    assert (workers.count, workers.cpus, workers.gpus) == expected


def test_a_cluster_without_a_core_is_refused():
    with pytest.raises(ClusterError, match="no CPU to give away"):
        Workers.of({"GPU": 1.0}, count=None, threads=None)


@pytest.fixture
def work(home, tmp_path):
    """The work of a job of which nothing is done."""
    spec = EngineSpec(
        bundle=str(home / "engines"),
        tiles=str(home / "tiles"),
        index=None,
        backend="auto",
        precision=None,
        threads=1,
        keeps_rows=False,
    )
    (tmp_path / JOB).touch()
    files = ResultFiles(format=ResultFormat.JSONL, world="earth", about={})
    with spec.open() as engine:
        identity = {"encoders": bundle_identity(engine.bundle), "tiles": engine.source.identity}
        search = PhotoSearch(config=SearchConfig(levels=engine.bundle.levels), limits=PhotoLimits())
    return LocateWork(spec=spec, search=search, parts=Parts(tmp_path, files), identity=identity)


def test_work_can_be_sent_and_done_twice(work, home):
    sent = pickle.loads(pickle.dumps(work))
    sent.begin()
    part = (0, list(Items([open_photo_set(home / "photos")]))[:8])
    assert sent.do(part) == PartDone(0, 7, 1)
    before = work.parts.file(0).read_bytes()
    work.parts.file(0).unlink()
    assert sent.do(part) == PartDone(0, 7, 1) and work.parts.file(0).read_bytes() == before
    sent._engine = None
    assert sent.do(part) == PartDone(0, 7, 1), "what is there is not located again"


class HereCluster:
    """Does work in this process, as a cluster of one worker would."""

    workers = Workers(count=1, cpus=1, gpus=0)

    def __init__(self):
        self.waves = []

    def map(self, work, tasks):
        self.waves.append(len(tasks))
        work = pickle.loads(pickle.dumps(work))
        work.begin()
        for task in pickle.loads(pickle.dumps(tasks)):
            yield work.do(task)


@pytest.fixture
def job_of(work, tmp_path):
    order = JobOrder(identity=work.identity, world="earth", about={}, part_photos=5)
    return lambda name: open_job(Target.parse(tmp_path / name, None), order)


def test_photos_are_sent_out_in_waves_and_with_whole_paths(work, home, job_of, tmp_path, monkeypatch):
    monkeypatch.setattr(spread, "PARTS_PER_WAVE", 3)
    monkeypatch.chdir(home)
    (home / "prior.csv").touch()
    cluster, photos = HereCluster(), Items([open_photo_set("photos")])
    with job_of("results.jsonl") as job:
        done = list(spread_job(cluster, work.spec, job, photos, work.search))
    assert cluster.waves == [3, 1] and sum(part.located for part in done) == PHOTOS - 1
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == PHOTOS - 1
    sent = []
    monkeypatch.setattr(cluster, "map", lambda work, tasks: sent.append((work, tasks)) or iter(()))
    search = replace(work.search, config=replace(work.search.config, prior="prior.csv", score=Score.path))
    with job_of("other.jsonl") as job, pytest.raises(GeoEngineError, match="is missing; run it again"):
        list(spread_job(cluster, work.spec, job, photos, search))
    for sent_work, tasks in sent:
        assert all(item.entry.file.is_absolute() for _, items in tasks for item in items)
        assert sent_work.search.config.prior == str(home / "prior.csv")


def test_photos_before_the_damage_of_a_set_are_located(work, home, job_of):
    class Damaged(Items):
        def __iter__(self):
            for number, item in enumerate(super().__iter__()):
                if number == 12:
                    raise PhotoSetError("the tar ends early")
                yield item

    done = []
    with job_of("results") as job, pytest.raises(PhotoSetError, match="ends early"):
        for part in spread_job(
            HereCluster(), work.spec, job, Damaged([open_photo_set(home / "photos")]), work.search
        ):
            done.append(part.number)
    assert done == [0, 1]


def test_a_part_that_kills_worker_after_worker_is_given_up(work, home):
    part = (3, list(Items([open_photo_set(home / "photos")]))[:2])
    for _ in range(TRIES):
        work.parts.tried(3)  # and the worker died
    assert work.do(part) == PartDone(3, 0, 2)
    [first, _] = work.parts.failures([3])
    assert first.reason.endswith("00.png: the worker died 3 times with this photo or another one of its part")
    assert work.parts.tried(3) == 1, "tried again, it counts anew"


def test_a_machine_that_sees_something_else_is_refused(work, home, tmp_path):
    for name, what in (("encoders", "the engine bundle"), ("tiles", "the tile source")):
        other = replace(work, identity={**work.identity, name: "other"})
        with pytest.raises(GeoEngineError, match=f"{what} is not the same as where the job was begun"):
            other.begin()
    (tmp_path / JOB).unlink()
    with pytest.raises(GeoEngineError, match="results must go to storage that all share"):
        work.begin()
