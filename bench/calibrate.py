"""Calibrating a bundle on photos whose places are known: how far its cosines can be trusted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from geoengine.bench.fitting import Seen, fit_levels, fit_radius
from geoengine.engine.calibration import Calibration, Fit, kind_of
from geoengine.engine.engine import GeoEngine
from geoengine.engine.errors import GeoEngineError
from geoengine.engine.index.segments import tile_ids
from geoengine.engine.manifest import encoder_hash, encoder_name
from geoengine.engine.results import Level
from geoengine.engine.scoring.evidence import TileEvidence
from geoengine.engine.scoring.kinds import Score
from geoengine.engine.scoring.path import Scored
from geoengine.engine.search import SearchConfig, search
from geoengine.engine.tiles import LngLat, xy_at

PHOTOS_PER_CALL = 25
"""Photos searched together, so that the tiles they share are read and encoded once."""

LEAST_PHOTOS = 50
"""With fewer, the fits would say more of these photos than of the encoders."""

_ROUNDS = 2  # the first sees the beams of the paper's score, the second those that its fit chooses

CalibrationProgress: TypeAlias = Callable[[int, int], None]
"""(photos searched, photos to search in all)."""

EvidenceOf: TypeAlias = Callable[[slice], Sequence[TileEvidence]]
"""Returns the evidence of some of the photos, given which."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownPhotos:
    """Photos to calibrate on: embeddings float32[n, d], their places, and where they are from.

    `identity` tells the set from others, `seed` which of its photos were taken.
    """

    embeddings: NDArray[np.float32]
    places: Sequence[LngLat]
    dataset: str
    identity: str = ""
    seed: int = 0


def calibrate(
    engine: GeoEngine,
    photos: KnownPhotos,
    *,
    ks: Sequence[int] = (1, 4, 16),
    beam: int = 16,
    evidence_of: EvidenceOf | None = None,
    progress: CalibrationProgress | None = None,
) -> Calibration:
    """Return the calibration of an engine's bundle, over its tiles.

    Searches of beam width `beam`, in which the true tile stays at every level, show what each level's softmax
    sees; the levels are fitted to that, for plain and for centred cosines, and with `evidence_of` for both of
    them together with it. Radii are fitted to searches of each width of `ks` and each score. Centred
    cosines need an engine that keeps the rows of its searches, and are left out where it does not.

    Raises GeoEngineError for less than `LEAST_PHOTOS` photos, when hardly any of their places has tiles, and
    for an engine with a tile index, whose levels are scored by another softmax than those of a beam.
    """
    if engine.known is not None and engine.known.index is not None:
        raise GeoEngineError(
            "a calibration is fitted to searches without a tile index: open the engine without one"
        )
    if len(photos.places) < LEAST_PHOTOS:
        raise GeoEngineError(
            f"a calibration needs at least {LEAST_PHOTOS} photos with known places, got {len(photos.places)}"
        )
    if not ks or min(ks) < 1:
        raise GeoEngineError(f"the beam widths to calibrate must be 1 or more, got {list(ks)}")
    session = _Session(engine, photos, beam, progress)
    session.plan(ks, with_evidence=evidence_of is not None)
    manifest = engine.bundle.manifest
    calibration = replace(
        Calibration.assumed(manifest),
        encoders=encoder_hash(manifest),
        dataset=photos.dataset,
        identity=photos.identity,
        photos=len(photos.places),
        seed=photos.seed,
    )
    for centred in (False, True) if session.keeps_rows else (False,):
        for evidence in (None, evidence_of) if evidence_of is not None else (None,):
            calibration = session.fitted(calibration, centred, evidence)
            if evidence is None:
                calibration = session.with_radii(calibration, centred, ks)
    return calibration


