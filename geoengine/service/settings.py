"""What a service is told when it is started."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from geoengine.engine.cores import available_cores
from geoengine.engine.errors import GeoEngineError

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """All that a worker needs to know; the supervisor hands it over as JSON.

    `bundle` to `threads` are those of `GeoEngine.open`. `searching` requests are searched at once, `waiting`
    more may wait, and one client has at most `per_client` of them. `rate_per_minute` is for each client, 0
    for no limit. A request gets `deadline_s` from its first byte on, and `body_s` of them for its body.
    `rows_mb` is what embeddings of tiles may take. No place is told more precisely than `min_precision_km`.
    A batch that takes longer than `stall_s` is a stall; after `restart_s` the worker ends, and is replaced.
    """

    bundle: str | None = None
    tiles: str | None = None
    index: str | None = None
    backend: str = "auto"
    precision: str | None = None
    threads: int | None = None

    host: str = "127.0.0.1"
    port: int = 8000
    keys: str | None = None
    allowed_hosts: tuple[str, ...] = ()

    max_bytes: int = 32 << 20
    max_pixels: int = 50_000_000
    max_k: int = 64
    max_tiles: int = 20_000
    searching: int = field(default_factory=lambda: max(4, 2 * available_cores()))
    waiting: int = 64
    per_client: int = 48
    rate_per_minute: float = 120.0
    deadline_s: float = 300.0
    body_s: float = 30.0
    stall_s: float = 30.0
    restart_s: float = 120.0
    rows_mb: int = 256
    min_precision_km: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "max_k", "max_tiles", "searching", "per_client", "rows_mb"):
            if getattr(self, name) < 1:
                raise GeoEngineError(
                    f"{name.replace('_', ' ')} must be at least 1, got {getattr(self, name)}"
                )
        for name in ("deadline_s", "body_s", "stall_s", "restart_s"):
            if not (value := getattr(self, name)) > 0:
                raise GeoEngineError(f"{name[:-2]} must be more than 0 seconds, got {value:g}")
        if self.waiting < 0 or not self.rate_per_minute >= 0:
            raise GeoEngineError("the queue and the rate must be at least 0")
        if self.min_precision_km is not None and not 0 < self.min_precision_km <= 20_000:
            raise GeoEngineError(
                f"--min-precision-km must be from 0 to 20000 km, got {self.min_precision_km:g}"
            )
        if self.keys is None and self.host not in LOOPBACK_HOSTS:
            raise GeoEngineError(
                f"--host {self.host} can be reached by others, so a key is needed: make one with "
                "`geoengine serve --new-key NAME --keys FILE`, and add --keys FILE"
            )
        if self.keys is not None and not Path(self.keys).is_file():
            raise GeoEngineError(
                f"--keys {self.keys}: there is no such file; "
                f"`geoengine serve --new-key NAME --keys {self.keys}` makes it"
            )

    def to_json(self) -> str:
        """Return the settings as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the settings that `to_json` wrote."""
        values = json.loads(text)
        return cls(**values | {"allowed_hosts": tuple(values["allowed_hosts"])})
