"""Run by prove.py inside the image, as its user: start the service, check its health, locate a photo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

SHARED = Path("/mnt")
ADDRESS = "http://127.0.0.1:8000"
START_S = 120.0


def main() -> None:
    """Try the service and print what was found as JSON."""
    plan = json.loads((SHARED / "plan.json").read_text())
    made = [*plan["entrypoint"], "serve", "--keys", "/etc/geoengine/keys", "--new-key", "prove"]
    key = subprocess.run(made, check=True, capture_output=True, text=True).stdout.strip()
    start = time.monotonic()
    service = subprocess.Popen([*plan["entrypoint"], *plan["command"]], stdout=sys.stderr)
    try:
        while subprocess.run(plan["healthcheck"], capture_output=True).returncode:
            if service.poll() is not None or time.monotonic() - start > START_S:
                sys.exit("the service did not become healthy")
            time.sleep(0.2)
        healthy_s = time.monotonic() - start
        refused = post("wrong")
        begun = time.monotonic()
        status, location = post(key)
        found = {
            "user": os.getuid(),
            "capabilities": capabilities(),
            "can_write_root": can_write("/opt/geoengine/x"),
            "healthy_after_s": round(healthy_s, 1),
            "status_without_key": refused[0],
            "status": status,
            "locate_s": round(time.monotonic() - begun, 2),
            "point": [location["longitude"], location["latitude"]],
            "health": request("/health", key)[1],
        }
    finally:
        service.send_signal(signal.SIGTERM)
        stopped = service.wait(30)
    print(json.dumps(found | {"exit_status_after_sigterm": stopped}))


def post(key: str) -> tuple[int, dict[str, Any]]:
    """Send the photo; returns the status and what was answered."""
    return request("/v1/locate?k=4", key, (SHARED / "photo.jpg").read_bytes())


def request(path: str, key: str, body: bytes | None = None) -> tuple[int, dict[str, Any]]:
    """Ask the service."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/octet-stream"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(ADDRESS + path, body, headers), timeout=60
        ) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def capabilities() -> str:
    """Return the capabilities that this process and its children can have, in hex."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("CapBnd"))


def can_write(path: str) -> bool:
    """Tell whether a file can be made."""
    try:
        Path(path).touch()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
