"""What has become of each photo, in an SQLite file: whoever kills the job loses a second of its work."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from geoengine.engine.photo_sets import PhotoEntry
from geoengine.engine.render.files import OutputError
from geoengine.training.mp16.names import Split, key_of, split_of
from geoengine.training.mp16.pictures import Picture

MOST_DIFFERING_BITS = 3
"""Of 64: photos that differ in fewer bits of the perceptual hash count as one."""

_BANDS = MOST_DIFFERING_BITS + 1  # of which one at least is the same in two hashes that differ in so few bits
_BAND_BITS = 64 // _BANDS
_COMMIT_S = 1.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS addresses (id TEXT PRIMARY KEY, url TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS dropped (id TEXT PRIMARY KEY, outcome TEXT, reason TEXT, url TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS kept (
  number INTEGER PRIMARY KEY, id TEXT UNIQUE, key TEXT UNIQUE, split TEXT, shard INTEGER,
  lng REAL, lat REAL, author TEXT, url TEXT, width INTEGER, height INTEGER,
  content BLOB, phash TEXT, band0 INTEGER, band1 INTEGER, band2 INTEGER, band3 INTEGER
);
CREATE INDEX IF NOT EXISTS kept_content ON kept (content);
CREATE INDEX IF NOT EXISTS kept_band0 ON kept (band0);
CREATE INDEX IF NOT EXISTS kept_band1 ON kept (band1);
CREATE INDEX IF NOT EXISTS kept_band2 ON kept (band2);
CREATE INDEX IF NOT EXISTS kept_band3 ON kept (band3);
CREATE INDEX IF NOT EXISTS kept_shard ON kept (split, shard, number);
CREATE TABLE IF NOT EXISTS staged (number INTEGER PRIMARY KEY, jpeg BLOB);
"""


class Outcome(StrEnum):
    """What can become of a photo."""

    KEPT = "kept"
    DEAD = "dead"
    REFUSED = "refused"
    UNREADABLE = "unreadable"
    DUPLICATE = "duplicate"
    EVALUATION = "evaluation"
    FAILED = "failed"
    LATER = "later"

    @property
    def is_final(self) -> bool:
        """Whether another run leaves the photo alone."""
        return self not in (Outcome.FAILED, Outcome.LATER)


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedPhoto:
    """A photo that waits for its shard."""

    number: int
    key: str
    jpeg: bytes
    metadata: dict[str, object]


