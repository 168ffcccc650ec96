"""Runs a job of preparing photos and kills it again and again: `python kill_prepare.py TABLE OUT MET…`.

Each run is a fork that dies when it has met so many photos; the last one is let to its end.
"""

import os
import signal
import sys
from pathlib import Path

import imagehash  # noqa: F401 - imported once, before the forks
import webdataset  # noqa: F401

from geoengine.training.mp16 import ledger
from geoengine.training.mp16.hosts import Politeness
from geoengine.training.mp16.job import PrepareConfig, PrepareJob


def main(table, out, *stops):
    ledger._COMMIT_S = 0.02
    for stop_at in (*map(int, stops), None):
        child = os.fork()
        if not child:
            run(table, out, stop_at)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        print(-os.waitstatus_to_exitcode(status))


def run(table, out, stop_at):
    rate = 200.0 if stop_at else 2000.0
    config = PrepareConfig(metadata=table, shard_size=7, politeness=Politeness(rate_per_s=rate))
    job = PrepareJob(config, Path(out))
    job.survey()
    for met in job.run():
        if stop_at and met >= stop_at:
            os.kill(os.getpid(), signal.SIGKILL)
    job.finish()
    job.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
