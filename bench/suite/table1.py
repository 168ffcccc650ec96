"""Table 1 of the paper on this machine: what one photo costs for each beam width, beside what it cost there.

For each k, a process of its own locates photos with nothing known of the tiles, with the first levels in an
index, and with all tiles known. The paper's procedure is run again in between, in this process, so that
whatever else the machine does falls on both; its time for a search is that of its tiles, times their number.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from geoengine.bench.accuracy import accuracy, errors_km
from geoengine.bench.published import published
from geoengine.bench.suite import paper
from geoengine.bench.suite.locating import Locator, Order, Tiles, locating
from geoengine.bench.suite.network import pool_bodies, serving
from geoengine.bench.suite.results import Progress, Results
from geoengine.bench.suite.table1_inputs import Photos, accuracy_note, opened_photos, random_index
from geoengine.bench.suite.table1_tables import key_figures, speedups, tables
from geoengine.bench.suite.timing import Spread
from geoengine.bench.suite.workload import resolve_bundle, tile_pool
from geoengine.engine.backends import check_choice
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.errors import GeoEngineError
from geoengine.engine.manifest import model_name
from geoengine.engine.photo_sets import PhotoSetError
from geoengine.engine.search import SearchConfig
from geoengine.engine.sources import open_source
from geoengine.engine.tiles import LngLat

__all__ = ["Table1Settings", "key_figures", "measure", "speedups", "tables"]

_COUNT_ON_GPU = 25
_COUNT_AT_16 = 3  # photos on a CPU, where tiles take the time; fewer at larger k


@dataclass(frozen=True, kw_only=True, slots=True)
class Table1Settings:
    """What is measured; `photos` is a folder, `network_ms` how long a tile server takes to answer.

    `bundle` is what `resolve_bundle` takes. `tiles` are the suite's own where it is None, and the planet's
    for encoders of the planet. `count` is how many photos are located at each k, by default as many as take
    some minutes. `budget_s` is how long the paper's procedure runs at each k. Raises GeoEngineError.
    """

    ks: tuple[int, ...] = (16, 32, 64)
    bundle: str | None = None
    backend: str = "auto"
    precision: str | None = None
    photos: str | None = None
    count: int | None = None
    tiles: str | None = None
    network_ms: float | None = None
    budget_s: float = 20.0

    def __post_init__(self) -> None:
        for k in self.ks:
            SearchConfig(k=k)  # refuses what cannot be
        if len(set(self.ks)) < len(self.ks) or not self.ks:
            raise GeoEngineError(f"each k once, and at least one: got {' '.join(map(str, self.ks))}")
        check_choice(self.backend, self.precision)
        if self.photos is not None and not Path(self.photos).exists():
            raise PhotoSetError(f"{self.photos}: there is no such folder of photos")
        if self.count is not None and self.count < 1:
            raise GeoEngineError(f"at least one photo must be located, got {self.count}")
        if not self.budget_s > 0:
            raise GeoEngineError(f"the paper's procedure needs more than 0 seconds, got {self.budget_s:g}")
        if self.network_ms is not None and self.network_ms < 0:
            raise GeoEngineError(f"a server answers after 0 ms or more, got {self.network_ms:g}")
        if self.network_ms is not None and self.tiles is not None:
            raise GeoEngineError("the simulated network serves the suite's own tiles: leave out the others")

    @property
    def benchmark(self) -> str:
        """The name of the file of results."""
        return "table1" if self.network_ms is None else "table1-network"

    def to_dict(self) -> dict[str, Any]:
        """Return them JSON-ready."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """All that rows are measured with; `tower` is None where the paper's procedure cannot be run."""

    settings: Table1Settings
    bundle: EngineBundle
    tiles: Tiles
    photos: Photos
    folder: Path
    accuracy_note: str
    results: Results
    progress: Progress


def measure(settings: Table1Settings, results: Results, progress: Progress) -> None:
    """Add the rows that are not there, one for each k; raises GeoEngineError."""
    if settings.tiles is not None:
        open_source(settings.tiles).close()  # what is none is refused before encoders are built
    folder = resolve_bundle(settings.bundle, lambda done, total, what: progress(what, done, total or None))
    bundle = EngineBundle.open(folder)
    spec = settings.tiles
    if spec is None and bundle.world == "planet" and settings.network_ms is None:
        spec = "planet"
    photos = opened_photos(settings.photos, bundle, settings.count or _COUNT_ON_GPU)
    with (
        tempfile.TemporaryDirectory(prefix="geoengine-table1-") as temporary,
        _served(settings, progress) as port,
    ):
        run = _Run(
            settings=settings,
            bundle=bundle,
            tiles=Tiles(spec=spec, port=port),
            photos=photos,
            folder=Path(temporary),
            accuracy_note=accuracy_note(bundle, photos, spec),
            results=results,
            progress=progress,
        )
        results.state(
            model=model_name(bundle.manifest),
            weights="random" if bundle.manifest.pretrained == "none" else bundle.manifest.pretrained,
            world=bundle.world,
            levels=list(bundle.levels),
            network_ms=settings.network_ms,
            photos=photos.title,
            accuracy_note=run.accuracy_note,
        )
        tower: _Tower = None
        for k in settings.ks:
            if not results.known(f"k={k}"):
                tower = _measure_k(run, k, tower)


