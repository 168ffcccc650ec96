"""WebDataset shards, lists of photos, and the file that names them all."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import IO

from geoengine.engine.render.files import OutputError, write_atomically
from geoengine.training.mp16.ledger import Ledger, Outcome, StagedPhoto
from geoengine.training.mp16.names import Split

SPLITS_FILE = "splits.json"
DROPPED_FILE = "dropped.csv"
_SCHEMA = 1


def shard_name(split: Split, shard: int) -> str:
    """Return the path of a shard in the data set's folder."""
    return f"{split.value}/{shard:06d}.tar"


def write_shards(folder: Path, ledger: Ledger, split: Split, size: int, *, rest: bool) -> None:
    """Write a split's waiting photos into shards of `size`; with `rest`, the last ones into a smaller shard.

    A shard appears when it is whole; if the process ends before the ledger knows of it, it is written again,
    byte for byte. Raises OutputError.
    """
    while (waiting := ledger.staged(split)) >= size or (rest and waiting):
        shard = ledger.next_shard(split)
        photos = list(ledger.waiting(split, size))
        _write_whole(folder / shard_name(split, shard), partial(_write_shard, photos))
        ledger.sharded([photo.number for photo in photos], shard)


def _write_shard(photos: list[StagedPhoto], stream: IO[bytes]) -> None:
    from webdataset import TarWriter

    writer = TarWriter(stream, user="", group="", mtime=0, encoder=False)
    for photo in photos:
        metadata = json.dumps(photo.metadata, ensure_ascii=False).encode()
        writer.write({"__key__": photo.key, "jpg": photo.jpeg, "json": metadata})
    writer.close()


def write_lists(folder: Path, ledger: Ledger, source: Mapping[str, object], left: int) -> None:
    """Write the lists of photos and, last, the file of splits; `left` photos wait for another run.

    `source` is what the file says of where the photos come from. Raises OutputError.
    """
    splits: dict[str, object] = {}
    for split in Split:
        rows = ((*values, shard_name(split, int(str(shard)))) for *values, shard in ledger.listed(split))
        names = ("id", "latitude", "longitude", "author", "phash", "shard")
        _write_table(folder / f"{split.value}.csv", names, rows)
        shards = ledger.shards(split)
        splits[split.value] = {
            "photos": sum(count for _, count in shards),
            "shards": [shard_name(split, shard) for shard, _ in shards],
            "list": f"{split.value}.csv",
        }
    _write_table(folder / DROPPED_FILE, ("id", "outcome", "reason", "url"), ledger.dropped())
    outcomes = {outcome.value: count for outcome, count in ledger.outcomes().items()}
    content = {"schema": _SCHEMA, "left": left, "source": source, "outcomes": outcomes, "splits": splits}
    outcomes.setdefault(Outcome.KEPT.value, 0)
    write_atomically(folder / SPLITS_FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _write_table(file: Path, names: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    def write(stream: IO[bytes]) -> None:
        text = io.TextIOWrapper(stream, "utf-8", newline="", write_through=False)
        writer = csv.writer(text)
        writer.writerow(names)
        writer.writerows(rows)
        text.flush()
        text.detach()

    _write_whole(file, write)


def _write_whole(file: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write a file that is either complete or not there."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        file.parent.mkdir(exist_ok=True)
        with temporary.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"{file}: cannot be written ({error.strerror or error}); go on later") from error
