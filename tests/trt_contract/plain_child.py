"""In the place of `geoengine.export.plan_builder`: needs nothing, and fails as `CHILD_MODE` says.

`CHILD_MODE` is "" or a word and the number of plans that are built before it comes true, such as "crash 2".
"""

import json
import os
import signal
import sys
from pathlib import Path

mode, _, after = os.environ.get("CHILD_MODE", "").partition(" ")
job = json.loads(sys.stdin.readline())
for number, entry in enumerate(job["plans"]):
    graph = entry["graph"]
    Path(entry["plan"]).write_bytes(b"half a plan")
    print(json.dumps({"event": "progress", "graph": graph, "phase": "Timing", "share": 0.5}), flush=True)
    if mode and number == int(after):
        if mode == "crash":
            print("out of something", file=sys.stderr)
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "raise":
            raise OSError(28, "No space left on device")
        if mode == "fail":
            print(
                json.dumps({"event": "failed", "graph": graph, "reason": "node 'blk.3' is odd"}), flush=True
            )
            sys.exit(1)
        if mode == "wait":
            sys.stdin.read()
            print(json.dumps({"event": "stopped"}), flush=True)
            Path(job["cache"]).write_bytes(b"stopped in good order")
            sys.exit(1)
    Path(entry["plan"]).write_bytes(f"plan of {graph} {job['config']['level']}".encode())
    facts = {"scratch_bytes": 1000, "fused_attention": 10, "seconds": 0.25}
    print(json.dumps({"event": "built", "graph": graph, **facts}), flush=True)
