"""Results made up for tests: a search that keeps the true tile and its neighbours at every level."""

import numpy as np

from geoengine.engine.results import Candidate, Level, Location, ScoredTile
from geoengine.engine.sources import TileBatch
from geoengine.engine.tiles import LEVELS, LngLat, Tile, center, parent, tile_at


def made_location(
    photo="harbour.jpg",
    *,
    world="planet",
    lng=-148.2,
    lat=37.3,
    levels=LEVELS,
    top=3,
    attribution="",
    exif=None,
):
    point = LngLat(lng, lat)
    made = []
    for z in levels:
        truth, n = tile_at(point, z), 2**z
        block = parent(truth, max(0, z - 2))
        first = Tile(z, block.x * 4, block.y * 4) if z >= 2 else truth
        beside = {Tile(z, (first.x + i) % n, min(n - 1, first.y + i)) for i in range(4)} - {truth}
        beam = [ScoredTile(tile=truth, score=0.5)]
        beam += [ScoredTile(tile=tile, score=0.4 - 0.01 * i) for i, tile in enumerate(sorted(beside))]
        made.append(Level(zoom=z, candidates=254, missing=2, beam=tuple(beam)))
    scores = {scored.tile: scored for level in made for scored in level.beam}

    def ancestor(tile, z):
        return scores.get(parent(tile, z), ScoredTile(tile=parent(tile, z), score=0.3))

    candidates = tuple(
        Candidate(
            rank=rank,
            tile=scored.tile,
            point=center(scored.tile),
            score=scored.score,
            share=0.6 if rank == 1 else 0.1,
            path=(*(ancestor(scored.tile, z) for z in levels[:-1]), scored),
        )
        for rank, scored in enumerate(made[-1].beam[:top], start=1)
    )
    return Location(
        photo=photo,
        world=world,
        point=candidates[0].point,
        score=candidates[0].score,
        radius_km=1.25,
        candidates=candidates,
        levels=tuple(made),
        k=4,
        tiles="planet" if world == "planet" else "tiles.example.org",
        attribution=attribution,
        model="ViT/none",
        seconds=0.5,
        exif=exif,
    )


class MadeSource:
    """Tiles of one colour each, some of which may be missing; remembers what was asked for."""

    name, attribution = "made", ""

    def __init__(self, *, world="planet", tile_size=16, missing=lambda z, x, y: False, noisy=False):
        self.world = world
        self.tile_size = tile_size
        self.missing = missing
        self.noisy = noisy
        self.asked = []

    def read(self, z, xy):
        self.asked.append((z, xy.copy()))
        there = [i for i, (x, y) in enumerate(xy.tolist()) if not self.missing(z, x, y)]
        for i in reversed(there):  # one at a time, and not in the order of the request
            shape = (1, self.tile_size, self.tile_size, 3)
            pixels = np.full(shape, self.colour(z, *xy[i]), np.uint8)
            if self.noisy:
                pixels = np.random.default_rng([z, *xy[i].tolist()]).integers(0, 256, shape, np.uint8)
            yield TileBatch(np.array([i]), pixels)

    @staticmethod
    def colour(z, x, y):
        return [10 * z % 256, 16 * int(x) % 256, 16 * int(y) % 256]

    def close(self):
        pass
