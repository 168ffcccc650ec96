"""Work on a Ray cluster: many workers, each a process of its own that opens what it needs once."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pickle
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from geoengine.engine.errors import GeoEngineError
from geoengine.engine.extras import require_extra

LOCAL, AUTO = "local", "auto"

_ANSWER_S = 5.0  # for a connection to the head node
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


class ClusterError(GeoEngineError):
    """A Ray cluster cannot be used, or failed."""


class Work(Protocol):
    """What workers do; it is sent to each of them, so that it must be possible to pickle it."""

    def begin(self) -> None:
        """Open what the tasks need; raises GeoEngineError when the worker's machine lacks it."""
        ...

    def do(self, task: Any) -> Any:  # noqa: ANN401 - of the work's own kinds, which can be pickled
        """Do a task; done twice, it must come to the same."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """What a cluster runs: `count` workers with `cpus` cores and `gpus` GPUs each."""

    count: int
    cpus: int
    gpus: int

    @classmethod
    def of(cls, resources: dict[str, float], *, count: int | None, threads: int | None) -> Workers:
        """Return the workers for a cluster: one for each GPU, or else for every `threads` cores."""
        cores, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
        if cores < 1:
            raise ClusterError("the Ray cluster has no CPU to give away: start it with --num-cpus")
        if gpus:
            return cls(count=min(count or gpus, gpus), cpus=max(1, min(threads or 1, cores // gpus)), gpus=1)
        cpus = min(threads or max(1, cores // count if count else 1), cores)
        return cls(count=min(count or cores, cores // cpus), cpus=cpus, gpus=0)


class Cluster:
    """A Ray cluster that this process is connected to."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers

    def map(self, work: Work, tasks: Sequence[Any]) -> Iterator[Any]:
        """Do tasks on the workers, and yield their results as they come, in any order.

        A task whose worker died is done again by another one, as often as it takes. Raises the GeoEngineError
        of a task, and ClusterError when the cluster fails.
        """
        import ray
        from ray.data import ActorPoolStrategy

        # Each task is a block of its own: that is what Ray does again when a worker dies.
        rows = [{"task": pickle.dumps(task)} for task in tasks]
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _worker(work),
            batch_size=1,
            compute=ActorPoolStrategy(size=min(self.workers.count, len(rows))),
            num_cpus=self.workers.cpus,
            num_gpus=self.workers.gpus or None,
        )
        try:
            for row in done.iter_rows():
                result = pickle.loads(row["result"])
                if isinstance(result, GeoEngineError):
                    raise result
                yield result
        except ray.exceptions.RayError as error:
            raise ClusterError(f"the Ray cluster failed: {_first_line(error)}") from None


def _worker(work: Work) -> type:
    """Return the class of the workers, which Ray sends to them with the work in it."""

    class GeoEngineWorker:
        def __init__(self) -> None:
            self.ready = False

        def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
            return {"result": [pickle.dumps(self.result(pickle.loads(task))) for task in batch["task"]]}

        def result(self, task: Any) -> Any:  # noqa: ANN401 - as in Work
            try:
                if not self.ready:
                    work.begin()
                    self.ready = True
                return work.do(task)
            except GeoEngineError as error:
                return GeoEngineError(f"{error} (on {socket.gethostname()})")

    return GeoEngineWorker


@contextlib.contextmanager
def open_cluster(address: str, *, count: int | None, threads: int | None) -> Iterator[Cluster]:
    """Connect to a Ray cluster: HOST:PORT of its head node, "auto" for the one on this machine, or "local".

    "local" starts one on this machine, which ends with the block. `count` is the number of workers and
    `threads` that of cores for each, by default what the cluster has. Raises ClusterError when none answers.
    """
    require_extra("ray", ("ray", "pyarrow"), "working on a Ray cluster")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _check_address(address)
    import ray

    # Ray writes about workers that died to stdout, where results go.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            with _quiet():
                _connect(address, None if address != LOCAL or not (count and threads) else count * threads)
            resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray's
            yield Cluster(Workers.of(resources, count=count, threads=threads))
        finally:
            ray.shutdown()


def _connect(address: str, cores: int | None) -> None:
    import ray
    from ray.data import DataContext

    try:
        if address == LOCAL:
            ray.init(
                address="local",
                num_cpus=cores,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        else:
            _take_token()
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        if address == AUTO and isinstance(error, ConnectionError):
            raise ClusterError(
                "no Ray cluster runs on this machine: start one with `ray start --head`, or give --ray local"
            ) from None
        raise ClusterError(f"Ray cannot be used at {address}: {_first_line(error)}") from None
    DataContext.get_current().enable_progress_bars = False
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Ray's C++ part logs at its start from stderr; what is wrong comes as an exception too.

    Later it logs fatal errors only.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _take_token() -> None:
    """Let Ray use the cluster's token where the user has one; by itself it does so on the head node only."""
    stored = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if "RAY_AUTH_TOKEN" in os.environ or stored.is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _check_address(address: str) -> None:
    """Raise ClusterError for an address at which no cluster answers; Ray itself would try for minutes."""
    if address in (LOCAL, AUTO):
        return
    host, colon, port = address.rpartition(":")
    if "://" in address or not (colon and host and port.isdigit()):
        raise ClusterError(
            f"{address!r} is no address of a Ray cluster: give HOST:PORT of its head node (the port is 6379 "
            "unless told otherwise), auto for the cluster on this machine, or local to start one"
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S) as connection:
            connection.sendall(_HTTP2_HELLO)
            answer = connection.recv(9)
    except (OSError, OverflowError) as error:
        raise ClusterError(f"no Ray cluster answers at {address} ({_first_line(error)})") from None
    if answer[3:4] != b"\x04":  # a server of gRPC begins with its settings
        raise ClusterError(f"what answers at {address} is no Ray cluster: give HOST:PORT of its head node")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
