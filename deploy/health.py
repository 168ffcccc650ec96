"""Ask a geoengine service whether it answers: exit status 0 when it does, 1 when it does not.

`health.py [URL] [--wait SECONDS]`; with --wait, a service that is still starting gets so long. It needs
nothing but Python. The container's health check and the systemd unit run it.
"""

import argparse
import sys
import time
import urllib.error
import urllib.request

URL = "http://127.0.0.1:8000/health"
TIMEOUT_S = 4.0


def problem(url: str) -> str:
    """Return why the service does not answer, "" when it does."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=TIMEOUT_S) as answer:
            return "" if answer.status == 200 else f"HTTP {answer.status}"
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}: {error.read(500).decode('utf-8', 'replace')}"
    except OSError as error:
        return str(error)


def main() -> int:
    """Ask until the service answers or the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", nargs="?", default=URL)
    parser.add_argument("--wait", type=float, default=0.0, metavar="SECONDS")
    given = parser.parse_args()
    until = time.monotonic() + given.wait
    while reason := problem(given.url):
        if time.monotonic() >= until:
            print(f"{given.url}: {reason}", file=sys.stderr)
            return 1
        time.sleep(0.5)
    return 0


if __name__ == "__main__":
    sys.exit(main())
