"""Telling what a set of photos is from its name."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from geoengine.engine.photo_sets import PhotoSet, PhotoSetError
from geoengine.engine.photo_sets.folders import FileSet, FolderSet
from geoengine.engine.photos import PHOTO_NAME

_TEXT_TABLES = (".csv", ".tsv")
_TABLES = (*_TEXT_TABLES, ".parquet")
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")
_WHAT_A_SET_IS = (
    "a photo, a folder, a .csv, .tsv or .parquet table, or WebDataset .tar files, "
    "perhaps as a pattern such as 'train-{000..127}.tar' or 'train-*.tar'"
)
_BRACES = re.compile(r"\{([^{}]*)\}")
_SPAN = re.compile(r"(\d+)\.\.(\d+)")


def open_spec(spec: Path | str, *, photos: Path | None, need_place: bool) -> PhotoSet:
    """Open what `spec` names; see `open_photo_set`."""
    path = Path(spec).expanduser()
    try:
        if path.is_dir():
            return _open_folder(path, photos, need_place)
        files = [path] if path.exists() else _expanded(str(path))
    except (OSError, ValueError) as error:
        raise PhotoSetError(f"{spec}: it cannot be read ({error})") from error
    return _open_files(files, str(spec), photos, need_place)


def _open_folder(folder: Path, photos: Path | None, need_place: bool) -> PhotoSet:
    """Open a folder of photos, of tars, or with a table."""
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    tars = [path for path in inside if path.suffix.lower() == ".tar"]
    tables = [path for path in inside if path.suffix.lower() in _TABLES]
    if (folder / "splits.json").exists() and not tars:
        parts = ", ".join(str(path) for path in inside if path.is_dir())
        raise PhotoSetError(f"{folder}: it holds several splits; name one of them: {parts}")
    if tars and not any(PHOTO_NAME.fullmatch(path.name) for path in inside):
        return _open_files(tars, str(folder), photos, need_place)
    if not need_place:
        return FolderSet(folder)
    if len(tables) != 1:
        found = ", ".join(path.name for path in tables) or "none"
        raise PhotoSetError(
            f"{folder}: the photos' places must come from one .csv, .tsv or .parquet table in the folder; "
            f"it has {found}. Name the table, and its folder of photos if that is another one"
        )
    return _open_files(tables, str(tables[0]), photos or folder, need_place)


def _open_files(files: list[Path], spec: str, photos: Path | None, need_place: bool) -> PhotoSet:
    kinds = {path.suffix.lower() for path in files}
    if not files:
        raise PhotoSetError(f"{spec}: there is no such file; photos are {_WHAT_A_SET_IS}")
    if kinds == {".tar"}:
        from geoengine.engine.photo_sets.tars import TarSet

        return TarSet(files, spec, need_place=need_place)
    if kinds <= set(_TEXT_TABLES):
        from geoengine.engine.photo_sets.tables import TextTableSet

        return TextTableSet(files, spec, photos, need_place=need_place)
    if kinds == {".parquet"}:
        from geoengine.engine.photo_sets.parquet import ParquetSet

        return ParquetSet(files, spec, photos, need_place=need_place)
    if len(files) == 1 and not files[0].name.lower().endswith(_COMPRESSED):
        if need_place:
            raise PhotoSetError(f"{spec}: a photo alone has no known place; give a table with coordinates")
        return FileSet(files[0])
    raise PhotoSetError(f"{spec}: these are no photos that can be listed: expected {_WHAT_A_SET_IS}")


def _expanded(pattern: str) -> list[Path]:
    """Return the files that a pattern names, in order; those in braces must exist."""
    if not set(pattern) & set("{*?["):
        return []
    found: list[Path] = []
    for name in _without_braces(pattern):
        matches = sorted(glob.glob(name)) if set(name) & set("*?[") else [name]
        if not Path(name).exists() and matches == [name]:
            raise PhotoSetError(f"{pattern}: there is no file {name}")
        found += map(Path, matches)
    return found


def _without_braces(pattern: str) -> Iterator[str]:
    """Yield what {a,b} and {000..127} in a pattern stand for, as a shell does."""
    pieces = _BRACES.split(pattern)  # text, inside, text, inside, …, text
    choices = [
        [piece] if position % 2 == 0 else _choices(piece, pattern) for position, piece in enumerate(pieces)
    ]
    yield from map("".join, itertools.product(*choices))


def _choices(inside: str, pattern: str) -> list[str]:
    span = _SPAN.fullmatch(inside)
    if span is None:
        return inside.split(",")
    first, last = int(span[1]), int(span[2])
    if last < first:
        raise PhotoSetError(f"{pattern}: the numbers in {{{inside}}} must rise")
    width = len(span[1]) if span[1].startswith("0") else 0
    return [str(number).zfill(width) for number in range(first, last + 1)]