_Tower: TypeAlias = paper.Tower | str | None
"""A tower, why there is none, or None before anybody has looked."""


def _measure_k(run: _Run, k: int, tower: _Tower) -> _Tower:
    """Add the row of one k; returns the tower, opened if it was not."""
    settings, bundle = run.settings, run.bundle
    run.progress(f"k={k}: loading the encoders", 0, None)
    order = Order(
        bundle=bundle.path,
        tiles=run.tiles,
        backend=settings.backend,
        precision=settings.precision,
        k=k,
        folder=run.folder,
    )
    with locating(order) as locator, closing(run.tiles.open(bundle.world)) as source:
        about = locator.about
        if tower is None:
            tower = _opened_tower(bundle, on_gpu=about["on_gpu"])
        run.results.state(**about, paper=_said_of(tower))
        count = settings.count or (_COUNT_ON_GPU if about["on_gpu"] else max(1, 16 * _COUNT_AT_16 // k))
        count = min(count, len(run.photos.read))
        index = None
        if run.tiles.spec in (None, "planet"):
            index = random_index(run.folder / "index", bundle, source, about)
        procedure = None
        if isinstance(tower, paper.Tower):
            procedure = paper.Procedure(tower, source, run.photos.read[0](), k, bundle.levels)
        located = [_located(run, locator, k, number, count, index, procedure) for number in range(count)]
        peak_mib = locator.peak_mib()
    row = _row(located, None if procedure is None else procedure.measured())
    run.results.add(
        f"k={k}", k=k, **row, published_s=_published_s(k), peak_mib=peak_mib, accuracy=_accuracy(run, located)
    )
    return tower


def _located(
    run: _Run,
    locator: Locator,
    k: int,
    number: int,
    count: int,
    index: Path | None,
    procedure: paper.Procedure | None,
) -> dict[str, Any]:
    """Locate one photo, with the paper's procedure in the pauses, and return the figures."""

    def between(share: float) -> None:
        done = (number + share) / count
        run.progress(f"k={k}: photo {number + 1} of {count}", round(100 * done), 100)
        if procedure is not None:
            procedure.work(run.settings.budget_s * done - procedure.seconds)

    return locator.locate(run.photos.read[number](), index, between)


def _row(located: Sequence[dict[str, Any]], measured: dict[str, Any] | None) -> dict[str, Any]:
    def of(kind: str, figure: str) -> list[Any]:
        return [photo[kind][figure] for photo in located]

    tiles = statistics.median(of("cold", "tiles"))
    indexed = located[0]["indexed"] is not None
    if measured is not None:
        per_tile_s = measured["seconds"] / measured["tiles"]
        measured = measured | {"searched": tiles, "extrapolated_s": per_tile_s * tiles}
    return {
        "photos": len(located),
        "tiles": tiles,
        "distinct": statistics.median(of("cold", "distinct")),
        "cold": Spread.of(of("cold", "seconds")).to_dict(),
        "indexed": Spread.of(of("indexed", "seconds")).to_dict() if indexed else None,
        "indexed_distinct": statistics.median(of("indexed", "distinct")) if indexed else None,
        "warm": Spread.of([photo["warm"] for photo in located]).to_dict(),
        "paper": measured,
    }


def _accuracy(run: _Run, located: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the accuracy of the answers with nothing known; None where it would say nothing."""
    places = [place for place in run.photos.places[: len(located)] if place is not None]
    if run.accuracy_note or len(places) < len(located):
        return None
    return accuracy(errors_km([LngLat(*photo["point"]) for photo in located], places)).to_dict()


def _published_s(k: int) -> float | None:
    """Return what Table 1 of the paper says of a beam width, None for others."""
    rows = (row for row in published() if row.method == f"Kim et al., k={k}")
    return next((row.seconds_per_photo for row in rows), None)


def _opened_tower(bundle: EngineBundle, *, on_gpu: bool) -> paper.Tower | str:
    if paper.missing() is not None:
        return ""
    try:
        return paper.open_tower(bundle.manifest, on_gpu=on_gpu)
    except GeoEngineError as error:
        return str(error)


def _said_of(tower: paper.Tower | str | None) -> dict[str, Any]:
    if isinstance(tower, paper.Tower):
        return tower.about()
    return {"left_out": tower} if tower else {"missing": paper.missing()}


@contextmanager
def _served(settings: Table1Settings, progress: Progress) -> Iterator[int | None]:
    """Serve the suite's tiles while the block runs, where a network is to be simulated; yields the port."""
    if settings.network_ms is None:
        with nullcontext():
            yield None
        return
    progress("making map tiles", 0, None)
    with serving(pool_bodies(tile_pool()), settings.network_ms) as port:
        yield port
