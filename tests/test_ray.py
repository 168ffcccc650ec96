"""Bulk runs and index builds on a real Ray cluster of several processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from command_line import run
from made_photos import encoded
from tiny_bundle import write_tiny_bundle, write_tiny_tiles

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
    until = time.monotonic() + 60
    while "Ray runtime started" not in (home / "log").read_text():
        assert ray.poll() is None and time.monotonic() < until, (home / "log").read_text()
        time.sleep(0.1)
    yield f"127.0.0.1:{port}"
    for number, _ in processes(mark):
        os.kill(number, signal.SIGKILL)
    ray.wait()


def geoengine(*arguments):
    """Begin the command in a process of its own."""
    command = [sys.executable, "-c", "from geoengine.cli import main; main()", *map(str, arguments)]
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


def engine_of(home):
    return ("--bundle", home / "engines", "--tiles", home / "tiles", "--threads", 1)


def workers():
    return [number for number, text in processes("ray::") if "GeoEngineWorker" in text]


def test_a_killed_worker_costs_no_photo_and_none_is_there_twice(cluster, home, monkeypatch):
    monkeypatch.setenv("GEOENGINE_CACHE", "off")
    out = home / "results.jsonl"
    command = ("locate", home / "photos", *engine_of(home), "--photos-per-part", 1, "--out")
    job = geoengine(*command, out, "--ray", cluster)
    parts, killed, until = home / "results.jsonl.job", None, time.monotonic() + 90
    while job.poll() is None and time.monotonic() < until:
        if killed is None and parts.exists() and list(parts.glob("part-*")):
            killed = workers()[0]
            os.kill(killed, signal.SIGKILL)
        time.sleep(0.005)
    output, errors = job.communicate(timeout=10)
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
