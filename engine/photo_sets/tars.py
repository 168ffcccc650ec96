"""Sets of photos in WebDataset tars: a photo and its metadata are neighbours that share a name."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from geoengine.engine.photo_sets import PhotoEntry, PhotoSetError
from geoengine.engine.photo_sets.columns import place_of, text_of
from geoengine.engine.photos import PHOTO_NAME

_MOST_METADATA_BYTES = 1 << 20
_SAMPLED_BYTES = 1 << 16  # of each end of a tar, for the identity


@dataclass(slots=True)
class _Sample:
    """What has been met of a sample: where its photo lies, and its metadata."""

    key: str
    photo: tuple[int, int] | None = None
    metadata: dict[str, Any] | None = None


class TarSet:
    """The samples of uncompressed tars; entries know where in its tar a photo lies, and hold no picture.

    A sample's metadata are its `.json` member, whose fields have the names that columns have in tables.
    Samples without a photo are left out. Raises PhotoSetError for a tar that ends early.
    """

    def __init__(self, files: Sequence[Path], name: str, *, need_place: bool) -> None:
        self.name = name
        self._files = list(files)
        self._need_place = need_place
        if next(iter(self), None) is None:
            raise PhotoSetError(f"{name}: there are no photos in it")

    @cached_property
    def identity(self) -> str:
        """Return the hash of the tars' names, sizes, and first and last bytes."""
        digest = hashlib.sha256()
        for file in self._files:
            size = file.stat().st_size
            digest.update(os.fsencode(f"{file.name}\0{size}\n"))
            with file.open("rb") as stream:
                digest.update(stream.read(_SAMPLED_BYTES))
                stream.seek(max(0, size - _SAMPLED_BYTES))
                digest.update(stream.read())
        return digest.hexdigest()

    def __iter__(self) -> Iterator[PhotoEntry]:
        row = 0
        for file in self._files:
            for sample in _samples(file):
                row += 1
                if sample.photo is not None:
                    yield self._entry(file, row, sample)

    def count(self) -> None:
        """Return None: the tars would have to be read."""
        return None

    def _entry(self, file: Path, row: int, sample: _Sample) -> PhotoEntry:
        assert sample.photo is not None
        metadata = sample.metadata or {}
        where = f"{file}, sample {sample.key}"
        return PhotoEntry(
            key=sample.key,
            row=row,
            place=place_of(metadata, where, need_place=self._need_place),
            author=text_of(metadata, "author"),
            url=text_of(metadata, "url"),
            file=file,
            offset=sample.photo[0],
            size=sample.photo[1],
        )


def _samples(file: Path) -> Iterator[_Sample]:
    """Yield a tar's samples: its members up to the first dot of their names, as WebDataset has it."""
    sample: _Sample | None = None
    try:
        with file.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # or they would all be kept
                folder, slash, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if not member.isreg() or not stem:
                    continue
                if sample is None or sample.key != f"{folder}{slash}{stem}":
                    if sample is not None:
                        yield sample
                    sample = _Sample(f"{folder}{slash}{stem}")
                if suffix.lower() == "json":
                    sample.metadata = _metadata(tar, member, file)
                elif PHOTO_NAME.fullmatch(name):
                    sample.photo = (member.offset_data, member.size)
            _check_end(stream, tar.offset, file)
    except (tarfile.TarError, EOFError) as error:
        raise PhotoSetError(_what_is_wrong(file, str(error))) from error
    except OSError as error:
        raise PhotoSetError(f"{file}: it cannot be read ({error.strerror or error})") from error
    if sample is not None:
        yield sample


def _metadata(tar: tarfile.TarFile, member: tarfile.TarInfo, file: Path) -> dict[str, Any]:
    if member.size > _MOST_METADATA_BYTES:
        raise PhotoSetError(f"{file}: {member.name} has {member.size:,} bytes, too many for metadata")
    content = tar.extractfile(member)
    assert content is not None
    data = content.read()
    try:
        metadata = json.loads(data)
    except ValueError as error:
        raise PhotoSetError(f"{file}: {member.name} is not valid JSON ({error})") from error
    if not isinstance(metadata, dict):
        raise PhotoSetError(f"{file}: {member.name} must be a JSON object")
    return metadata


def _check_end(stream: BinaryIO, offset: int, file: Path) -> None:
    """Raise PhotoSetError unless the tar has the empty block that ends it."""
    stream.seek(offset)
    if stream.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise PhotoSetError(_what_is_wrong(file, "it has no end"))


def _what_is_wrong(file: Path, reason: str) -> str:
    with file.open("rb") as stream:
        head = stream.read(4)
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd")):
        return f"{file}: the tar is compressed; unpack it to a plain .tar first"
    return f"{file}: the tar ends early or is damaged ({reason}); fetch or write it again"
