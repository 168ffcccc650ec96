"""Which split a photo belongs to, and what it is called there."""

from __future__ import annotations

import hashlib
import re
from enum import StrEnum
from urllib.parse import unquote

from geoengine.engine.photo_sets.names import PHOTO_SUFFIX


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


def key_of(photo_id: str) -> str:
    """Return a photo's name in a shard: without dots, which would end it, and without folders."""
    return re.sub(r"[^\w@-]", "_", PHOTO_SUFFIX.sub("", photo_id)).strip("_")[:80] or "photo"
