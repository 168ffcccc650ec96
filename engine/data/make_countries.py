"""Make countries.npz, the borders that `geoengine.engine.regions` reads, from two npm packages.

    npm pack world-atlas i18n-iso-countries     (and unpack both)
    python engine/data/make_countries.py WORLD_ATLAS/countries-10m.json ISO_COUNTRIES/codes.json

The borders are Natural Earth's 1:10m admin 0 countries, which are in the public domain; the other package
says which letters belong to the numbers of ISO 3166-1. The TopoJSON's arcs, whole numbers of a grid of 400 m
by 190 m, are kept as they are: differences, zigzag coded, one plane for each byte, which compresses best.
"""

import json
import sys
from pathlib import Path

import numpy as np

OUT = Path(__file__).parent / "countries.npz"
KOSOVO = ("XK", "XKX")  # in use, though ISO 3166-1 has no code for it


def main() -> None:
    """Write countries.npz from the files named on the command line."""
    topology = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    codes = {entry[2]: tuple(entry[:2]) for entry in json.loads(Path(sys.argv[2]).read_text("utf-8"))}
    countries, rings, lengths, holes = [], [], [], []
    owner = []
    for number, geometry in enumerate(topology["objects"]["countries"]["geometries"]):
        name = geometry["properties"]["name"]
        letters = KOSOVO if name == "Kosovo" else codes.get(geometry.get("id"), ("", ""))
        countries.append((*letters, name))
        polygons = geometry["arcs"] if geometry["type"] == "MultiPolygon" else [geometry["arcs"]]
        for polygon in polygons:
            for index, ring in enumerate(polygon):
                owner.append(number)
                holes.append(index > 0)
                lengths.append(len(ring))
                rings += ring
    arcs = [np.array(arc, np.int64) for arc in topology["arcs"]]
    steps = np.concatenate(arcs)  # (points, 2)
    zigzag = ((steps << 1) ^ (steps >> 63)).astype("<u4")
    transform = topology["transform"]
    np.savez_compressed(
        OUT,
        planes=np.ascontiguousarray(zigzag.T).view(np.uint8).reshape(2, -1, 4).transpose(2, 0, 1),
        arc_lengths=np.array([len(arc) for arc in arcs], np.int32),
        ring_arcs=np.array(rings, np.int32),
        ring_lengths=np.array(lengths, np.int32),
        ring_country=np.array(owner, np.int16),
        ring_is_hole=np.array(holes),
        countries=np.array(countries),
        scale=np.array(transform["scale"]),
        translate=np.array(transform["translate"]),
    )
    print(f"{OUT}: {OUT.stat().st_size} bytes, {len(countries)} countries, {len(steps)} points")


if __name__ == "__main__":
    main()
