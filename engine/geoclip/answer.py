"""What method geoclip answers: points of the gallery as a `Location`."""

from __future__ import annotations

from geoengine.engine.calibration import STATED_SHARES
from geoengine.engine.geoclip.model import GeoClip, Matches
from geoengine.engine.manifest import model_name
from geoengine.engine.results import Candidate, Location, ScoredTile, Scoring
from geoengine.engine.scoring.answer import RADIUS_SHARE
from geoengine.engine.search import SearchConfig
from geoengine.engine.tiles import LngLat, tile_at

APART_KM = 25.0
"""How far candidates lie from each other: the gallery has hundreds of points in a city, and GeoCLIP's finest
kernel, which reaches 15 km, hardly tells them apart."""


def gallery_location(
    photo: str, matches: Matches, geoclip: GeoClip, config: SearchConfig, seconds: float
) -> Location:
    """Return the gallery's best points as candidates, in tiles of the deepest level and without levels."""
    zoom = config.levels[-1]
    candidates = []
    for rank, (lng, lat) in enumerate(matches.points.tolist(), start=1):
        point, score = LngLat(lng, lat), float(matches.scores[rank - 1])
        tile = tile_at(point, zoom)
        candidates.append(
            Candidate(
                rank=rank,
                tile=tile,
                point=point,
                score=score,
                share=float(matches.shares[rank - 1]),
                path=(ScoredTile(tile=tile, score=score),),
            )
        )
    return Location(
        photo=photo,
        world=geoclip.bundle.world,
        point=candidates[0].point,
        score=candidates[0].score,
        radius_km=matches.radius_km(RADIUS_SHARE),
        candidates=tuple(candidates),
        levels=(),
        k=config.k,
        tiles="",
        attribution="",
        model=model_name(geoclip.bundle.manifest),
        seconds=seconds,
        within="" if config.within is None else config.within.name,
        scoring=Scoring(method=str(config.method), score="gallery"),
        radius_share=RADIUS_SHARE,
        radius_calibrated=False,
        radii_km=tuple(matches.radius_km(share) for share in STATED_SHARES),
    )
