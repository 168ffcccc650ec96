"""What a photo is called: the same Flickr photo has other file names in each data set."""

from __future__ import annotations

import hashlib
import re
from enum import StrEnum
from urllib.parse import unquote

_SUFFIX = re.compile(r"\.(avif|bmp|gif|heic|jfif|jpe?g|png|tiff?|webp)$", re.IGNORECASE)
# PHOTO_SECRET, PHOTO_SECRET_SIZE as Flickr's servers have it, PHOTO_SECRET_SERVER_OWNER as IM2GPS has it.
_FLICKR = re.compile(r"(?:^|_)(\d{6,})_[0-9a-f]{6,12}(?:_[a-z]|_\d+_\d+@n\d+)?$")
_NUMBERED = re.compile(r"(?:^|_)(\d{6,})$")  # 34_8d_9055806529 and 9055806529


class Split(StrEnum):
    """The three parts of the photos, 10:1:1."""

    TRAIN = "train"
    VALID = "valid"
    TEST = "test"


def split_of(author: str, photo_id: str) -> Split:
    """Return the split of an uploader's photos; of a photo alone, when nobody knows its uploader.

    The hash of the name decides, so that it is the same in every data set and for every order of rows.
    """
    text = f"author\0{unquote(author)}" if author else f"photo\0{photo_id}"
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 12
    return {0: Split.VALID, 1: Split.TEST}.get(share, Split.TRAIN)


def names_of(text: str) -> set[str]:
    """Return the names by which a photo is known, from an id, a path or an address.

    These are the last part without its suffix, and Flickr's number of the photo when there is one.
    """
    stem = _SUFFIX.sub("", unquote(text).rpartition("/")[2].lower())
    found = _FLICKR.search(stem) or _NUMBERED.search(stem)
    return {stem, found[1]} if found else {stem} - {""}


def key_of(photo_id: str) -> str:
    """Return a photo's name in a shard: without dots, which would end it, and without folders."""
    return re.sub(r"[^\w@-]", "_", _SUFFIX.sub("", photo_id)).strip("_")[:80] or "photo"
