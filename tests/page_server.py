"""A server for the web page's tests: the page as it is shipped, and a search that follows a script."""

import io
import json
import mimetypes
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from urllib.parse import parse_qs, urlsplit

from PIL import Image

from geoengine.engine.tiles import LEVELS, Tile, center, children, parent, tile_at

STATIC = resources.files("geoengine.service").joinpath("static")
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; worker-src 'self'; font-src 'self'; manifest-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
ABOUT = {
    "version": "0.1.0",
    "world": "planet",
    "demo": True,
    "model": "made",
    "note": "This is a hypothesis, not a proof.",
    "levels": list(LEVELS),
    "defaults": {"k": 16, "top": 5, "score": "paper", "method": "tiles"},
    "choices": {"score": ["paper", "path"], "method": ["tiles"]},
    "limits": {"max_bytes": 100_000, "max_pixels": 10**8, "max_k": 64, "max_top": 64},
    "tiles": {
        "url": "/v1/tiles/{z}/{x}/{y}",
        "shown": True,
        "reason": "",
        "min_zoom": 0,
        "max_zoom": 16,
        "tile_size": 112,
        "format": "image/jpeg",
        "attribution": "made <b>tiles</b> & more",
        "source": "made",
        "bounds": [-180, -85, 180, 85],
    },
}


def problem(status, detail, **more):
    return {"type": "about:blank", "title": "a title", "status": status, "detail": detail, **more}


def made_search(point, coverage=1.0, k=4):
    """Return the events of a search that ends at a point, and its result."""
    levels, beam = [], []
    target = tile_at(point, LEVELS[-1])
    for index, zoom in enumerate(LEVELS):
        best = parent(target, zoom)
        near = children(parent(best, zoom - 2))
        others = [tile for tile in near if tile != best][: k - 1]
        kept = enumerate([best, *others])
        beam = [{"z": zoom, "x": t.x, "y": t.y, "score": round(0.9 - 0.05 * i, 6)} for i, t in kept]
        levels.append(
            {
                "zoom": zoom,
                "candidates": 256 if index == 0 else 16 * k,
                "missing": 0 if coverage == 1 else 5,
                "late": 0,
                "coverage": coverage,
                "known": 0,
                "enlarged": 0,
                "exhaustive": False,
                "beam": beam,
            }
        )
    candidates = []
    for rank, tile in enumerate(beam, start=1):
        at = center(Tile(tile["z"], tile["x"], tile["y"]))
        own = [level["beam"][0] for level in levels[:-1]]
        candidates.append(
            {
                "rank": rank,
                **tile,
                "latitude": round(at.lat, 7),
                "longitude": round(at.lng, 7),
                "share": [0.7, 0.2, 0.0996, 0.0004][rank - 1],
                "path": [*own, tile],
            }
        )
    result = {
        "schema": 2,
        "photo": "photo",
        "world": "planet",
        "latitude": candidates[0]["latitude"],
        "longitude": candidates[0]["longitude"],
        "score": 0.9,
        "radius_km": 3.25,
        "radius_share": 0.666667,
        "radius_calibrated": False,
        "candidates": candidates,
        "levels": levels,
        "k": k,
        "scoring": {},
        "within": "",
        "tiles": "made",
        "levels_left_out": [],
        "attribution": "",
        "model": "made",
        "seconds": 1.25,
        "note": "This is a hypothesis, not a proof.",
    }
    events = [("level", {"index": i, "levels": len(levels), **level}) for i, level in enumerate(levels)]
    return events, result


class PageServer:
    """Serves the page; `answer` is what a search gets: a problem, or a function that sends events."""

    def __init__(self, port=0):
        self.about, self.key, self.answer, self.requests = dict(ABOUT), "", None, []
        self.bodies = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                with suppress(ConnectionError):  # browsers leave when they please
                    outer.get(self)

            def do_POST(self):
                with suppress(ConnectionError):
                    outer.post(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_port}"

    def get(self, request):
        path = urlsplit(request.path).path
        self.requests.append(path)
        if path == "/":
            path = "/static/index.html"
        if path.startswith("/static/"):
            file = STATIC.joinpath(*path.split("/")[2:])
            if file.is_file():
                kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
                return send(request, 200, file.read_bytes(), kind)
        elif not self.allowed(request):
            return send_problem(request, problem(401, "a key is needed"))
        elif path == "/v1/about":
            return send(request, 200, json.dumps(self.about).encode(), "application/json")
        elif path.startswith("/v1/tiles/"):
            return send(request, 200, made_tile(), "image/jpeg")
        return send_problem(request, problem(404, "there is nothing here"))

    def post(self, request):
        length = int(request.headers["Content-Length"])
        self.bodies.append((request.path, request.headers["Content-Type"], request.rfile.read(length)))
        if not self.allowed(request):
            return send_problem(request, problem(401, "a key is needed"))
        if isinstance(self.answer, dict):
            return send_problem(request, self.answer)
        head(request, 200, "text/event-stream")
        request.close_connection = True

        def event(name, data):
            request.wfile.write(f"event: {name}\ndata: {json.dumps(data)}\n\n".encode())
            request.wfile.flush()

        self.answer(event)

    def parameters(self):
        """Return the query of the last search."""
        return {name: value for name, [value] in parse_qs(urlsplit(self.bodies[-1][0]).query).items()}

    def allowed(self, request):
        return not self.key or request.headers["Authorization"] == f"Bearer {self.key}"

    def start(self):
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def stop(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@contextmanager
def page_server(port=0):
    server = PageServer(port)
    server.start()
    try:
        yield server
    finally:
        if server.thread.is_alive():
            server.stop()


def made_tile():
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (120, 150, 120)).save(buffer, "JPEG")
    return buffer.getvalue()


def head(request, status, kind, **headers):
    request.send_response(status)
    fixed = {"Content-Security-Policy": CSP, "X-Content-Type-Options": "nosniff", "Content-Type": kind}
    for name, value in (fixed | headers).items():
        request.send_header(name, value)
    request.end_headers()


def send(request, status, body, kind, **headers):
    head(request, status, kind, **{"Content-Length": str(len(body))}, **headers)
    request.wfile.write(body)


def send_problem(request, what):
    more = {"Retry-After": str(what["retry_after"])} if "retry_after" in what else {}
    send(request, what["status"], json.dumps(what).encode(), "application/problem+json", **more)
