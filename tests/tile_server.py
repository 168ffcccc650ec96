"""A tile server on this machine that fails as it is told to."""

import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from made_tiles import tile_picture


class _QuietServer(ThreadingHTTPServer):
    request_queue_size = 64  # with the 5 of the base class, a sixth client waits for a whole second

    def handle_error(self, request, client_address):
        pass  # clients that hang up are part of the tests


class Server:
    """A tile server on this machine; `faults` maps "z/x/y" to what is answered first, one entry per request.

    An entry is a status, (status, headers, body), or a function that is given the request handler.
    """

    def __init__(self):
        self.faults, self.always, self.requests, self.times = {}, {}, [], []
        self.files = {}  # by path, answered in parts
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            do_POST = do_GET

            def log_message(self, *_):
                pass

        self.http = _QuietServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self):
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    def answer(self, request):
        key = "/".join(urlsplit(request.path).path.strip("/").split("/")[-3:]).split(".")[0]
        with self.lock:
            self.requests.append(request)
            self.times.append(time.monotonic())
            waiting = self.faults.get(key)
            fault = waiting.pop(0) if waiting else self.always.get(key, self.always.get("*"))
        path = urlsplit(request.path).path
        if path in self.files and fault is None:
            send_part(request, self.files[path])
        elif callable(fault):
            fault(request)
        elif isinstance(fault, tuple):
            send(request, *fault)
        elif fault is not None:
            send(request, fault)
        else:
            self.send_tile(request)

    @staticmethod
    def send_tile(request):
        z, x, y = map(int, urlsplit(request.path).path.split(".")[0].split("/")[-3:])
        send(request, 200, {"Content-Type": "image/png"}, tile_picture(z, x, y, size=16))

    def tiles_asked(self):
        return Counter(urlsplit(request.path).path for request in self.requests)


def send_part(request, whole):
    first, _, last = request.headers.get("Range", "").removeprefix("bytes=").partition("-")
    if not first:
        send(request, 200, {}, whole)
    else:
        body = whole[int(first) : int(last) + 1]
        send(request, 206, {"Content-Range": f"bytes {first}-{last}/{len(whole)}"}, body)


def send(request, status, headers=None, body=b""):
    request.send_response(status)
    for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body)
