"""What a photo is called: the same Flickr photo has other file names in each data set."""

from __future__ import annotations

import re
from urllib.parse import unquote

PHOTO_SUFFIX = re.compile(r"\.(avif|bmp|gif|heic|jfif|jpe?g|png|tiff?|webp)$", re.IGNORECASE)

# PHOTO_SECRET, PHOTO_SECRET_SIZE as Flickr's servers have it, PHOTO_SECRET_SERVER_OWNER as IM2GPS has it.
_FLICKR = re.compile(r"(?:^|_)(\d{6,})_[0-9a-f]{6,12}(?:_[a-z]|_\d+_\d+@n\d+)?$")
_NUMBERED = re.compile(r"(?:^|_)(\d{6,})$")  # 34_8d_9055806529 and 9055806529


def names_of(text: str) -> set[str]:
    """Return the names by which a photo is known, from an id, a path or an address.

    These are the last part without its suffix, and Flickr's number of the photo when there is one.
    """
    return {_stem(text), flickr_number(text) or ""} - {""}


def flickr_number(text: str) -> str | None:
    """Return Flickr's number of the photo in an id, a path or an address; None when there is none."""
    stem = _stem(text)
    found = _FLICKR.search(stem) or _NUMBERED.search(stem)
    return found[1] if found else None


def _stem(text: str) -> str:
    return PHOTO_SUFFIX.sub("", unquote(text).rpartition("/")[2].lower())
