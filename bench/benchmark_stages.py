"""Every stage of a search under pytest-benchmark, against stored ratios: `pytest bench`."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from geoengine.bench.suite.scale_rows import write_index
from geoengine.bench.suite.workload import POOL_ZOOM, drawn_photos, tile_pool
from geoengine.engine.engine import GeoEngine
from geoengine.engine.index.known_rows import RowCache
from geoengine.engine.index.tile_index import Maker, TileIndex
from geoengine.engine.manifest import PHOTO, encoder_name
from geoengine.engine.photos import read_photo
from geoengine.engine.pictures import hand_on
from geoengine.engine.preprocess import to_square
from geoengine.engine.render.geojson import geojson_text
from geoengine.engine.render.html_map import html_map
from geoengine.engine.render.json_lines import json_lines
from geoengine.engine.results import Location
from geoengine.engine.search import SearchConfig, search
from geoengine.engine.sources.mbtiles import MBTilesSource
from geoengine.engine.tiles import all_xy
from geoengine.kernels import cosine_topk

Stage = Callable[..., None]

_LEVELS = (4, 6, 8, 10)
_WIDTH = 512
_TILES = 64


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MBTilesSource]:
    """Make a file of 256 JPEG tiles of 256 pixels."""
    source = MBTilesSource(tile_pool(tmp_path_factory.mktemp("tiles")))
    yield source
    source.close()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GeoEngine]:
    """Open the planet's engine on one thread, which keeps the rows of its searches."""
    with GeoEngine.open(
        "planet", backend="onnxruntime-cpu", threads=1, row_cache=tmp_path_factory.mktemp("rows")
    ) as opened:
        yield opened


@pytest.fixture(scope="module")
def located(engine: GeoEngine) -> list[Location]:
    """Return eight photos' results; what the search met is known from now on."""
    return engine.locate(drawn_photos(8, 3), config=SearchConfig(k=4, levels=_LEVELS))


@pytest.fixture(scope="module")
def pictures() -> NDArray[np.uint8]:
    """Return random pictures of the planet's size, uint8[32, 112, 112, 3]."""
    return np.random.default_rng(0).integers(0, 256, (32, 112, 112, 3), np.uint8)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an index of 100 000 random rows."""
    folder = tmp_path_factory.mktemp("index")
    write_index(folder, 100_000)
    return folder


@pytest.fixture(scope="module")
def jpeg() -> bytes:
    """Return a photo of two megapixels with some detail."""
    from PIL import Image

    coarse = np.random.default_rng(0).integers(0, 256, (150, 200, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((1600, 1200)).save(out, "JPEG", quality=90)
    return out.getvalue()


def unit_rows(count: int) -> NDArray[np.float16]:
    """Return random rows of length 1, fp16[count, 512]."""
    rows = np.random.default_rng(1).standard_normal((count, _WIDTH), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float16)


def test_fetch_tiles(stage: Stage, tiles: MBTilesSource) -> None:
    """Read the bytes of 256 tiles."""
    addresses = all_xy(POOL_ZOOM).tolist()
    stage(lambda: [tiles.tile_data(POOL_ZOOM, x, y) for x, y in addresses], against="python")


def test_fetch_and_decode_tiles(stage: Stage, tiles: MBTilesSource) -> None:
    """Read and decode 64 tiles."""
    xy = all_xy(POOL_ZOOM)[:_TILES]
    stage(lambda: list(tiles.read(POOL_ZOOM, xy)), against="zlib")


def test_hand_tiles_on(stage: Stage, tiles: MBTilesSource) -> None:
    """Read, decode, hash and stage 64 tiles for an encoder that does nothing."""
    xy = all_xy(POOL_ZOOM)[:_TILES]

    def run() -> None:
        hand_on(tiles, POOL_ZOOM, xy, lambda pixels, digests: None, batch=32, progress=lambda done: None)

    stage(run, against="zlib")


def test_read_photo(stage: Stage, jpeg: bytes) -> None:
    """Decode a photo of two megapixels."""
    stage(lambda: read_photo(jpeg), against="zlib")


def test_preprocess_photo(stage: Stage, jpeg: bytes) -> None:
    """Bring a photo of two megapixels to the encoder's square."""
    pixels = read_photo(jpeg).pixels
    stage(lambda: to_square(pixels, 224), against="zlib")


def _session(path: Path) -> Any:  # noqa: ANN401 - ONNX Runtime publishes no types
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def test_trunk(stage: Stage, engine: GeoEngine, pictures: NDArray[np.uint8]) -> None:
    """Run the planet's trunk on 8 pictures."""
    path = engine.bundle.trunk_path(112, engine.backend.variant)
    assert path is not None
    session = _session(path)
    stage(lambda: session.run(None, {session.get_inputs()[0].name: pictures[:8]}), against="gemm")


