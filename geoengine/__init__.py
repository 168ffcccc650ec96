"""Find where on Earth a photograph was taken.

```python
from geoengine import GeoEngine

with GeoEngine.open("engines/", tiles="world.mbtiles") as engine:
    [location] = engine.locate(["photo.jpg"])
print(location.point, location.radius_km)
```

Importing the package loads nothing else; a name is loaded when it is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geoengine.engine.engine import GeoEngine
    from geoengine.engine.errors import GeoEngineError
    from geoengine.engine.photos import PhotoLimits, read_photo
    from geoengine.engine.results import Candidate, Level, Location
    from geoengine.engine.search import SearchConfig
    from geoengine.engine.tiles import LngLat, Tile

__all__ = [
    "Candidate",
    "GeoEngine",
    "GeoEngineError",
    "Level",
    "LngLat",
    "Location",
    "PhotoLimits",
    "SearchConfig",
    "Tile",
    "read_photo",
]

_HOMES = {
    "Candidate": "results",
    "GeoEngine": "engine",
    "GeoEngineError": "errors",
    "Level": "results",
    "LngLat": "tiles",
    "Location": "results",
    "PhotoLimits": "photos",
    "SearchConfig": "search",
    "Tile": "tiles",
    "read_photo": "photos",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    import importlib

    if name == "__version__":
        from importlib.metadata import version

        return version("geoengine")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"geoengine.engine.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
