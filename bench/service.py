"""Load, soak, malformed requests and a killed worker: `python -m geoengine.bench.service WHAT`.

WHAT is load, soak, malformed or kill, each on a service of the built-in planet that this program starts and
ends. One JSON object goes to stdout, or into the machine's folder in `--out`. Exit status 1 when a goal is
missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from geoengine.bench import service_malformed, service_runs
from geoengine.bench.suite.machine import describe
from geoengine.bench.suite.results import machine_folder

_GOALS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "load": lambda found: (
        found["ratio"] >= 0.9 and found["p99_s"] <= 3 * found["p50_s"] and not found["failed"]
    ),
    "soak": lambda found: not found["failed"] and abs(found["memory_change"]) <= 0.05,
    "malformed": lambda found: not found["server_errors"] and not found["tracebacks"] and not found["hung"],
    "kill": lambda found: found["answers_again_s"] <= 5,
}


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=_GOALS)
    parser.add_argument("--photos", type=int, default=128, help="photos of load and soak")
    parser.add_argument("--clients", type=int, default=32, help="clients at once, of load and soak")
    parser.add_argument("--k", type=int, default=16, help="beam width")
    parser.add_argument("--levels", default="4-16", help="levels searched")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=600, help="length of the soak")
    parser.add_argument("--requests", type=int, default=10_000, help="malformed requests")
    parser.add_argument("--serve", default="", help="further options of `geoengine serve`, as one argument")
    parser.add_argument("--out", type=Path, help="folder of results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = _measured(options, Path(folder))
    met = _GOALS[options.what](found)
    found = {"what": options.what, "goal_met": met, **found, "machine": describe()}
    text = json.dumps(found, indent=2) + "\n"
    if options.out is None:
        sys.stdout.write(text)
    else:
        (machine_folder(options.out) / f"service_{options.what}.json").write_text(text, encoding="utf-8")
    raise SystemExit(0 if met else 1)


def _measured(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    search = {"k": str(options.k), "levels": options.levels}
    extra = options.serve.split()
    match options.what:
        case "load":
            photos = service_runs.write_photos(folder, options.photos, options.seed)
            return service_runs.load(photos, search, options.clients, extra)
        case "soak":
            photos = service_runs.write_photos(folder, options.photos, options.seed)
            return service_runs.soak(photos, search, options.clients, options.seconds, extra)
        case "kill":
            [photo] = service_runs.write_photos(folder, 1, options.seed)
            return service_runs.kill(photo, extra)
        case _:
            [photo] = service_runs.write_photos(folder, 1, options.seed)
            return service_malformed.malformed(photo.read_bytes(), options.requests, options.seed, extra)


if __name__ == "__main__":
    main()
