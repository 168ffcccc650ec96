"""Photos from the web servers of other people: slowly, once, and only where they agree."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar
from urllib.parse import quote, urlsplit
from urllib.robotparser import RobotFileParser

from geoengine.engine.errors import PhotoError, SourceError
from geoengine.engine.sources.description import SourceDescription
from geoengine.engine.sources.fetch import MISSING, Answer, Call, Fetcher, RefusedError, UnusableError
from geoengine.engine.sources.template import UrlTemplate
from geoengine.training.mp16.ledger import Outcome

ROBOT = "geoengine"
"""The name under which robots.txt and X-Robots-Tag may speak to the downloader."""

_FORBIDDING = {
    "noai",
    "noimageai",
    "noindex",
    "noimageindex",
    "none",
}  # of X-Robots-Tag, as img2dataset has it
_UNAVAILABLE = (
    "photo_unavailable"  # in the address of the picture that Flickr sends in place of a deleted one
)
_NOT_ALLOWED = {401, 403, 407, 429}  # which mean the one who asks, more than the photo
_PATIENCE = 8  # such answers in a row, after which a host is left alone
_OPEN_HOSTS = 32
_AS_THEY_ARE = "%/:=&?~#+!$,;'@()*[]"

T = TypeVar("T")


class NoPhotoError(Exception):
    """Why there is no photo at an address."""

    def __init__(self, outcome: Outcome, reason: str) -> None:
        super().__init__(reason)
        self.outcome = outcome
        self.reason = reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Politeness:
    """How hosts are asked: at most `rate_per_s` requests a second to each, `concurrency` of them at once."""

    rate_per_s: float = 5.0
    concurrency: int = 4
    attempts: int = 4
    backoff_s: float = 1.0
    longest_wait_s: float = 120.0
    read_timeout_s: float = 20.0


class Hosts:
    """Downloads photos; threads may ask at the same time.

    A host's robots.txt is obeyed, with its Crawl-delay, as are X-Robots-Tag and TDM-Reservation headers, and
    Retry-After. A host that fails, or refuses everything, is left alone until `Hosts` is made anew.
    """

    def __init__(self, politeness: Politeness) -> None:
        self._politeness = politeness
        self._lock = threading.Lock()
        self._hosts: OrderedDict[str, _Host] = OrderedDict()
        self.left_alone: dict[str, str] = {}
        self._stopped = False

    def get(self, url: str, read: Callable[[bytes], T]) -> T:
        """Return what `read` makes of the photo at an address; a file that it refuses is asked for once more.

        `read` raises PhotoError. Raises NoPhotoError.
        """
        url = quote(url.strip(), safe=_AS_THEY_ARE)
        try:
            parts = urlsplit(url)
            root = f"{parts.scheme}://{parts.netloc}"
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("no host")
            int(parts.port or 0)
        except ValueError:
            raise NoPhotoError(Outcome.DEAD, "this is no http:// or https:// address") from None
        with self._host(root) as host:
            reason = "the job was stopped" if self._stopped else self.left_alone.get(root)
            if reason is not None:
                raise NoPhotoError(Outcome.LATER, reason)
            try:
                return host.get(url, read)
            except SourceError as error:
                self.left_alone[root] = str(error)
                raise NoPhotoError(Outcome.LATER, str(error)) from error

    def stop(self) -> None:
        """Let the requests under way end soon, and no other begin."""
        self._stopped = True
        with self._lock:
            for host in self._hosts.values():
                host.call.stopped.set()

    def close(self) -> None:
        """Close the connections; no thread may be asking."""
        for host in self._hosts.values():
            host.close()
        self._hosts.clear()

    @contextmanager
    def _host(self, root: str) -> Iterator[_Host]:
        with self._lock:
            host = self._hosts.pop(root, None) or _Host(root, self._politeness)
            self._hosts[root] = host  # the last of them is the one used last
            host.users += 1
            idle = [name for name, each in self._hosts.items() if not each.users]
            for name in idle[: max(0, len(self._hosts) - _OPEN_HOSTS)]:
                self._hosts.pop(name).close()
        try:
            yield host
        finally:
            with self._lock:
                host.users -= 1


class _Host:
    """One web server."""

    def __init__(self, root: str, politeness: Politeness) -> None:
        template = UrlTemplate(root)
        description = SourceDescription(
            template=root,
            rate_per_s=politeness.rate_per_s,
            concurrency=politeness.concurrency,
            attempts=politeness.attempts,
            backoff_s=politeness.backoff_s,
            longest_wait_s=politeness.longest_wait_s,
            read_timeout_s=politeness.read_timeout_s,
        )
        self._root = root
        self._fetcher = Fetcher(description, template)
        self._robots: RobotFileParser | None = None
        self._reading_robots = threading.Lock()
        self._not_allowed = 0  # answers in a row
        self.call = Call(root)
        self.users = 0

    def close(self) -> None:
        self._fetcher.close()

    def get(self, url: str, read: Callable[[bytes], T]) -> T:
        """Return a photo; raises NoPhotoError, and SourceError when the host is to be left alone."""
        if not self._rules().can_fetch(ROBOT, url):
            raise NoPhotoError(Outcome.REFUSED, "robots.txt does not allow it")
        reader = _PhotoReader(read)
        try:
            found = self._fetcher.get(url, reader, what="a photo", call=self.call)
        except RefusedError as error:
            raise self._refusal(error) from error
        self._not_allowed = 0
        if found is None:
            reason = "the job was stopped" if self.call.stopped.is_set() else "the server fails"
            outcome = Outcome.LATER if self.call.stopped.is_set() else Outcome.FAILED
            raise NoPhotoError(outcome, reader.reason or reason)
        if isinstance(found, NoPhotoError):
            raise found
        return found

    def _refusal(self, error: RefusedError) -> Exception:
        if error.status not in _NOT_ALLOWED:
            return NoPhotoError(Outcome.DEAD, f"HTTP {error.status}")
        self._not_allowed += 1
        if self._not_allowed >= _PATIENCE:
            return SourceError(f"{self._root}: the server answers HTTP {error.status} to everything")
        return NoPhotoError(Outcome.FAILED, f"HTTP {error.status}")

    def _rules(self) -> RobotFileParser:
        """Return what robots.txt says; without one, everything is allowed (RFC 9309, 2.3.1.3)."""
        with self._reading_robots:
            if self._robots is None:
                address = f"{self._root}/robots.txt"
                try:
                    text = self._fetcher.get(address, _robots_text, what="robots.txt", call=self.call)
                except RefusedError:
                    text = ""
                if text is None:
                    raise SourceError(f"{self._root}: its robots.txt cannot be read")
                rules = RobotFileParser()
                rules.parse(text.splitlines())
                delay_s = rules.crawl_delay(ROBOT)
                if delay_s:
                    self._fetcher.slow_down(1 / float(delay_s))
                self._robots = rules
            return self._robots


class _PhotoReader(Generic[T]):
    """What the answers to one photo's requests are, one after the other, until one is final."""

    def __init__(self, read: Callable[[bytes], T]) -> None:
        self._read = read
        self.reason = ""

    def __call__(self, answer: Answer) -> T | NoPhotoError:
        if answer.status in MISSING:
            return NoPhotoError(Outcome.DEAD, f"HTTP {answer.status}")
        if _UNAVAILABLE in answer.url:
            return NoPhotoError(Outcome.DEAD, "the host shows that the photo is gone")
        forbidden = forbidding(answer.headers)
        if forbidden:
            return NoPhotoError(Outcome.REFUSED, forbidden)
        try:
            return self._read(answer.body)
        except PhotoError as error:
            if self.reason:
                return NoPhotoError(Outcome.UNREADABLE, str(error))
            self.reason = str(error)
            raise UnusableError(f"it sent what is no photo: {error}") from None


def forbidding(headers: Mapping[str, str]) -> str:
    """Return which header forbids to use a photo for training, "" when none does.

    A directive may be meant for one robot (`NAME: noai`); those for others do not count.
    """
    if headers.get("tdm-reservation", "").strip() == "1":
        return "TDM-Reservation: 1"
    for part in headers.get("x-robots-tag", "").lower().split(","):
        robot, _, directive = part.rpartition(":")
        if robot.strip() in ("", "*", ROBOT) and directive.strip() in _FORBIDDING:
            return f"X-Robots-Tag: {directive.strip()}"
    return ""


def _robots_text(answer: Answer) -> str:
    return "" if answer.status in MISSING else answer.body.decode("utf-8", "replace")
