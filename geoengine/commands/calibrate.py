"""`geoengine calibrate`."""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geoengine.commands.options import (
    BackendOption,
    BundleOption,
    MegapixelsOption,
    PrecisionOption,
    ThreadsOption,
    TilesOption,
)
from geoengine.commands.terminal import complain, progress_bar, waiting, write_result
from geoengine.engine.errors import GeoEngineError, PhotoError, SourceError
from geoengine.engine.scoring.kinds import Method

if TYPE_CHECKING:
    from geoengine.bench.calibrate import EvidenceOf, KnownPhotos
    from geoengine.bench.truth import TruthSet
    from geoengine.engine.bundle import EngineBundle
    from geoengine.engine.calibration import Calibration
    from geoengine.engine.engine import GeoEngine
    from geoengine.engine.photos import Photo, PhotoLimits

FIRST_SEED = 1000
"""Of the planet's photos to calibrate on; those of lower seeds are for training and for evaluation."""

_SPLITS = "splits.json"
_USUAL_SPLIT = "valid"
_PHOTOS = 350  # drawn of the planet: a share of them is then known to 2.7 %
_CHUNK = 64

_DataSet = Annotated[
    str | None,
    typer.Argument(
        metavar="DATASET",
        help="planet, a folder made by geoengine prepare, or photos with places: a .csv, .tsv or .parquet "
        "table, a folder with one, or WebDataset .tar files. Default: planet for a bundle of the planet.",
        show_default=False,
    ),
]
_Ks = Annotated[str, typer.Option("--k", help="Beam widths whose radii are calibrated.", metavar="K,…")]
_Photos = Annotated[Path | None, typer.Option(help="Folder of the photos, where the table does not say.")]
_Count = Annotated[int | None, typer.Option(help="Photos drawn of the planet (default 350), or chosen.")]
_Seed = Annotated[int, typer.Option(help="The same seed gives the same photos.")]
_Rows = Annotated[
    Path | None,
    typer.Option(
        help="Keep embeddings of tiles in this folder, for the next calibration. Default: where locate keeps "
        "them, or nowhere for the planet.",
        metavar="DIR",
        show_default=False,
    ),
]
_Split = Annotated[
    str | None,
    typer.Option(help="Split of a folder made by geoengine prepare. Default: valid.", show_default=False),
]


def calibrate(
    data_set: _DataSet = None,
    bundle: BundleOption = None,
    tiles: TilesOption = None,
    k: _Ks = "1,4,16",
    count: _Count = None,
    seed: _Seed = FIRST_SEED,
    split: _Split = None,
    rows: _Rows = None,
    photos: _Photos = None,
    backend: BackendOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    max_megapixels: MegapixelsOption = 100.0,
) -> None:
    """Find out on photos with known places how far a bundle's cosines can be trusted.

    Fits the temperature and the weight of each level for --score path, the mean embeddings for --centred, the
    weights of GeoCLIP for --method fused where the bundle has it, and the radii that answers are given with,
    and writes them into the bundle. The photos must be none that the encoders were trained on, and none that
    they will be tested with.

    Exit status: 0 the calibration was written; 2 nothing was.
    """
    from geoengine.engine.bundle import EngineBundle, resolve_bundle
    from geoengine.engine.calibration import CALIBRATION
    from geoengine.engine.index.known_rows import row_cache_folder
    from geoengine.engine.photos import PhotoLimits
    from geoengine.engine.render.files import check_writable

    widths = _widths(k)
    folder = resolve_bundle("planet" if data_set == "planet" and bundle is None else bundle)
    opened = EngineBundle.open(folder, calibrated=False)
    check_writable(folder / CALIBRATION)
    if not 0 < max_megapixels <= 1e6:
        raise GeoEngineError(f"--max-megapixels must be above 0, got {max_megapixels:g}")
    limits = PhotoLimits(max_pixels=max(1, round(max_megapixels * 1e6)))
    data_set = data_set or ("planet" if opened.world == "planet" else None)
    order = Order(data_set=data_set, photos=photos, count=count, seed=seed, split=split)
    truth = order.open(limits)
    tiles = tiles or ("planet" if opened.world == "planet" else None)
    if tiles is None:
        raise SourceError("give the map tiles to search with --tiles, as in geoengine locate")
    with ExitStack() as stack:
        rows = rows or (None if opened.world == "planet" else row_cache_folder())
        kept = rows or stack.enter_context(tempfile.TemporaryDirectory(prefix="geoengine-rows-"))
        with waiting("loading the encoders"):
            engine = stack.enter_context(
                _open(opened, tiles, Path(kept), backend=backend, precision=precision, threads=threads)
            )
        calibration = _calibrate(engine, truth, order, widths)
        engine.bundle.check_unchanged()
        calibration.write(folder)
    complain(f"wrote {folder / CALIBRATION}")
    write_result(calibration_text(calibration))


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """Which photos are calibrated on."""

    data_set: str | None
    photos: Path | None
    count: int | None
    seed: int
    split: str | None

    def open(self, limits: PhotoLimits) -> TruthSet:
        """Open the set of photos; raises GeoEngineError for one that is for training or for tests."""
        from geoengine.bench.truth_sets import KNOWN_SETS, open_truth_set

        if self.data_set is None:
            raise GeoEngineError("name the photos to calibrate on, such as a table with their places")
        if self.data_set in KNOWN_SETS:
            raise GeoEngineError(
                f"{self.data_set} is a test set: what is calibrated on it cannot be tested with it any more; "
                "calibrate on other photos, such as the valid split that geoengine prepare makes"
            )
        prepared = (Path(self.data_set) / _SPLITS).is_file()
        if self.split is not None and not prepared:
            raise GeoEngineError(f"{self.data_set} has no splits ({_SPLITS}): leave out --split")
        if self.data_set == "planet":
            if self.seed < FIRST_SEED:
                raise GeoEngineError(
                    f"the planet's photos of seeds below {FIRST_SEED} are for training and evaluation, got "
                    f"seed {self.seed}: calibrate with {FIRST_SEED} or more"
                )
            return open_truth_set("planet", count=self.count or _PHOTOS, seeds=[self.seed])
        spec = _split_of(Path(self.data_set), self.split or _USUAL_SPLIT) if prepared else self.data_set
        return open_truth_set(spec, photos=self.photos, count=self.count, seeds=[self.seed], limits=limits)


