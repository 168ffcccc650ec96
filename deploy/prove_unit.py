"""Run by prove.py in a booted system: start the unit, locate a photo, kill the worker, stop, power off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

HERE = Path("/opt/trial")
ADDRESS = "http://127.0.0.1:8000"
AGAIN_S = 60.0


def main() -> None:
    """Try the unit and write what was found as JSON."""
    key = (HERE / "key").read_text().strip()
    begun = time.monotonic()
    started = systemctl("start")
    found: dict[str, object] = {
        "start_status": started.returncode,
        "start_s": round(time.monotonic() - begun, 1),
    }
    pid = int(systemctl("show", "--property=MainPID", "--value").stdout)
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    found |= {name: " ".join(status[name].split()) for name in ("Uid", "CapBnd", "NoNewPrivs", "Seccomp")}
    found["status"] = locate(key)
    for worker in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        os.kill(int(worker), signal.SIGKILL)
    begun = time.monotonic()
    while ask(f"{ADDRESS}/health") != 200 and time.monotonic() - begun < AGAIN_S:
        time.sleep(0.1)
    found["healthy_after_kill_s"] = round(time.monotonic() - begun, 1)
    found["status_after_kill"] = locate(key)
    rated = subprocess.run(
        ["systemd-analyze", "security", "--no-pager", "geoengine.service"], capture_output=True, text=True
    )
    found["exposure"] = rated.stdout.strip().splitlines()[-1].partition(": ")[2]
    found["stop_status"] = systemctl("stop").returncode
    found["result"] = systemctl("show", "--property=Result", "--value").stdout.strip()
    (HERE / "found.json").write_text(json.dumps(found))


def systemctl(verb: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Ask systemd about the unit."""
    return subprocess.run(["systemctl", verb, *options, "geoengine"], capture_output=True, text=True)


def locate(key: str) -> int:
    """Send the photo; returns the status, 0 for no answer."""
    body = (HERE / "photo.jpg").read_bytes()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/octet-stream"}
    return ask(urllib.request.Request(f"{ADDRESS}/v1/locate?k=4", body, headers))


def ask(asked: str | urllib.request.Request) -> int:
    """Return the status of an answer, 0 for none."""
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return int(answer.status)
    except OSError:
        return 0


if __name__ == "__main__":
    try:
        main()
    finally:
        subprocess.run(["systemctl", "--no-block", "poweroff"])