class Ledger:
    """The job's memory: what became of each photo, and the pictures whose shard is not full yet.

    Raises OutputError when the file cannot be read or written, and when another process writes it.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            self._database = sqlite3.connect(file, timeout=0.2, isolation_level=None)
            self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.executescript(_SCHEMA)
            self._database.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise self._error(error) from error
        self._committed_at = time.monotonic()

    def close(self) -> None:
        """Save everything and close the file."""
        try:
            if self._database.in_transaction:  # it is not after an error that undid what was not saved
                self._do("COMMIT")
        finally:
            self._database.close()

    def save(self) -> None:
        """Make what was recorded safe against everything that may happen to the process."""
        self._do("COMMIT")
        self._do("BEGIN IMMEDIATE")
        self._committed_at = time.monotonic()

    def setting(self, name: str) -> str | None:
        """Return a value that was kept, None when there is none."""
        row = self._do("SELECT value FROM settings WHERE name = ?", name).fetchone()
        return None if row is None else str(row[0])

    def set(self, name: str, value: str) -> None:
        """Keep a value."""
        self._do("INSERT OR REPLACE INTO settings VALUES (?, ?)", name, value)

    # --- addresses ---

    def add_addresses(self, rows: Iterable[tuple[str, str]]) -> None:
        """Keep (id, address) pairs, in place of those from before; ids with / and with _ are the same."""
        try:
            self._database.execute("DELETE FROM addresses")
            self._database.executemany(
                "INSERT OR REPLACE INTO addresses VALUES (?, ?)", ((key_of(each), url) for each, url in rows)
            )
        except sqlite3.Error as error:
            raise self._error(error) from error

    def address(self, photo_id: str) -> str:
        """Return a photo's address, "" when none is known."""
        row = self._do("SELECT url FROM addresses WHERE id = ?", key_of(photo_id)).fetchone()
        return "" if row is None else str(row[0])

    # --- photos ---

    def is_done(self, photo_id: str) -> bool:
        """Tell whether nothing is left to do for a photo."""
        if self._do("SELECT 1 FROM kept WHERE id = ?", photo_id).fetchone():
            return True
        row = self._do("SELECT outcome FROM dropped WHERE id = ?", photo_id).fetchone()
        return row is not None and Outcome(row[0]).is_final

    def drop(self, photo_id: str, outcome: Outcome, reason: str, url: str) -> None:
        """Record that a photo was not kept."""
        self._do("INSERT OR REPLACE INTO dropped VALUES (?, ?, ?, ?)", photo_id, outcome.value, reason, url)
        self._save_now_and_then()

    def twin_of(self, picture: Picture) -> str | None:
        """Return the id of a photo that is kept already and is, or looks, the same."""
        row = self._do("SELECT id FROM kept WHERE content = ?", picture.content).fetchone()
        if row is not None:
            return str(row[0])
        clauses = " UNION ".join(f"SELECT id, phash FROM kept WHERE band{n} = ?" for n in range(_BANDS))
        for photo_id, phash in self._do(clauses, *_bands(picture.phash)):
            if (int(phash, 16) ^ picture.phash).bit_count() <= MOST_DIFFERING_BITS:
                return str(photo_id)
        return None

    def keep(self, entry: PhotoEntry, url: str, picture: Picture) -> None:
        """Record a photo that is kept; the picture waits here until its split has enough for a shard."""
        assert entry.place is not None
        key = key_of(entry.key)
        if self._do("SELECT 1 FROM kept WHERE key = ?", key).fetchone():
            key = f"{key}-{picture.content.hex()[:12]}"
        place = (entry.place.lng, entry.place.lat)
        split = split_of(entry.author, entry.key).value
        values = (entry.key, key, split, None, *place, entry.author, url, picture.width, picture.height)
        hashes = (picture.content, f"{picture.phash:016x}", *_bands(picture.phash))
        marks = ", ".join("?" * (1 + len(values) + len(hashes)))
        number = self._do(f"INSERT INTO kept VALUES ({marks})", None, *values, *hashes).lastrowid
        self._do("INSERT INTO staged VALUES (?, ?)", number, picture.jpeg)
        self._do("DELETE FROM dropped WHERE id = ?", entry.key)  # where it failed in an earlier run
        self._save_now_and_then()

    def outcomes(self) -> dict[Outcome, int]:
        """Return how many photos came to what."""
        counts = dict(self._do("SELECT outcome, count(*) FROM dropped GROUP BY outcome").fetchall())
        counts[Outcome.KEPT.value] = self._do("SELECT count(*) FROM kept").fetchone()[0]
        return {outcome: counts[outcome.value] for outcome in Outcome if outcome.value in counts}

    # --- shards ---

    def staged(self, split: Split) -> int:
        """Return how many photos of a split wait for their shard."""
        condition = "split = ? AND shard IS NULL"
        return int(self._do(f"SELECT count(*) FROM kept WHERE {condition}", split.value).fetchone()[0])

    def next_shard(self, split: Split) -> int:
        """Return the number of a split's next shard."""
        row = self._do("SELECT max(shard) FROM kept WHERE split = ?", split.value).fetchone()
        return 0 if row[0] is None else int(row[0]) + 1

    def waiting(self, split: Split, count: int) -> Iterator[StagedPhoto]:
        """Yield the first photos of a split that wait for their shard, in order."""
        rows = self._do(
            "SELECT number, key, jpeg, lat, lng, author, id, url, width, height FROM kept JOIN staged "
            "USING (number) WHERE split = ? AND shard IS NULL ORDER BY number LIMIT ?",
            split.value,
            count,
        )
        names = ("latitude", "longitude", "author", "id", "url", "width", "height")
        for number, key, jpeg, *values in rows:
            metadata = dict(zip(names, values, strict=True))
            yield StagedPhoto(number=number, key=key, jpeg=jpeg, metadata=metadata)

    def sharded(self, numbers: list[int], shard: int) -> None:
        """Record that photos lie in a shard now."""
        for number in numbers:
            self._do("UPDATE kept SET shard = ? WHERE number = ?", shard, number)
            self._do("DELETE FROM staged WHERE number = ?", number)
        self.save()

    def shards(self, split: Split) -> list[tuple[int, int]]:
        """Return (shard, photos in it) of a split."""
        query = "SELECT shard, count(*) FROM kept WHERE split = ? AND shard IS NOT NULL GROUP BY shard"
        return [(int(shard), int(count)) for shard, count in self._do(f"{query} ORDER BY shard", split.value)]

    def listed(self, split: Split) -> Iterator[tuple[object, ...]]:
        """Yield id, latitude, longitude, author, phash and shard of a split's photos, in their order."""
        yield from self._do(
            "SELECT id, lat, lng, author, phash, shard FROM kept WHERE split = ? ORDER BY number", split.value
        )

    def places(self) -> list[tuple[float, float]]:
        """Return (longitude, latitude) of all photos that are kept, in degrees."""
        return self._do("SELECT DISTINCT lng, lat FROM kept").fetchall()

    def dropped(self) -> Iterator[tuple[str, str, str, str]]:
        """Yield (id, outcome, reason, address) of the photos that were not kept."""
        yield from self._do("SELECT id, outcome, reason, url FROM dropped ORDER BY outcome, id")

    # --- hashes of evaluation photos ---

    def remembered_hashes(self, identity: str) -> list[int] | None:
        """Return the perceptual hashes of a set of photos, if they were computed before."""
        text = self.setting(f"hashes {identity}")
        return None if text is None else [int(each, 16) for each in json.loads(text)]

    def remember_hashes(self, identity: str, hashes: list[int]) -> None:
        """Keep the perceptual hashes of a set of photos."""
        self.set(f"hashes {identity}", json.dumps([f"{each:x}" for each in hashes]))

    def _save_now_and_then(self) -> None:
        if time.monotonic() - self._committed_at > _COMMIT_S:
            self.save()

    def _do(self, statement: str, *values: object) -> sqlite3.Cursor:
        try:
            return self._database.execute(statement, values)
        except sqlite3.Error as error:
            raise self._error(error) from error

    def _error(self, error: sqlite3.Error) -> OutputError:
        if "locked" in str(error):
            return OutputError(f"{self._file.parent}: another run is writing there; let it end first")
        return OutputError(
            f"{self._file}: it cannot be written ({error}); what was saved is safe, go on later"
        )


def _bands(phash: int) -> list[int]:
    return [phash >> (_BAND_BITS * band) & ((1 << _BAND_BITS) - 1) for band in range(_BANDS)]
