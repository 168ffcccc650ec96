"""Preparing a data set: every photo of a list is fetched, checked, and put into its split's shards."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from geoengine.engine.errors import PhotoError
from geoengine.engine.photo_sets import PhotoEntry, PhotoSet, open_photo_set
from geoengine.engine.regions import parse_region
from geoengine.engine.render.files import OutputError
from geoengine.training.mp16.held_out import HeldOut, read_held_out
from geoengine.training.mp16.hosts import Hosts, NoPhotoError, Politeness
from geoengine.training.mp16.ledger import Ledger, Outcome
from geoengine.training.mp16.names import Split, split_of
from geoengine.training.mp16.pictures import Picture, read_picture
from geoengine.training.mp16.shards import write_lists, write_shards
from geoengine.training.mp16.survey import Survey, is_local, survey, wanted

LEDGER_FILE = "prepare.sqlite"
_AHEAD = 128  # photos under way before the first of them is recorded


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """What is prepared: `metadata` names the photos, and `urls` gives their addresses if it lacks them.

    `photos` is the folder of those that are here already, `held_out` names the evaluation photos, `within` is
    a region, `limit` the most photos that are kept. `side` is the shorter side of a picture in pixels,
    `shard_size` the number of photos in a shard. Raises OutputError for numbers that cannot be.
    """

    metadata: str
    urls: str | None = None
    photos: Path | None = None
    held_out: tuple[str, ...] = ()
    within: str | None = None
    limit: int | None = None
    side: int = 336
    shard_size: int = 1000
    workers: int = 16
    politeness: Politeness = field(default_factory=Politeness)

    def __post_init__(self) -> None:
        if min(self.side, self.shard_size, self.workers, 1 if self.limit is None else self.limit) < 1:
            raise OutputError("sizes, limits and numbers of workers must be at least 1")
        if self.politeness.rate_per_s <= 0:
            raise OutputError("the rate must be more than 0 requests a second")


class PrepareJob:
    """The job of a folder; the same job goes on where an earlier run stopped.

    Raises PhotoSetError for lists that cannot be used, and OutputError for a folder of another job.
    """

    def __init__(self, config: PrepareConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._set = open_photo_set(config.metadata, photos=config.photos, need_place=True)
        self._region = None if config.within is None else parse_region(config.within)
        self._held_out = HeldOut(set(), ())
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder}: the folder cannot be made ({error.strerror})") from error
        self.ledger = Ledger(folder / LEDGER_FILE)
        self._hosts = Hosts(config.politeness)
        self._kept = self.ledger.outcomes().get(Outcome.KEPT, 0)
        self._later = 0
        try:
            self._check_settings()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Save everything."""
        self._hosts.close()
        self.ledger.close()

    @property
    def left_alone(self) -> dict[str, str]:
        """The hosts that were given up in this run, and why."""
        return dict(self._hosts.left_alone)

    def survey(self) -> Survey:
        """Read the whole list once; raises PhotoSetError for impossible rows, and when nothing can be had."""
        if self._config.urls is not None and self.ledger.setting("survey") is None:
            addresses = open_photo_set(self._config.urls)
            self.ledger.add_addresses((entry.key, entry.url) for entry in addresses if entry.url)
        return survey(self._set, self._region, self.ledger)

    def read_held_out(self) -> tuple[int, int]:
        """Read the evaluation photos; returns how many names and how many pictures are kept out."""
        self._held_out = read_held_out(self._config.held_out, self._hashes_of)
        return len(self._held_out.names), len(self._held_out)

    def run(self) -> Iterator[int]:
        """Fetch what is missing and write shards; yields how many of the wanted photos have been met.

        Photos are recorded in the order of the list, so that the same list gives the same shards however
        often the job was killed, unless a host failed meanwhile.
        """
        under_way: deque[tuple[int, PhotoEntry, str, Future[Picture | NoPhotoError]]] = deque()
        with ThreadPoolExecutor(self._config.workers) as pool:
            try:
                for met, entry in self._to_do():
                    url = entry.url or self.ledger.address(entry.key)
                    under_way.append((met, entry, url, pool.submit(self._fetch, entry, url)))
                    while len(under_way) >= _AHEAD or (under_way and under_way[0][-1].done()):
                        yield self._record(*under_way.popleft())
                        if self._is_full:
                            return
                while under_way and not self._is_full:
                    yield self._record(*under_way.popleft())
            finally:
                self._hosts.stop()
                pool.shutdown(cancel_futures=True)

    def finish(self) -> int:
        """Write the last shards and the lists; returns how many photos wait for another run."""
        for split in Split:
            write_shards(self._folder, self.ledger, split, self._config.shard_size, rest=True)
        left = self._later + self.ledger.outcomes().get(Outcome.FAILED, 0)
        source = {"metadata": self._set.name, "identity": self._set.identity}
        left = 0 if self._is_full else left
        write_lists(self._folder, self.ledger, source, left)
        self.ledger.save()
        return left

    @property
    def _is_full(self) -> bool:
        return self._config.limit is not None and self._kept >= self._config.limit

    def _to_do(self) -> Iterator[tuple[int, PhotoEntry]]:
        """Yield the photos that are not done, each with the number of wanted ones up to it."""
        met = 0
        for entry, inside in wanted(self._set, self._region):
            if self._is_full:
                return
            met += inside
            if inside and not self.ledger.is_done(entry.key):
                yield met, entry

    def _fetch(self, entry: PhotoEntry, url: str) -> Picture | NoPhotoError:
        """Return a photo, or why there is none; in a thread."""
        if self._held_out.has_name(entry.key, url):
            return NoPhotoError(Outcome.EVALUATION, "its name is that of an evaluation photo")
        try:
            if is_local(entry):
                return read_picture(entry.read(), self._config.side)
            if not url:
                return NoPhotoError(Outcome.FAILED, "it is not here and has no address")
            return self._hosts.get(url, lambda data: read_picture(data, self._config.side))
        except PhotoError as error:
            return NoPhotoError(Outcome.UNREADABLE, str(error))
        except NoPhotoError as error:
            return error

    def _record(self, met: int, entry: PhotoEntry, url: str, future: Future[Picture | NoPhotoError]) -> int:
        result = future.result()
        if self.ledger.is_done(entry.key):
            return met  # it is listed twice
        if not isinstance(result, NoPhotoError):
            result = self._reason_against(result) or result
        if isinstance(result, Picture):
            self.ledger.keep(entry, url, result)
            self._kept += 1
            split = split_of(entry.author, entry.key)
            write_shards(self._folder, self.ledger, split, self._config.shard_size, rest=False)
        elif result.outcome is Outcome.LATER:
            self._later += 1
        else:
            self.ledger.drop(entry.key, result.outcome, result.reason, url)
        return met

    def _reason_against(self, picture: Picture) -> NoPhotoError | None:
        if self._held_out.looks_like(picture.phash):
            return NoPhotoError(Outcome.EVALUATION, "it looks like an evaluation photo")
        twin = self.ledger.twin_of(picture)
        return (
            None if twin is None else NoPhotoError(Outcome.DUPLICATE, f"it is, or looks, the same as {twin}")
        )

    def _hashes_of(self, photo_set: PhotoSet, make: Callable[[], list[int]]) -> list[int]:
        hashes = self.ledger.remembered_hashes(photo_set.identity)
        if hashes is None:
            hashes = make()
            self.ledger.remember_hashes(photo_set.identity, hashes)
            self.ledger.save()
        return hashes

    def _check_settings(self) -> None:
        """Refuse to go on with a job that had other settings: its splits would hold a mixture."""
        config = self._config
        settings = {
            "the list of photos": self._set.identity,
            "--urls": _identity(config.urls),
            "--within": _identity(config.within),
            "--exclude": " ".join(sorted(map(_identity, config.held_out))),
            "--side": str(config.side),
            "--shard-size": str(config.shard_size),
        }
        before = self.ledger.setting("settings")
        if before is None:
            self.ledger.set("settings", json.dumps(settings))
            self.ledger.save()
            return
        different = [name for name, value in settings.items() if json.loads(before)[name] != value]
        if different:
            raise OutputError(
                f"{self._folder}: the folder holds a data set that was begun with other settings "
                f"({', '.join(different)}); give those again, or another folder"
            )


def _identity(spec: str | None) -> str:
    """Return what tells the content of a list, region or set of photos from others."""
    if spec is None:
        return ""
    path = Path(spec).expanduser()
    if path.is_dir():
        return open_photo_set(path).identity
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else spec