def test_head(stage: Stage, engine: GeoEngine, pictures: NDArray[np.uint8]) -> None:
    """Run one of the planet's heads on 32 pictures' tokens."""
    variant = engine.backend.variant
    trunk, head = engine.bundle.trunk_path(112, variant), engine.bundle.head_path(encoder_name(4), variant)
    assert trunk is not None
    first, session = _session(trunk), _session(head)
    [tokens] = first.run(None, {first.get_inputs()[0].name: pictures})
    stage(lambda: session.run(None, {session.get_inputs()[0].name: tokens}), against="gemm")


def test_encode(stage: Stage, engine: GeoEngine, pictures: NDArray[np.uint8]) -> None:
    """Encode 16 pictures as the engine does."""
    stage(lambda: engine.backend.encode(PHOTO, pictures[:16]), against="gemm")


@pytest.mark.parametrize("queries", [1, 16])
def test_top_k(stage: Stage, queries: int) -> None:
    """Find the 16 best of 32 768 rows, on one thread."""
    rows, asked = unit_rows(32_768), unit_rows(queries).astype(np.float32)
    stage(lambda: cosine_topk(rows, asked, 16, normalized=True, threads=1), against="copy")


def test_top_k_of_lists(stage: Stage) -> None:
    """Find the 16 best of each of 64 photos' own 256 rows, on one thread."""
    rows, asked = unit_rows(8192), unit_rows(64).astype(np.float32)
    lists = np.random.default_rng(2).integers(0, len(rows), 64 * 256)
    segments = np.arange(65) * 256
    stage(lambda: cosine_topk(rows, asked, 16, rows=lists, segments=segments, threads=1), against="copy")


def test_search_of_known_tiles(stage: Stage, engine: GeoEngine, located: list[Location]) -> None:
    """Search with all rows known: candidates, look-ups, ranking, and nothing encoded."""
    photos = engine.embed_photos([engine.prepare(photo) for photo in drawn_photos(len(located), 3)])
    config = SearchConfig(k=4, levels=_LEVELS)
    stage(lambda: search(photos, engine.source, engine.backend, config, known=engine.known), against="python")


def test_open_index(stage: Stage, index: Path) -> None:
    """Open an index of 100 000 rows, ten times."""
    stage(lambda: [TileIndex(index) for _ in range(10)], against="python")


def test_score_index(stage: Stage, index: Path) -> None:
    """Score one photo against a whole index of 100 000 rows, on one thread."""
    table = TileIndex(index).table(12, None)
    assert table is not None
    query = unit_rows(1).astype(np.float32)
    stage(lambda: cosine_topk(table.matrix, query, 16, threads=1), against="copy")


def _maker() -> Maker:
    names = ("encoder", "source", "model", "backend", "variant", "tiles", "attribution", "world")
    return Maker(width=_WIDTH, **dict.fromkeys(names, "random"))


def test_write_row_cache(stage: Stage, tmp_path: Path) -> None:
    """Keep 1024 rows."""
    rows, ids = unit_rows(1024), np.arange(1024, dtype=np.uint64)
    cache = RowCache(tmp_path, _maker())
    cache.refresh()
    turn = iter(range(1_000_000))
    stage(lambda: cache.keep(12, ids + np.uint64(1024 * next(turn)), rows), against="disk")


def test_read_row_cache(stage: Stage, tmp_path: Path) -> None:
    """Look up 16 384 rows, of which half are there."""
    ids = np.arange(8192, dtype=np.uint64)
    cache = RowCache(tmp_path, _maker())
    cache.refresh()
    cache.keep(12, ids * np.uint64(2), unit_rows(len(ids)))
    wanted, into = np.arange(16_384, dtype=np.uint64), np.zeros((16_384, _WIDTH), np.float16)
    assert cache.look_up(12, wanted, into).sum() == len(ids)
    stage(lambda: cache.look_up(12, wanted, into), against="copy")


def test_json(stage: Stage, located: list[Location]) -> None:
    """Write eight results as JSON lines."""
    stage(lambda: json_lines(located), against="python")


def test_geojson(stage: Stage, located: list[Location]) -> None:
    """Write eight results as GeoJSON."""
    stage(lambda: geojson_text(located), against="python")


def test_html(stage: Stage, located: list[Location]) -> None:
    """Write eight results as a page."""
    stage(lambda: html_map(located), against="python")
