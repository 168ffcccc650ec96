"""A service under load: how fast, how steady, how much memory, and how soon it is back."""

from __future__ import annotations

import http.client
import itertools
import os
import re
import signal
import statistics
import subprocess
import sysconfig
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from geoengine.bench.truth import PlanetPhotos

COMMAND = str(Path(sysconfig.get_path("scripts")) / "geoengine")

_START_S = 120.0
_SAMPLE_S = 1.0
_WARM = 0.2  # of a soak: caches fill up, and memory is not compared


@dataclass(slots=True)
class Service:
    """A running `geoengine serve --demo`: its port, its supervisor, and what it has logged."""

    port: int
    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Return status and body of a request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def figure(self, name: str) -> float:
        """Return the sum of a figure of /metrics over its labels."""
        text = self.request("GET", "/metrics")[1].decode()
        values = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, values))

    def worker(self) -> int:
        """Return the worker's process id."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return int(children.split()[0])


@contextmanager
def running(extra: Sequence[str] = ()) -> Iterator[Service]:
    """Run a service of the planet on a free port."""
    command = [COMMAND, "serve", "--demo", "--port", "0", "--rate", "0", *extra]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    service, ready = Service(0, process), threading.Event()

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            service.log.append(line)
            match = re.search(r"serving on http://\S+:(\d+)", line)
            if match:
                service.port = int(match[1])
                ready.set()

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        if not ready.wait(_START_S):
            raise RuntimeError(f"the service does not start: {''.join(service.log)}")
        yield service
    finally:
        process.terminate()
        process.wait(60)
        listener.join()
        process.stderr.close()


def write_photos(folder: Path, count: int, seed: int) -> list[Path]:
    """Write photos of random places of the planet as JPEG files."""
    import cv2

    paths = []
    for number, photo in enumerate(PlanetPhotos(count, seed)):
        path = folder / f"{number:05d}.jpg"
        cv2.imwrite(str(path), photo.read().pixels[:, :, ::-1])
        paths.append(path)
    return paths


def load(
    photos: Sequence[Path], search: dict[str, str], clients: int, extra: Sequence[str]
) -> dict[str, Any]:
    """Locate each photo once through the service, all clients at once, and once with the bulk command.

    Both begin with nothing known. The bulk command's start is measured alone and taken off.
    """
    options = [f"--{name}={value}" for name, value in search.items()]
    locate = [COMMAND, "locate", "--demo", "--json"]
    started_s, started_cpu_s = _timed([*locate, "--levels=4", "--within=0,0,1,1", str(photos[0])])
    bulk_s, bulk_cpu_s = _timed([*locate, *options, str(photos[0].parent)])
    bulk_s, bulk_cpu_s = bulk_s - started_s, bulk_cpu_s - started_cpu_s
    with running(extra) as service:
        before_cpu_s = service.figure("process_cpu_seconds_total")
        asked = _asked(service, iter(photos), search, clients)
        cpu_s = service.figure("process_cpu_seconds_total") - before_cpu_s
        encoded, shared, known = (
            service.figure(f"geoengine_pictures_{what}") for what in ("encoded", "shared", "known")
        )
        batches = service.figure("geoengine_batch_pictures_count")
    rate, bulk_rate = len(asked.latencies) / asked.seconds, len(photos) / bulk_s
    return {
        "photos": len(photos),
        "clients": clients,
        **search,
        "photos_per_s": rate,
        "bulk_photos_per_s": bulk_rate,
        "ratio": rate / bulk_rate,
        "cpu_s_per_photo": cpu_s / len(photos),
        "bulk_cpu_s_per_photo": bulk_cpu_s / len(photos),
        **_spread(asked.latencies),
        "failed": asked.failed,
        "pictures": {"encoded": encoded, "read_twice": shared, "known": known},
        "pictures_per_batch": encoded / max(1.0, batches),
    }


def soak(
    photos: Sequence[Path], search: dict[str, str], clients: int, seconds: float, extra: Sequence[str]
) -> dict[str, Any]:
    """Locate photos over and over, and watch the worker's memory.

    The change of memory is between the medians of the first and the last fifth after warming up.
    """
    memory: list[tuple[float, float]] = []
    stop = threading.Event()
    with running(extra) as service:
        start = time.monotonic()
        end = start + seconds

        def sample() -> None:
            while not stop.wait(_SAMPLE_S):
                memory.append((time.monotonic() - start, _resident_mib(service.worker())))

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            again = itertools.takewhile(lambda _: time.monotonic() < end, itertools.cycle(photos))
            asked = _asked(service, again, search, clients)
        finally:
            stop.set()
            sampler.join()
    steady = [mib for at, mib in memory if at > _WARM * seconds]
    fifth = max(1, len(steady) // 5)
    first, last = statistics.median(steady[:fifth]), statistics.median(steady[-fifth:])
    return {
        "seconds": asked.seconds,
        "clients": clients,
        **search,
        "requests": len(asked.latencies) + asked.failed,
        "failed": asked.failed,
        "photos_per_s": len(asked.latencies) / asked.seconds,
        **_spread(asked.latencies),
        "memory_mib": [first, last],
        "memory_change": last / first - 1,
        "memory_series_mib": [round(mib, 1) for _, mib in memory[:: max(1, len(memory) // 60)]],
    }


def kill(photo: Path, extra: Sequence[str]) -> dict[str, Any]:
    """Kill the worker, three times, and measure until the service has located a photo again."""
    path, body = "/v1/locate?levels=4&k=1&within=0,0,1,1", photo.read_bytes()
    seconds = []
    with running(extra) as service:
        for _ in range(3):
            assert service.request("POST", path, body, {"Content-Type": "image/jpeg"})[0] == 200
            time.sleep(11)  # a worker that ends at once is replaced more slowly
            os.kill(service.worker(), signal.SIGKILL)
            start = time.monotonic()
            while True:
                try:
                    if service.request("POST", path, body, {"Content-Type": "image/jpeg"})[0] == 200:
                        break
                except OSError:
                    time.sleep(0.02)
            seconds.append(time.monotonic() - start)
    return {"answers_again_s": max(seconds), "each_s": seconds}


@dataclass(slots=True)
class _Asked:
    """What became of many requests; latencies are those of the ones that were answered."""

    latencies: list[float] = field(default_factory=list)
    failed: int = 0
    seconds: float = 0.0


def _asked(service: Service, photos: Iterator[Path], search: dict[str, str], clients: int) -> _Asked:
    """Send the photos from several clients at once, each the next one when it has its answer."""
    path, lock, asked = f"/v1/locate?{urlencode(search)}", threading.Lock(), _Asked()

    def client() -> None:
        while True:
            with lock:
                photo = next(photos, None)
            if photo is None:
                return
            start = time.monotonic()
            try:
                status, _ = service.request("POST", path, photo.read_bytes(), {"Content-Type": "image/jpeg"})
            except OSError:
                status = 0
            with lock:
                if status == 200:
                    asked.latencies.append(time.monotonic() - start)
                else:
                    asked.failed += 1

    start = time.monotonic()
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asked.seconds = time.monotonic() - start
    return asked


def _spread(latencies: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(latencies, n=100, method="inclusive")
    return {"p50_s": cuts[49], "p99_s": cuts[98], "longest_s": max(latencies)}


def _timed(command: Sequence[str]) -> tuple[float, float]:
    """Run a command; returns its wall time and its CPU time in seconds."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command[0]} failed with {status}")
    process.returncode = 0
    return time.monotonic() - start, used.ru_utime + used.ru_stime


def _resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
