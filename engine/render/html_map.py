"""Results as one self-contained HTML page: a map that steps from the world down to the answer."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import PurePath
from typing import Any

from geoengine.engine.render.backdrop import Backdrop
from geoengine.engine.render.json_lines import json_object
from geoengine.engine.results import Location


def html_map(locations: Sequence[Location], *, backdrops: Sequence[Backdrop] = ()) -> str:
    """Return the page's text, which needs no other file and no network to be shown.

    Per photo it holds the object that `json_object` makes, with the file's name instead of its path, and not
    the photo itself. `backdrops` are the map pictures of `read_backdrops`; without them the page shows lines
    of latitude and longitude only. Raises ValueError when there is no location.
    """
    if not locations:
        raise ValueError("a map needs at least one located photo")
    data = {
        "photos": [_photo(location) for location in locations],
        "images": [_image(backdrop) for backdrop in backdrops],
    }
    parts = {
        "__STYLE__": _asset("style.css"),
        "__SCRIPT__": _asset("script.js"),
        "__DATA__": _script_json(data),
    }
    # One pass over the template alone: a photo named like a mark stays what it is.
    return re.sub("|".join(parts), lambda mark: parts[mark.group()], _asset("page.html"))


def _asset(name: str) -> str:
    return resources.files("geoengine.engine").joinpath("data", "map", name).read_text("utf-8")


def _photo(location: Location) -> dict[str, Any]:
    # Pages are passed on, and folders are named after people.
    return json_object(location) | {"photo": PurePath(location.photo).name}


def _image(backdrop: Backdrop) -> dict[str, Any]:
    encoded = base64.b64encode(backdrop.jpeg).decode("ascii")
    return {"box": backdrop.region.box, "src": f"data:image/jpeg;base64,{encoded}"}


def _script_json(data: object) -> str:
    """Return JSON in which nothing can end the script element that holds it, whatever a file is called."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))  # ASCII
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
