"""Make the sample photos of the planet: twelve random places on land, and a CSV of where they are."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from geoengine.engine.sources import planet

FOLDER = Path(__file__).parent / "photos"
SEED = 2026


def main() -> None:
    """Write the photos beside this script."""
    rng = np.random.default_rng(SEED)
    lng, lat = rng.uniform(-180, 180, 200), np.degrees(np.arcsin(rng.uniform(-1, 1, 200)))
    inside = np.flatnonzero(planet.is_land(lng, lat) & (np.abs(lat) < 85))[:12]
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / "places.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["photo", "latitude", "longitude"])
        for number, i in enumerate(inside, start=1):
            picture = planet.photo(lat[i], lng[i], seed=SEED + number)
            name = f"planet{number:02d}.jpg"
            Image.fromarray(picture).save(FOLDER / name, quality=82, subsampling=0, optimize=True)
            writer.writerow([name, f"{lat[i]:.6f}", f"{lng[i]:.6f}"])


if __name__ == "__main__":
    main()
