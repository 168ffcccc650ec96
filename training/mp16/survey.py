"""A first reading of the list of photos: what is wanted of it, and what fetching that will take."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

import numpy as np

from geoengine.engine.photo_sets import PhotoEntry, PhotoSet, PhotoSetError
from geoengine.engine.regions import Region
from geoengine.engine.tiles import LEVELS, xy_at
from geoengine.training.mp16.ledger import Ledger

_AT_ONCE = 4096  # rows compared with the region
_HOSTS = 100  # that are remembered, those with the most photos


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What a list of photos holds: its rows, those that are wanted, and where the photos lie."""

    rows: int
    wanted: int
    local: int
    without_author: int
    hosts: dict[str, int]

    def seconds(self, rate_per_s: float, limit: int | None) -> float:
        """Return how long the downloads take at the least."""
        share = 1.0 if limit is None else min(1.0, limit / max(1, self.wanted))
        return share * max(self.hosts.values(), default=0) / rate_per_s


def wanted(photo_set: PhotoSet, region: Region | None) -> Iterator[tuple[PhotoEntry, bool]]:
    """Yield each photo, and whether its finest tile is one of the region's."""
    entries: list[PhotoEntry] = []
    for entry in photo_set:
        if region is None or entry.data is not None:
            yield entry, region is None or bool(_inside([entry], region)[0])
            continue
        entries.append(entry)
        if len(entries) == _AT_ONCE:
            yield from zip(entries, _inside(entries, region), strict=True)
            entries.clear()
    if entries and region is not None:
        yield from zip(entries, _inside(entries, region), strict=True)


def is_local(entry: PhotoEntry) -> bool:
    """Tell whether a photo's file is here."""
    return entry.data is not None or (entry.file is not None and entry.file.exists())


def survey(photo_set: PhotoSet, region: Region | None, ledger: Ledger) -> Survey:
    """Read the whole list once, and remember what was found.

    Raises PhotoSetError for impossible rows, and when no photo is here or has an address.
    """
    known = ledger.setting("survey")
    if known is None:
        rows = local = without_author = count = 0
        hosts: Counter[str] = Counter()
        for entry, inside in wanted(photo_set, region):
            rows += 1
            if not inside:
                continue
            count += 1
            without_author += not entry.author
            if is_local(entry):
                local += 1
            elif url := entry.url or ledger.address(entry.key):
                hosts[urlsplit(url).netloc] += 1
        found = Survey(
            rows=rows,
            wanted=count,
            local=local,
            without_author=without_author,
            hosts=dict(hosts.most_common(_HOSTS)),
        )
        ledger.set("survey", json.dumps(asdict(found)))
        ledger.save()
    else:
        found = Survey(**json.loads(known))
    if not found.wanted:
        raise PhotoSetError(f"{photo_set.name}: none of its {found.rows} photos is in the region")
    if not found.local and not found.hosts:
        raise PhotoSetError(
            f"{photo_set.name}: none of its photos is here or has an address: give --photos, the folder that "
            "they are in, or --urls, a table of their ids and addresses"
        )
    return found


def _inside(entries: list[PhotoEntry], region: Region) -> list[bool]:
    places = np.array([entry.place for entry in entries], np.float64)  # (rows, 2), longitude first
    return list(region.intersects(LEVELS[-1], xy_at(places[:, 0], places[:, 1], LEVELS[-1])))
