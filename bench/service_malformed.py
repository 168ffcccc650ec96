"""Requests that no honest client sends: from the OpenAPI document, cut off, slow, and of wrong types."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from geoengine.bench.service_runs import Service, running
from geoengine.engine.extras import require_extra

_AT_ONCE = 8
_SHARE = 0.5  # of the requests that schemathesis makes
_HANG_S = 60.0  # the service closes silent connections sooner

_PARAMETERS = ("k", "levels", "top", "within", "score", "method", "quota", "centred", "objective", "nothing")
_VALUES = (
    "", "0", "-1", "1e9", "NaN", "null", "true", "[]", "{}", "'", "4-16", "4,4", "99", "a" * 300, "\0",
    "\u202e",
    "0,0,0,0", "-181,0,1,1", "1,2,3", "FR", "XX", '{"type":"Polygon","coordinates":[[[0,0]]]}', '{"type":{}}',
    '{"type":"Polygon","coordinates":[[[0,0],[1,0],["a",1],[0,0]]]}', "../../etc/passwd", "file:///etc/passwd",
)  # fmt: skip
_KINDS = ("image/jpeg", "image/png", "text/plain", "application/json", "multipart/form-data", "", 'a/b;c="')
_PATHS = ("/v1/locate", "/v1/locate/stream")


def malformed(photo: bytes, count: int, seed: int, extra: Sequence[str]) -> dict[str, Any]:
    """Send at least `count` malformed requests, and count what comes back, and what the log says.

    `hung` are connections that the service had neither answered nor closed in a minute.
    """
    require_extra("bench", ("schemathesis",), "making malformed requests")
    with running(extra) as service:
        schemathesis = _schemathesis(service, round(count * _SHARE), seed)
        before = service.figure("geoengine_requests_total")
        answers: Counter[str] = Counter()
        rng = random.Random(seed)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            makers = (cut_off, wrong_types, raw_noise, slow)
            weights = (30.0, 60.0, 9.5, 0.5)
            jobs = [
                (rng.choices(makers, weights)[0], rng.randrange(2**31))
                for _ in range(max(0, count - round(before)))
            ]
            for answer in pool.map(lambda job: job[0](service, photo, random.Random(job[1])), jobs):
                answers[answer] += 1
        alive = service.request("GET", "/health")[0] == 200
        statuses = _statuses(service)
        troubles = [line.strip() for line in service.log if "Traceback" in line or "failed: " in line]
    return {
        "requests": round(before) + len(jobs),
        "schemathesis_requests": round(before),
        "schemathesis_failures": schemathesis,
        "answers": dict(sorted(answers.items())),
        "statuses": statuses,
        "server_errors": sum(n for status, n in statuses.items() if status.startswith("5")),
        "tracebacks": len(troubles),
        "troubles": troubles[:10],
        "hung": answers["hung"],
        "alive": alive,
    }


def _schemathesis(service: Service, count: int, seed: int) -> int:
    """Let schemathesis make about `count` requests from the OpenAPI document; returns failed checks."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.ndjson"
        command = [
            sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run",
            f"http://127.0.0.1:{service.port}/openapi.json", "--checks", "not_a_server_error",
            "--phases", "examples,coverage,fuzzing", "--mode", "all", "--seed", str(seed),
            "--max-examples", str(max(10, count // 12)), "--continue-on-failure",
            "--suppress-health-check", "all", "--workers", "4",
            "--report", "ndjson", "--report-ndjson-path", str(report), "--request-timeout", "120",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"schemathesis does not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.stdout.count("Server error")


def _statuses(service: Service) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for line in service.request("GET", "/metrics")[1].decode().splitlines():
        if line.startswith("geoengine_requests_total{"):
            labels, _, value = line.rpartition(" ")
            counts[labels.split('status="')[1].split('"')[0]] += round(float(value))
    return dict(sorted(counts.items()))


def wrong_types(service: Service, photo: bytes, rng: random.Random) -> str:
    """Send a form or a query with impossible values, or a body that is no photo."""
    body: bytes = rng.choice((photo[: rng.randrange(len(photo))], rng.randbytes(200), b"", b"{}"))
    chosen = {rng.choice(_PARAMETERS): rng.choice(_VALUES) for _ in range(rng.randrange(4))}
    kind = rng.choice(_KINDS)
    query = ""
    if rng.random() < 0.5:
        boundary = rng.choice(("b", "b" * 300, "\u00e9", ""))
        parts = "".join(
            f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in chosen.items()
        )
        body = parts.encode() + b'--b\r\nContent-Disposition: form-data; name="photo"\r\n\r\n' + body
        body += rng.choice((b"\r\n--b--\r\n", b"", b"\r\n--b"))
        kind = f"multipart/form-data; boundary={boundary}"
    elif chosen:
        query = "?" + urlencode(chosen)
    head = {"Content-Type": kind, "Accept": rng.choice(("*/*", "application/geo+json", "text/html", ";;q=x"))}
    return _sent(service, rng.choice(_PATHS) + query, body, head, len(body))


def cut_off(service: Service, photo: bytes, rng: random.Random) -> str:
    """Promise a whole photo and leave in the middle of it."""
    return _sent(
        service,
        rng.choice(_PATHS),
        photo[: rng.randrange(len(photo))],
        {"Content-Type": "image/jpeg"},
        len(photo),
        leave=rng.random() < 0.99,
    )


def slow(service: Service, photo: bytes, rng: random.Random) -> str:
    """Promise a photo and send almost nothing of it."""
    sent = photo[: rng.randrange(1, 100)]
    return _sent(service, _PATHS[0], sent, {"Content-Type": "image/jpeg"}, len(photo))


def raw_noise(service: Service, photo: bytes, rng: random.Random) -> str:
    """Send something that is no HTTP, or hardly."""
    del photo
    lines = (
        b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"POST /v1/locate HTTP/1.1\r\nHost: x\r\n"
        b"Content-Length: -5\r\n\r\n", b"GET /v1/tiles/%ff%fe/\x00/1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /v1/locate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", rng.randbytes(300) + b"\r\n\r\n",
    )  # fmt: skip
    return _exchanged(service, rng.choice(lines), leave=False)


def _sent(
    service: Service, path: str, body: bytes, headers: dict[str, str], length: int, *, leave: bool = False
) -> str:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {length}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    head = "\r\n".join(lines).encode("utf-8", "replace") + b"\r\n\r\n"
    return _exchanged(service, head + body, leave=leave)


def _exchanged(service: Service, sent: bytes, *, leave: bool) -> str:
    """Send bytes; returns the status that came back, or how the connection ended."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=_HANG_S) as connection:
        try:
            connection.sendall(sent)
            if leave:
                return "left"
            answer = connection.recv(4096)
            return answer.split()[1].decode("latin-1") if answer.startswith(b"HTTP/") else "closed"
        except TimeoutError:
            return "hung"
        except OSError:
            return "reset"
