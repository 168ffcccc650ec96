"""What decodes tiles: nvImageCodec beside OpenCV, in batches, and the choice between them."""

import gzip
import io
import threading
import time
import zlib
from collections import Counter
from contextlib import closing

import numpy as np
import pytest
from made_tiles import all_xy, picture
from PIL import Image
from test_sources import write_mbtiles

from geoengine.engine.backends import open_backend
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.doctor import decoding, gpu
from geoengine.engine.doctor.finding import State
from geoengine.engine.engine import GeoEngine
from geoengine.engine.errors import SourceError
from geoengine.engine.index.building import build_index
from geoengine.engine.index.known_rows import KnownRows
from geoengine.engine.search import SearchConfig, search
from geoengine.engine.sources import decoders
from geoengine.engine.sources.decode import read_picture
from geoengine.engine.sources.decoders import NvImageCodecDecoder, OpenCvDecoder, made_tile
from geoengine.engine.sources.mbtiles import MBTilesSource
from geoengine.engine.sources.planet import PlanetSource
from geoengine.engine.sources.streaming import Encoded, stream
from geoengine.engine.tiles import descendants_xy

AGREE = 0.999
"""Least cosine of the embeddings of one tile, decoded in two ways."""


def open_nvimgcodec(**options):
    try:
        return NvImageCodecDecoder(**options)
    except SourceError as missing:
        pytest.skip(str(missing))


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.gpu)], ids=["cpu", "gpu"])
def decoder(request):
    return open_nvimgcodec(on_gpu=request.param)


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch):
    monkeypatch.setattr(decoders, "_choice", decoders._Choice())
    monkeypatch.delenv(decoders.VARIABLE, raising=False)


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(size=64, mode="RGB"):
    channels = len(mode) if mode != "L" else 1
    shape = (size, size, channels) if channels > 1 else (size, size)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), mode)


# --- nvImageCodec ------------------------------------------------------------------------------------------


def test_a_batch_of_every_kind_is_decoded_as_opencv_does(decoder):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, which tiles are not
    tiles = {
        "imagery": made_tile(),
        "512 pixels": made_tile(512),
        "progressive": encoded(noise(), progressive=True, quality=90),
        "turned": encoded(noise(), exif=exif),
        "grey": encoded(noise(mode="L")),
        "four inks": encoded(noise(mode="CMYK")),
        "png": encoded(noise(mode="RGBA"), "PNG"),
        "webp": encoded(noise(), "WEBP"),
        "gzip'd": gzip.compress(made_tile()),
        "cut short": made_tile()[:-300],
        "rubbish": b"\xff\xd8" + bytes(300) + b"\xff\xd9",
        "nothing": b"",
        "text": "no bytes at all",
    }
    for name, got in zip(tiles, decoder.decode(list(tiles.values())), strict=True):
        expected = read_picture(tiles[name])
        if expected is None:
            assert got is None, name
            continue
        if expected.ndim == 2 and got.ndim == 3:
            expected = np.repeat(expected[..., None], 3, axis=2)
        assert got.shape == expected.shape, name
        difference = np.abs(got.astype(int) - expected)
        # Colours that are stored for every other pixel are spread in more than one way.
        assert difference.mean() < 2 and np.percentile(difference, 99) < 24, (name, difference.max())
    assert decoder.decode([]) == []


def test_what_nvimagecodec_fails_at_opencv_decodes(decoder, monkeypatch, caplog):
    class Broken:
        def decode(self, streams, params):
            raise RuntimeError("out of memory\nin some file")

    monkeypatch.setattr(decoder, "_decoder", Broken())
    for _ in range(2):
        for got in decoder.decode([made_tile()] * 3):
            np.testing.assert_array_equal(got, read_picture(made_tile()))
    assert caplog.messages == ["nvImageCodec fails, OpenCV decodes: out of memory"]


