"""GeoCLIP (Vivanco Cepeda et al. 2023): photos and places in one space; a photo is compared with a gallery.

Its encoders and gallery lie in a bundle of their own, `geoclip/` in an engine bundle's folder, which
`geoengine build-engines --geoclip` makes from the published package.
"""

from geoengine.engine.geoclip.model import GeoClip, Matches, TwoSquares, no_geoclip, no_map_encoders

__all__ = ["GeoClip", "Matches", "TwoSquares", "no_geoclip", "no_map_encoders"]
