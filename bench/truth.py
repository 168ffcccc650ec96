"""Photos whose place is known: what an evaluation goes through, and the planet's endless supply of them."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import numpy as np

from geoengine.engine.errors import GeoEngineError
from geoengine.engine.photos import Photo
from geoengine.engine.sources import planet
from geoengine.engine.tiles import MAX_LATITUDE_DEG, LngLat

EARTH, PLANET = "earth", "planet"

_DRAWS = 1024  # at once; fixed, so that the first places of a seed do not depend on how many are wanted

Read: TypeAlias = Callable[[], Photo]
"""Reads a photo; raises PhotoError."""


class TruthError(GeoEngineError):
    """Photos with known places cannot be found, or are not what an evaluation may use."""


@dataclass(frozen=True, slots=True, eq=False)
class TruthPhoto:
    """A photo and where it was taken. `key` is unique in its set and stable."""

    key: str
    place: LngLat
    read: Read


class TruthSet(Protocol):
    """Photos with known places; may be gone through many times, always in the same order."""

    @property
    def name(self) -> str:
        """Say what it is called, short and fit for a file."""
        ...

    @property
    def title(self) -> str:
        """Say what people call it."""
        ...

    @property
    def world(self) -> str:
        """Name the world that the photos show, "earth" or "planet"."""
        ...

    @property
    def identity(self) -> str:
        """Tell it from other sets; parts of one set, however long, have the same."""
        ...

    @property
    def wanted(self) -> int | None:
        """Say how many photos it has by its published description; None where there is none."""
        ...

    def __iter__(self) -> Iterator[TruthPhoto]: ...

    def remarks(self) -> list[str]:
        """Return what a reader of the figures must know of the set, one sentence each."""
        ...


class PlanetPhotos:
    """Photos of random land places of the built-in planet, drawn in memory.

    Places are uniform over the land by area. The search sees nothing but the pixels. The same seed gives the
    same places and photos, and more photos begin with those of fewer.
    """

    name, title, world, wanted = "planet", "demo planet, not Earth", PLANET, None

    def __init__(self, count: int, seed: int) -> None:
        if count < 1:
            raise TruthError(f"an evaluation needs at least one photo, got {count}")
        if seed < 0:
            raise TruthError(f"the seed must be 0 or more, got {seed}")
        self.count, self.seed = count, seed
        self.identity = f"planet photos of seed {seed}"

    def __iter__(self) -> Iterator[TruthPhoto]:
        seeds = np.random.default_rng([self.seed, 1]).integers(2**31, size=self.count).tolist()
        for number, place in enumerate(land_places(self.count, self.seed)):
            yield _drawn(f"planet photo {number + 1}", place, seeds[number])

    def remarks(self) -> list[str]:
        """Say that figures of the planet measure the chain and not the world."""
        return ["the planet is made up: figures of it are no figures of Earth"]


class PlanetSeeds:
    """The planet's photos of several seeds, `count` of each, as one set."""

    name, title, world, wanted = PlanetPhotos.name, PlanetPhotos.title, PLANET, None

    def __init__(self, count: int, seeds: Sequence[int]) -> None:
        if len(set(seeds)) < len(seeds):
            raise TruthError(f"each seed must be there once, got {', '.join(map(str, seeds))}")
        self.parts = [PlanetPhotos(count, seed) for seed in seeds]
        self.identity = f"planet photos of seeds {', '.join(map(str, seeds))}"

    def __iter__(self) -> Iterator[TruthPhoto]:
        for part in self.parts:
            for photo in part:
                yield replace(photo, key=f"{photo.key} of seed {part.seed}")

    def remarks(self) -> list[str]:
        """Say which photos they are, and what is said of those of one seed."""
        seeds = ", ".join(str(part.seed) for part in self.parts)
        return [f"{self.parts[0].count} photos of each of the seeds {seeds}", *self.parts[0].remarks()]


def _drawn(name: str, place: LngLat, seed: int) -> TruthPhoto:
    return TruthPhoto(name, place, lambda: Photo(name, planet.photo(place.lat, place.lng, seed)))


def land_places(count: int, seed: int) -> list[LngLat]:
    """Return random places on the planet's land, uniform by area between the latitudes that tiles cover."""
    rng = np.random.default_rng([seed, 0])
    top = math.sin(math.radians(MAX_LATITUDE_DEG))
    places: list[LngLat] = []
    while len(places) < count:
        lng = rng.uniform(-180.0, 180.0, _DRAWS)
        lat = np.degrees(np.arcsin(rng.uniform(-top, top, _DRAWS)))
        land = planet.is_land(lng, lat)
        places += [LngLat(*point) for point in zip(lng[land].tolist(), lat[land].tolist(), strict=True)]
    return places[:count]


class PartOf:
    """Some photos of a set, chosen by the hash of a seed and their keys: the same ones each time.

    More photos include those of fewer.
    """

    def __init__(self, whole: TruthSet, count: int, seed: int) -> None:
        if count < 1:
            raise TruthError(f"an evaluation needs at least one photo, got {count}")
        self.whole, self.count, self.seed = whole, count, seed
        self.name, self.title, self.world = whole.name, whole.title, whole.world
        self.identity, self.wanted = whole.identity, whole.wanted

    def __iter__(self) -> Iterator[TruthPhoto]:
        def drawn(key: str) -> bytes:
            return hashlib.sha256(f"{self.seed} {key}".encode()).digest()

        # Keys first: the photos of some sets hold their files' bytes.
        chosen = set(heapq.nsmallest(self.count, (photo.key for photo in self.whole), key=drawn))
        return (photo for photo in self.whole if photo.key in chosen)

    def remarks(self) -> list[str]:
        """Add to the remarks on the set that this is a part."""
        return [
            f"{self.count} photos at most, chosen at random with seed {self.seed}",
            *self.whole.remarks(),
        ]
