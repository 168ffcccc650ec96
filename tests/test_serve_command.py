"""`geoengine serve` as people start it: keys, refusals, a killed worker, and its end."""

import os
import re
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from command_line import run as run_command

COMMAND = str(Path(sysconfig.get_path("scripts")) / "geoengine")
LATEST_S = 60  # only a test that fails waits for so long


@contextmanager
def serving(*options):
    """The running command, its address, and the lines that it writes."""
    process = subprocess.Popen(
        [COMMAND, "serve", "--port", "0", "--threads", "1", *options], stderr=subprocess.PIPE, text=True
    )
    lines, ready, url = [], threading.Event(), []

    def listen():
        for line in process.stderr:
            lines.append(line)
            found = re.search(r"serving on (http://\S+)", line)
            if found:
                url.append(found[1])
                ready.set()

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        assert ready.wait(LATEST_S), lines
        yield process, url[0], lines
    finally:
        process.kill()
        process.wait()
        listener.join()
        process.stderr.close()


def worker_of(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[0]) if children else None


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker in /proc")
def test_a_killed_worker_is_replaced_and_an_end_is_an_end():
    with serving("--demo") as (process, url, lines):
        assert httpx.get(f"{url}/health", timeout=LATEST_S).json()["status"] == "ok"
        first = worker_of(process)
        os.kill(first, signal.SIGKILL)
        start = time.monotonic()
        assert httpx.get(f"{url}/health", timeout=LATEST_S).status_code == 200, "it waits in the queue"
        took = time.monotonic() - start
        second = worker_of(process)
        assert second not in (None, first) and took < LATEST_S
        assert any("another one is started" in line for line in lines)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LATEST_S) == 0
        assert not Path(f"/proc/{second}").exists()
    assert not any("Traceback" in line for line in lines), "".join(lines)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker in /proc")
def test_a_worker_does_not_outlive_its_supervisor():
    with serving("--demo") as (process, _, _):
        worker = worker_of(process)
        process.kill()
        end = time.monotonic() + LATEST_S
        while Path(f"/proc/{worker}").exists() and "State:\tZ" not in _status(worker):
            assert time.monotonic() < end
            time.sleep(0.05)


def _status(pid):
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "State:\tZ"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--demo", "--host", "0.0.0.0"], "a key is needed"),
        (["--demo", "--keys", "none"], "no such file"),
        (["--demo", "--bundle", "x"], "leave out those two"),
        (["--demo", "--min-precision-km", "nan"], "min-precision-km"),
        (["--demo", "--host", "host.invalid", "--keys", "KEYS"], "there is no such address"),
        (["--bundle", "none", "--tiles", "planet"], "is no engine bundle"),
        (["--demo", "--min-precision-km", "9000"], "leaves no level"),
        (["--new-key", "desk"], "--new-key needs --keys"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_sentence(options, words, tmp_path):
    keys = tmp_path / "keys"
    keys.touch()
    options = [str(keys) if option == "KEYS" else option for option in options]
    command = [COMMAND, "serve", "--port", "0", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LATEST_S, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("geoengine: ")]
    assert words in told[-1] and done.stdout == ""
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_named():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run_command("serve", "--demo", "--port", str(taken.getsockname()[1]))
    assert done.exit_code == 2 and "choose another --port" in done.stderr


def test_a_key_is_shown_once_and_kept_as_a_hash(tmp_path):
    file = tmp_path / "keys"
    done = run_command("serve", "--new-key", "desk", "--keys", str(file))
    assert done.exit_code == 0
    key = done.stdout.strip()
    assert re.fullmatch(r"geoengine_[0-9a-f]{8}_\S{43}", key)
    assert file.read_text().startswith("desk:") and key not in file.read_text()
    assert "desk already" in run_command("serve", "--new-key", "desk", "--keys", str(file)).stderr