def calibration_text(calibration: Calibration) -> str:
    """Return what was fitted as a table for a terminal."""
    from rich import box
    from rich.table import Table

    from geoengine.engine.render.table import text_of

    shown = []
    for kind, fit in calibration.fits.items():
        title = f"{kind} searches, fitted on {calibration.photos} photos of {calibration.dataset}"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        names = sorted({name for level in fit.levels.values() for name in level.evidence})
        for heading in ("zoom", "scale", "weight", "inherited", "softmax among", *names):
            table.add_column(heading, justify="right", no_wrap=True)
        for zoom, level in sorted(fit.levels.items()):
            numbers = (level.weight, level.inherited)
            weights = (level.evidence.get(name, 0.0) for name in names)
            table.add_row(
                str(zoom),
                f"{level.scale:.1f}",
                *(f"{number:.2f}" for number in numbers),
                str(level.among),
                *(f"{number:.2f}" for number in weights),
            )
        shown.append(table)
    return text_of(shown, sys.stdout)


def _calibrate(engine: GeoEngine, truth: TruthSet, order: Order, widths: list[int]) -> Calibration:
    from geoengine.bench.calibrate import calibrate

    known, evidence_of = _known_photos(engine, truth, order)
    with progress_bar("searching") as show:
        return calibrate(
            engine,
            known,
            ks=widths,
            evidence_of=evidence_of,
            progress=lambda done, total: show("photos searched", done, total),
        )


def _known_photos(engine: GeoEngine, truth: TruthSet, order: Order) -> tuple[KnownPhotos, EvidenceOf | None]:
    """Embed the photos, and what GeoCLIP says of them; those that cannot be read are named and left out."""
    import numpy as np

    from geoengine.bench.calibrate import KnownPhotos
    from geoengine.engine.errors import BundleError

    if truth.world != engine.bundle.world:
        raise BundleError(
            f"{truth.title} shows the world {truth.world!r}, and engine bundle {engine.bundle.path} knows "
            f"{engine.bundle.world!r}: give photos of that world"
        )
    geoclip = engine.geoclip() if engine.bundle.has_geoclip else None
    method = Method.tiles if geoclip is None else Method.fused
    places, embedded, said = [], [], []
    waiting_photos: list[Photo] = []

    def embed() -> None:
        embedded.append(engine.embed_photos(waiting_photos))
        if geoclip is not None:
            said.append(geoclip.embed(waiting_photos))
        waiting_photos.clear()

    with progress_bar("embedding the photos") as show:
        for photo in truth:
            try:
                square = engine.prepare(photo.read(), method=method)
            except PhotoError as error:
                complain(str(error))
                continue
            waiting_photos.append(square)
            places.append(photo.place)
            show("photos embedded", len(places), None)
            if len(waiting_photos) == _CHUNK:
                embed()
        embed()
    known = KnownPhotos(
        embeddings=np.concatenate(embedded),
        places=places,
        dataset=truth.name,
        identity=truth.identity,
        seed=order.seed,
    )
    if geoclip is None:
        return known, None
    by_geoclip = np.concatenate(said)
    return known, lambda part: [geoclip.evidence(by_geoclip[part])]


def _open(
    bundle: EngineBundle, tiles: str, rows: Path, *, backend: str, precision: str | None, threads: int | None
) -> GeoEngine:
    """Open an engine that keeps rows, for each tile is met several times: in `rows` if nowhere else."""
    from geoengine.engine.backends import open_backend
    from geoengine.engine.engine import GeoEngine
    from geoengine.engine.sources import open_source

    with ExitStack() as undo:
        source = open_source(tiles)
        undo.callback(source.close)
        opened = open_backend(bundle, backend=backend, precision=precision, threads=threads)
        undo.callback(opened.close)
        engine = GeoEngine(bundle, source, opened, row_cache=rows)
        undo.pop_all()
    return engine


def _split_of(folder: Path, split: str) -> str:
    """Return the shards of a split of a prepared data set; raises GeoEngineError."""
    if split in ("train", "test"):
        raise GeoEngineError(
            f"the {split} split of {folder} is for {'training' if split == 'train' else 'tests'}: calibrate "
            f"on {_USUAL_SPLIT}, whose photos the encoders have not seen"
        )
    try:
        splits = json.loads((folder / _SPLITS).read_text(encoding="utf-8"))["splits"]
        known = list(splits)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GeoEngineError(f"{folder / _SPLITS} cannot be read ({error}): prepare the data again") from None
    if split not in known:
        raise GeoEngineError(f"{folder} has no split {split}, only {', '.join(known)}")
    return str(folder / split / "*.tar")


def _widths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise GeoEngineError(f"beam widths are numbers such as --k 4,16, got {text}") from None