@dataclass(slots=True)
class _Session:
    """One calibration under way; `seen_ids` are the tiles that plain searches have met, by zoom."""

    engine: GeoEngine
    photos: KnownPhotos
    beam: int
    progress: CalibrationProgress | None
    seen_ids: dict[int, list[NDArray[np.uint64]]] = field(default_factory=dict)
    done: int = 0
    total: int = 0

    @property
    def keeps_rows(self) -> bool:
        return self.engine.known is not None

    def plan(self, ks: Sequence[int], *, with_evidence: bool) -> None:
        kinds = 2 if self.keeps_rows else 1
        fits = _ROUNDS * (2 if with_evidence else 1)
        self.total = len(self.photos.places) * kinds * (fits + len(Score) * len(ks))

    def fitted(self, calibration: Calibration, centred: bool, evidence_of: EvidenceOf | None) -> Calibration:
        """Return the calibration with the fit of one kind of search."""
        manifest = self.engine.bundle.manifest
        start = {zoom: manifest.logit_scale[encoder_name(zoom)] for zoom in self.engine.bundle.levels}
        if centred and not calibration.means:
            means = {zoom: self._mean(zoom) for zoom in self.seen_ids}
            plain = Fit(levels=calibration.fits["plain"].levels)
            calibration = replace(calibration, means=means, fits={**calibration.fits, "centred": plain})
        for turn in range(_ROUNDS):
            of_cosines = turn == 0 and evidence_of is None
            score = Score.paper if of_cosines else Score.path
            seen, names = self._look(calibration, score, centred, evidence_of)
            kind = kind_of(centred=centred, evidence=names)
            old = calibration.fits.get(kind)
            fit = Fit(levels=fit_levels(seen, start), radii={} if old is None else old.radii)
            calibration = replace(calibration, fits={**calibration.fits, kind: fit})
        return calibration

    def with_radii(self, calibration: Calibration, centred: bool, ks: Sequence[int]) -> Calibration:
        """Return the calibration with the radii of one kind of search, for every score and beam width."""
        manifest = self.engine.bundle.manifest
        last = manifest.logit_scale[encoder_name(self.engine.bundle.levels[-1])]
        kind = kind_of(centred=centred)
        radii = {}
        for score in Score:
            scale = 1.0 if score is Score.path else last
            radii[score] = tuple(
                fit_radius(self._search(calibration, k, score, centred), self.photos.places, k, scale)
                for k in sorted(set(ks))
            )
        fit = replace(calibration.fits[kind], radii=radii)
        return replace(calibration, fits={**calibration.fits, kind: fit})

    def _search(
        self, calibration: Calibration, k: int, score: Score, centred: bool
    ) -> list[tuple[Level, ...]]:
        config = SearchConfig(k=k, score=score, centred=centred, levels=self.engine.bundle.levels)
        found: list[tuple[Level, ...]] = []
        for part in self._parts():
            found += search(
                self.photos.embeddings[part],
                self.engine.source,
                self.engine.backend,
                config,
                known=self.engine.known,
                calibration=calibration,
            )
            self._count(part)
        return found

    def _look(
        self, calibration: Calibration, score: Score, centred: bool, evidence_of: EvidenceOf | None
    ) -> tuple[list[list[Seen]], list[str]]:
        """Return what searches in which the truth always stays saw, and the names of the evidence."""
        config = SearchConfig(k=self.beam, score=score, centred=centred, levels=self.engine.bundle.levels)
        every: list[list[Seen]] = []
        names: list[str] = []
        for part in self._parts():
            evidence = [] if evidence_of is None else list(evidence_of(part))
            names = [source.name for source in evidence]
            watch = _Watch(self.photos.places[part])
            search(
                self.photos.embeddings[part],
                self.engine.source,
                self.engine.backend,
                config,
                known=self.engine.known,
                calibration=calibration,
                evidence=evidence,
                joined=self.photos.places[part],
                observe=watch,
            )
            every += watch.seen
            for zoom, ids in watch.ids.items():
                self.seen_ids.setdefault(zoom, []).append(np.unique(np.concatenate(ids)))
            self._count(part)
        usable = sum(map(bool, every))
        if usable < LEAST_PHOTOS:
            raise GeoEngineError(
                f"only {usable} of {len(every)} photos lie where {self.engine.source.name} has tiles, and a "
                f"calibration needs {LEAST_PHOTOS}: give photos of the area that the tiles show"
            )
        return every, names

    def _mean(self, zoom: int) -> NDArray[np.float32]:
        """Return the mean embedding of a zoom's tiles that searches have met."""
        known = self.engine.known
        assert known is not None, "asked only where rows are kept"
        ids = np.unique(np.concatenate(self.seen_ids[zoom]))
        rows, found, _ = known.look_up(zoom, ids)
        return np.asarray(rows[found].mean(axis=0, dtype=np.float64), dtype=np.float32)

    def _parts(self) -> list[slice]:
        count = len(self.photos.places)
        return [
            slice(start, min(count, start + PHOTOS_PER_CALL)) for start in range(0, count, PHOTOS_PER_CALL)
        ]

    def _count(self, part: slice) -> None:
        self.done += part.stop - part.start
        if self.progress is not None:
            self.progress(self.done, self.total)


class _Watch:
    """Turns what a search scored into examples; of a photo, down to the first level without its true tile."""

    def __init__(self, places: Sequence[LngLat]) -> None:
        self.places = places
        self.seen: list[list[Seen]] = [[] for _ in places]
        self.ids: dict[int, list[NDArray[np.uint64]]] = {}
        self._before: dict[int, NDArray[np.uint64]] = {}
        self._lost: set[int] = set()

    def __call__(self, scored: Scored) -> None:
        """Note one photo's candidates of one level."""
        ids = tile_ids(scored.xy)
        self.ids.setdefault(scored.zoom, []).append(ids)
        place = self.places[scored.photo]
        true = np.flatnonzero(ids == tile_ids(xy_at(place.lng, place.lat, scored.zoom))[0])
        if not len(true) or scored.photo in self._lost:
            self._lost.add(scored.photo)
            return
        levels = self.seen[scored.photo]
        above = np.full(len(ids), -1, dtype=np.int64)
        if levels:
            before = self._before[scored.photo]
            order = np.argsort(before)
            shifted = ids >> np.uint64(2 * (scored.zoom - levels[-1].zoom))
            above = order[np.searchsorted(before[order], shifted)]
        self._before[scored.photo] = ids
        levels.append(
            Seen(
                zoom=scored.zoom,
                cosines=scored.cosines.astype(np.float64),
                parents=scored.parents,
                above=above,
                evidence={name: values.astype(np.float64) for name, values in scored.evidence.items()},
                truth=int(true[0]),
            )
        )