def test_threads_may_decode_at_the_same_time(decoder):
    expected, wrong = decoder.decode([made_tile()])[0], []

    def decode():
        for got in decoder.decode([made_tile()] * 20):
            if not np.array_equal(got, expected):
                wrong.append(got)

    threads = [threading.Thread(target=decode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_it_says_nothing_while_it_is_loaded(decoder, capfd):
    open_nvimgcodec(on_gpu=False)
    assert capfd.readouterr().err == ""


# --- batches -----------------------------------------------------------------------------------------------


class Batches:
    """Decodes the number in a tile's text to a picture of that colour; `slow_s` a call."""

    name, batch = "made", 256

    def __init__(self, slow_s=0.0):
        self.sizes, self.slow_s = [], slow_s

    def takes(self, tile):
        return not isinstance(tile, bytes)

    def decode(self, tiles):
        self.sizes.append(len(tiles))
        time.sleep(self.slow_s)
        return [None if tile is None else np.full((4, 4, 3), tile % 251, np.uint8) for tile in tiles]


def collect(jobs, decoder, workers=4):
    seen = {}
    for batch in stream(iter(jobs), workers=workers, tile_size=lambda _: 4, decoder=decoder):
        for position, pixels in zip(batch.positions.tolist(), batch.pixels, strict=True):
            assert position not in seen
            seen[position] = int(pixels[0, 0, 0])
    return seen


def test_tiles_that_come_while_others_are_decoded_make_a_batch():
    decoder = Batches(slow_s=0.01)
    seen = collect(((i, lambda i=i: Encoded(i)) for i in range(2000)), decoder)
    assert seen == {i: i % 251 for i in range(2000)}
    assert sum(decoder.sizes) == 2000
    assert len(decoder.sizes) < 40 and max(decoder.sizes) <= decoder.batch


@pytest.mark.parametrize("decoder", [Batches(), OpenCvDecoder()], ids=["batches", "one by one"])
def test_a_tile_that_does_not_decode_is_tried_otherwise_once(decoder):
    tries = Counter()
    good = 7 if decoder.batch > 1 else picture((7, 7, 7), size=4)

    def again(position, found):
        tries[position] += 1
        return found

    def job(position):
        bad = None
        if position % 3 == 0:  # fetched again, and good
            return lambda: Encoded(bad, lambda: again(position, np.full((4, 4, 3), 7, np.uint8)))
        if position % 3 == 1:  # good bytes on the second try, and another way that is not needed
            return lambda: Encoded(bad, lambda: again(position, Encoded(good, lambda: again(position, None))))
        return lambda: Encoded(bad, lambda: again(position, None))  # and missing

    seen = collect(((i, job(i)) for i in range(300)), decoder)
    assert seen == {i: 7 for i in range(300) if i % 3 < 2}
    assert tries == dict.fromkeys(range(300), 1)


def test_tiles_that_gain_nothing_in_a_batch_are_decoded_in_their_threads():
    decoder = Batches(slow_s=0.01)
    png = picture((9, 9, 9), size=4)
    jobs = ((i, lambda i=i: Encoded(png if i % 2 else 5)) for i in range(300))
    assert collect(jobs, decoder) == {i: 9 if i % 2 else 5 for i in range(300)}
    assert sum(decoder.sizes) == 150


def test_only_jpeg_tiles_are_batched(decoder):
    assert decoder.takes(made_tile())
    assert not decoder.takes(picture("red"))
    assert not decoder.takes(gzip.compress(made_tile())) and not decoder.takes("no bytes")


def test_what_a_decoder_raises_reaches_the_caller():
    class Broken(Batches):
        def decode(self, tiles):
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        collect(((i, lambda: Encoded(1)) for i in range(600)), Broken())


def test_no_tile_is_left_behind_as_threads_hand_over():
    for _ in range(30):
        assert len(collect(((i, lambda: Encoded(1)) for i in range(64)), Batches(), workers=8)) == 64


# --- the choice --------------------------------------------------------------------------------------------


def test_opencv_decodes_unless_a_backend_is_on_a_gpu(monkeypatch):
    monkeypatch.setattr(decoders, "is_installed", lambda: True)
    assert decoders.tile_decoder().name == "OpenCV"


@pytest.mark.parametrize(("seconds", "chosen"), [((2.0, 1.0), "nvImageCodec"), ((1.0, 2.0), "OpenCV")])
def test_near_a_gpu_the_faster_one_decodes(monkeypatch, seconds, chosen, caplog):
    class OnGpu(Batches):
        name = "nvImageCodec"

    monkeypatch.setattr(decoders, "is_installed", lambda: True)
    monkeypatch.setattr(decoders, "NvImageCodecDecoder", OnGpu)
    taken = dict(zip(("OpenCV", "nvImageCodec"), seconds, strict=True))
    monkeypatch.setattr(decoders, "seconds_per_batch", lambda decoder: taken[decoder.name])
    assert decoders.tile_decoder().name == "OpenCV"
    with caplog.at_level("DEBUG"):
        decoders.allow_gpu_decoding()
        assert decoders.tile_decoder().name == chosen
        assert decoders.tile_decoder() is decoders.tile_decoder()
    assert f"{chosen} decodes tiles: for 256 tiles OpenCV takes" in caplog.text
    monkeypatch.setenv(decoders.VARIABLE, "opencv")
    monkeypatch.setattr(decoders, "_choice", decoders._Choice())
    decoders.allow_gpu_decoding()
    assert decoders.tile_decoder().name == "OpenCV"


def test_doctor_says_what_decodes_and_how_to_get_the_other(monkeypatch):
    def finding():
        [found] = decoding.findings()
        return found.state, found.detail, found.remedy

    monkeypatch.setattr(gpu, "cuda_devices", lambda: [])
    assert finding() == (State.OK, "OpenCV: nvImageCodec is for backends on an NVIDIA GPU", "")
    monkeypatch.setattr(gpu, "cuda_devices", lambda: ["a GPU"])
    for module in (decoders, decoding):
        monkeypatch.setattr(module, "is_installed", lambda: False)
    state, detail, remedy = finding()
    assert (state, remedy) == (State.ABSENT, "pip install 'geoengine[gpu]'")
    assert "OpenCV: nvImageCodec, which may be faster on a GPU, is not installed" in detail
    monkeypatch.setenv(decoders.VARIABLE, "nvimgcodec")
    assert finding()[0] is State.BROKEN
    monkeypatch.setenv(decoders.VARIABLE, "turbo")
    assert finding()[0] is State.BROKEN
    monkeypatch.delenv(decoders.VARIABLE)
    for module in (decoders, decoding):
        monkeypatch.setattr(module, "is_installed", lambda: True)
    monkeypatch.setattr(decoders, "NvImageCodecDecoder", Batches)
    monkeypatch.setattr(decoders, "seconds_per_batch", lambda decoder: 1.0 / decoder.batch)
    state, detail, _ = finding()
    assert state is State.OK
    assert detail.startswith("made: for 256 tiles OpenCV takes 1000.0 ms, made takes 3.9 ms")
    assert detail.endswith("; GEOENGINE_DECODER=opencv takes the other one")


def test_an_engine_with_a_backend_on_a_gpu_allows_it():
    class Backend:
        name, variant = "tensorrt", "fp16"

    GeoEngine(EngineBundle.open("planet", verify=False), PlanetSource(), Backend())
    assert decoders._choice.gpu


def test_a_named_decoder_runs_or_says_what_is_missing(monkeypatch):
    monkeypatch.setenv(decoders.VARIABLE, "nvimgcodec")
    monkeypatch.setattr(decoders, "is_installed", lambda: False)
    with pytest.raises(SourceError, match=r"not installed.*pip install 'geoengine\[gpu\]'"):
        decoders.tile_decoder()
    monkeypatch.setenv(decoders.VARIABLE, "turbo")
    with pytest.raises(SourceError, match="GEOENGINE_DECODER is 'turbo': it must be auto, opencv or nvim"):
        decoders.tile_decoder()


def test_without_a_gpu_nvimagecodec_says_so():
    if not decoders.is_installed():
        pytest.skip("nvImageCodec is not installed")
    try:
        NvImageCodecDecoder()
    except SourceError as error:
        assert "cannot run here" in str(error) and "GEOENGINE_DECODER=opencv" in str(error)
        assert "/" not in str(error)


# --- embeddings --------------------------------------------------------------------------------------------


class OtherRounding(OpenCvDecoder):
    """Decodes as another decoder might: every component up to 2 off."""

    name, batch = "other rounding", 64

    def takes(self, tile):
        return True

    def decode(self, tiles):
        return [_shaken(tile, picture) for tile, picture in zip(tiles, super().decode(tiles), strict=True)]


def _shaken(tile, picture):
    off = np.random.default_rng(zlib.crc32(tile)).integers(-2, 3, picture.shape)
    return np.clip(picture + off, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The planet's zoom 4, and zoom 6 under a part of it, as a file of JPEG tiles."""
    tiles = {}
    for zoom, xy in ((4, all_xy(4)), (6, descendants_xy([(x, y) for x in (7, 8) for y in (7, 8)], 4, 6))):
        for batch in PlanetSource().read(zoom, xy):
            for position, pixels in zip(batch.positions.tolist(), batch.pixels, strict=True):
                tiles[(zoom, *xy[position].tolist())] = encoded(Image.fromarray(pixels), quality=85)
    path = write_mbtiles(tmp_path_factory.mktemp("world") / "world.mbtiles", tiles, format="jpg")
    return path, np.array([(x, y) for z, x, y in tiles if z == 6], np.int64)


@pytest.fixture(scope="module")
def bundle():
    return EngineBundle.open("planet", verify=False)


@pytest.fixture(scope="module")
def backend(bundle):
    with closing(open_backend(bundle, backend="onnxruntime-cpu", threads=1)) as backend:
        yield backend


def planet_file(path):
    source = MBTilesSource(path)
    source.world = "planet"
    return closing(source)


def embed(path, zoom, xy, backend):
    rows = np.zeros((len(xy), 0))
    with planet_file(path) as source:
        for batch in source.read(zoom, xy):
            found = backend.encode(f"z{zoom:02d}", batch.pixels)
            rows = rows if rows.shape[1] else np.zeros((len(xy), found.shape[1]), np.float32)
            rows[batch.positions] = found
    return rows


@pytest.fixture(params=["nvimgcodec", "other rounding"])
def other(request):
    return OtherRounding() if request.param == "other rounding" else open_nvimgcodec(on_gpu=False)


def check_embeddings(world, backend, monkeypatch, other):
    path, xy = world
    own = embed(path, 6, xy, backend)
    monkeypatch.setattr(decoders._choice, "decoder", other)
    others = embed(path, 6, xy, backend)
    assert (own * others).sum(axis=1).min() >= AGREE
    assert other.name != "other rounding" or not np.array_equal(own, others)


def test_embeddings_of_two_decoders_agree(world, backend, monkeypatch, other):
    check_embeddings(world, backend, monkeypatch, other)


@pytest.mark.gpu
def test_embeddings_of_the_gpus_decoder_agree(world, backend, monkeypatch):
    check_embeddings(world, backend, monkeypatch, open_nvimgcodec())


def test_an_index_built_with_one_decoder_serves_another(world, bundle, backend, monkeypatch, tmp_path, other):
    path, xy = world
    photos = embed(path, 4, np.unique(xy >> 2, axis=0), backend)  # each knows its own tile best
    config = SearchConfig(k=4, levels=(4, 6))
    with planet_file(path) as source:
        index = build_index(tmp_path, bundle, source, backend, zooms=(4,))
        before = search(photos, source, backend, config, known=KnownRows(bundle.embed_dim, index, None))
    monkeypatch.setattr(decoders._choice, "decoder", other)
    with planet_file(path) as source:
        index.check_fits(bundle, source)
        after = search(photos, source, backend, config, known=KnownRows(bundle.embed_dim, index, None))
    assert [levels[0].beam for levels in after] == [levels[0].beam for levels in before]
    for old, new in zip(before, after, strict=True):
        assert [level.known for level in new] == [level.known for level in old] == [256, 0]
        assert (
            abs(new[-1].beam[0].score - old[-1].beam[0].score) <= (2 * (1 - AGREE)) ** 0.5
        )  # their distance
        assert new[-1].beam[0].tile in {scored.tile for scored in old[-1].beam[:2]}
