"""Data sets prepared from photos on a server, and what is in them."""

import csv
import json
import tarfile
from contextlib import contextmanager

from made_sets import distinct_photo, write_table
from tile_server import Server

from geoengine.training.mp16.hosts import Politeness
from geoengine.training.mp16.job import PrepareConfig, PrepareJob
from geoengine.training.mp16.names import Split

FAST = Politeness(rate_per_s=2000.0, attempts=3, backoff_s=0.01, longest_wait_s=2.0, read_timeout_s=1.0)
HEAD = "IMG_ID,AUTHOR,LAT,LON,url\n"


@contextmanager
def photo_server():
    """A server of photos that forbids no robot anything."""
    with Server() as server:
        server.always["robots"] = 404
        yield server


def listed(server, tmp_path, count, first=0):
    """A table of photos on the server, each by an uploader of its own."""
    rows = []
    for n in range(first, first + count):
        server.files[f"/p/{n}.jpg"] = distinct_photo(n)
        rows.append(f"p/{n}.jpg,ann{n},{n % 80},{n % 170},{server.address}/p/{n}.jpg")
    return write_table(tmp_path / "list.csv", HEAD + "\n".join(rows) + "\n")


def prepared(table, out, **options):
    """Run a job to its end; returns the outcomes, and how many photos wait."""
    job = PrepareJob(PrepareConfig(metadata=str(table), politeness=FAST, **options), out)
    try:
        job.survey()
        job.read_held_out()
        for _ in job.run():
            pass
        left = job.finish()
        return {outcome.value: count for outcome, count in job.ledger.outcomes().items()}, left
    finally:
        job.close()


def photos_of(out):
    """All kept photos: {id: (split, metadata, JPEG)}."""
    found = {}
    for split in Split:
        for tar in sorted((out / split).glob("*.tar")):
            with tarfile.open(tar) as opened:
                files = {member.name: opened.extractfile(member).read() for member in opened}
            for name in files:
                if name.endswith(".json"):
                    metadata = json.loads(files[name])
                    found[metadata["id"]] = (split, metadata, files[name.replace(".json", ".jpg")])
    return found


def tree(out):
    """Every file but the ledger, by path."""
    files = (path for path in out.rglob("*") if path.is_file() and "sqlite" not in path.name)
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def dropped(out):
    with (out / "dropped.csv").open(newline="") as file:
        return {row["id"]: (row["outcome"], row["reason"]) for row in csv.DictReader(file)}
