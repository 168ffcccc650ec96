"""The contenders of `geoengine bench peers`: all encode the same tower, and what breaks is said."""

import contextlib
import sys

import numpy as np
import pytest
from int8_bundle import SIDE, make_tower
from made_encoders import MEAN, STD, expected

from geoengine.bench.suite import peers_contenders, peers_encoders
from geoengine.bench.suite.peers_contenders import BASE, Peer, Setting, check_fastembed
from geoengine.bench.suite.peers_towers import Tower
from geoengine.engine.errors import GeoEngineError
from geoengine.export.pictures import sample_pictures

BATCH = 16
SETTING = Setting(batch=BATCH)


def silent(done, total, what):
    """Show no progress."""


@pytest.fixture
def tower(tmp_path):
    return Tower(make_tower().eval(), MEAN, STD, tmp_path, side=SIDE, trunk_blocks=3)


@pytest.fixture(scope="module")
def batches():
    return [sample_pictures(SIDE, BATCH, seed=seed) for seed in (1, 2, 3, 4)]


def opened(peer, tower, setting=SETTING):
    with contextlib.ExitStack() as stack:
        yield peer.open(tower, setting, stack)


def test_a_faster_wrong_answer_is_seen_and_what_is_missing_or_breaks_is_said(tower, batches, monkeypatch):
    def wrong(tower, setting, stack):
        return lambda pixels: np.eye(BATCH, 64, dtype=np.float32)[: len(pixels)]

    def broken(tower, setting, stack):
        raise RuntimeError("no compiler\nand more")

    def breaks(tower, setting, stack):
        return lambda pixels: 1 / 0

    real = [
        peer for peer in peers_contenders.peers_of(SETTING) if peer.name in (BASE, "open_clip bf16 eager")
    ]
    made = [
        Peer("absent", ("no_such_module",), "pip install absent", wrong),
        *(Peer(made.__name__, (), "", made) for made in (wrong, broken, breaks)),
    ]
    monkeypatch.setattr(peers_encoders, "peers_of", lambda setting: [*real, *made])
    figures = peers_encoders.compare(tower, SETTING, batches, silent)
    assert figures["absent"] == {"ours": False, "missing": "pip install absent"}
    assert figures["broken"]["failed"] == "RuntimeError: no compiler"
    assert figures["breaks"]["failed"].startswith("ZeroDivisionError")
    assert figures["wrong"]["min_cosine"] < 0.9 and figures["wrong"]["mean_overlap"] < 0.9
    ours = {name for name, own in figures.items() if own["ours"]}
    assert ours == {"openvino int8", "onnxruntime-cpu int8", "onnxruntime-cpu fp32"}
    for name in [BASE, "open_clip bf16 eager", *ours]:
        own = figures[name]
        assert own["min_cosine"] > (0.99999 if "fp32" in name else 0.99), name
        assert own["seconds"]["rounds"] == len(batches) - 1
        assert own["batch_difference"] < (1e-5 if name in ours or name == BASE else 1e-2), name


def test_ours_must_run(tower, batches, monkeypatch):
    base = [peer for peer in peers_contenders.peers_of(SETTING) if peer.name == BASE]
    monkeypatch.setattr(peers_encoders, "peers_of", lambda setting: base)
    monkeypatch.setattr(peers_encoders, "open_ours", lambda *_: [("openvino int8", lambda pixels: 1 / 0)])
    with pytest.raises(ZeroDivisionError):
        peers_encoders.compare(tower, SETTING, batches, silent)


def test_openvino_normalises_as_pytorch_does(tower, batches):
    pytest.importorskip("openvino")
    for name, least in (("OpenVINO fp32", 0.99999), ("OpenVINO bf16", 0.999)):
        [peer] = [peer for peer in peers_contenders.peers_of(SETTING) if peer.name == name]
        for encode in opened(peer, tower):
            rows = encode(batches[0])
        assert (rows * expected(tower.module, batches[0])).sum(1).min() > least


def test_compiled_towers_see_whole_batches_alone():
    seen = []

    def encode(pixels):
        seen.append(pixels.copy())
        return pixels[:, 0, 0].astype(np.float32)

    pixels = np.full((3, 2, 2, 3), 7, np.uint8)
    rows = peers_contenders._whole_batches(encode, 8, pixels)
    assert rows.shape == (3, 3) and (rows == 7).all()
    assert seen[0].shape == (8, 2, 2, 3) and seen[0][3:].sum() == 0


STUB = """
import json, pathlib
import numpy as np
class ImageEmbedding:
    def __init__(self, name, specific_model_path, threads):
        assert name == "Qdrant/clip-ViT-B-32-vision" and threads >= 1
        config = json.loads((pathlib.Path(specific_model_path) / "preprocessor_config.json").read_text())
        self.side = config["crop_size"]["height"]
        print("noise", file=__import__("sys").stderr)
    def embed(self, pictures, batch_size):
        assert batch_size == len(pictures) and pictures[0].size == (self.side, self.side)
        if np.asarray(pictures[0]).max() == 0:
            raise ValueError("black")
        for picture in pictures:
            yield np.asarray(picture).reshape(-1, 3).mean(0)
"""


@pytest.fixture
def stub(tower, tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "fastembed.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"))
    (tmp_path / "stock").mkdir()
    tower.__dict__["stock_onnx"] = tmp_path / "stock" / "model.onnx"
    [peer] = [
        peer
        for peer in peers_contenders.peers_of(Setting(batch=BATCH, fastembed=sys.executable))
        if peer.name == "fastembed"
    ]
    assert not peer.missing()
    return opened(peer, tower, Setting(batch=BATCH, fastembed=sys.executable))


def test_fastembed_runs_in_its_own_python(stub, batches):
    check_fastembed(sys.executable)
    for encode in stub:
        for batch in (batches[0], batches[1][:1]):
            np.testing.assert_allclose(encode(batch), batch.reshape(len(batch), -1, 3).mean(1), rtol=1e-5)


def test_fastembed_that_dies_is_an_error(stub):
    for encode in stub:
        with pytest.raises(GeoEngineError, match="process has ended"):
            encode(np.zeros((1, SIDE, SIDE, 3), np.uint8))


def test_a_python_without_fastembed_is_refused(tmp_path):
    python = tmp_path / "python"
    with pytest.raises(GeoEngineError, match="cannot be run"):
        check_fastembed(str(python))
    python.write_text("#!/bin/sh\necho 'No module named fastembed' >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(GeoEngineError, match=r"No module named fastembed.*pip install fastembed"):
        check_fastembed(str(python))
