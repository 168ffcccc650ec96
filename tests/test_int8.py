"""The int8 variant: agreement with PyTorch on other pictures than those of calibration, in any batch."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from int8_bundle import OUTLIERS, SIDE, make_tower, residual_channels, write_int8
from made_encoders import encode, expected, shaken, timm_tower, write_encoder
from onnx import TensorProto
from onnxruntime.quantization import QuantType, quantize_dynamic
from PIL import Image

from geoengine.engine.errors import ExportError
from geoengine.engine.preprocess import to_square
from geoengine.export import int8_scales
from geoengine.export.int8 import quantize_graphs
from geoengine.export.int8_scales import Observed, choose_scale, pixel_scale, quantize
from geoengine.export.pictures import sample_pictures

torch.set_num_threads(1)
PHOTOS = Path(__file__).parent / "data" / "photos"


@pytest.fixture(scope="module")
def held_out():
    """Squares out of the test photos, several a photo: calibration has drawn patterns only."""
    squares = []
    for file in sorted(PHOTOS.glob("*.jpg")):
        photo = np.asarray(Image.open(file).convert("RGB"))
        height, width = photo.shape[:2]
        for part in (1.0, 0.6, 0.3):
            squares.append(to_square(photo[: int(height * part), -int(width * part) :], SIDE))
    return np.stack(squares)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    tower = make_tower()
    trunks, heads = write_int8(tower, tmp_path_factory.mktemp("plain"), sides=(SIDE, 96))
    return tower, {**trunks, "head": heads["photo"]}


def cosines(files, tower, pictures):
    return (encode(files, SIDE, pictures).astype(float) * expected(tower, pictures)).sum(1)


def overlap(found, exact, k):
    """The mean share of the k rows nearest to each row that two embeddings of the same pictures agree on."""
    shares = []
    for row in range(len(exact)):
        best = [set(np.argsort(-(rows @ rows[row]), kind="stable")[1 : k + 1]) for rows in (found, exact)]
        shares.append(len(best[0] & best[1]) / k)
    return np.mean(shares)


def test_agrees_with_pytorch_on_pictures_of_another_kind(plain, held_out):
    tower, files = plain
    assert cosines(files, tower, held_out).min() > 0.999


def test_ranks_as_pytorch_does(plain, held_out):
    tower, files = plain
    assert overlap(encode(files, SIDE, held_out), expected(tower, held_out), 6) >= 0.95


def test_outlier_channels(tmp_path, held_out):
    """A few channels 20 to 100 times the rest: ranks stay, and without smoothing they do not."""
    tower = make_tower(outliers=True)
    sizes = residual_channels(tower, held_out)
    assert set(np.argsort(sizes[-1])[-len(OUTLIERS) :]) == set(OUTLIERS)
    assert sizes[-1, list(OUTLIERS)].min() > 20
    assert sizes[-1].max() > sizes[0].max() > 20
    exact = expected(tower, held_out)
    spread = ((exact - exact.mean(0)) ** 2).sum()  # outliers make embeddings alike, and cosines close to 1
    errors, shares = {}, {}
    for smooth in (True, False):
        trunks, heads = write_int8(tower, tmp_path / str(smooth), smooth=smooth)
        found = encode({**trunks, "head": heads["photo"]}, SIDE, held_out)
        errors[smooth] = ((found - exact) ** 2).sum() / spread
        shares[smooth] = overlap(found, exact, 6)
        assert (found * exact).sum(1).min() > (0.9999 if smooth else 0.995)
    assert errors[True] < 0.005 < 0.05 < errors[False]
    assert shares[False] < 0.95 < shares[True]


@pytest.mark.parametrize("count", [1, 2, 3, 8, 31])
def test_an_embedding_is_the_same_in_any_batch(plain, held_out, count):
    files = plain[1]
    whole = encode(files, SIDE, held_out)
    np.testing.assert_array_equal(encode(files, SIDE, held_out[:count]), whole[:count])
    np.testing.assert_array_equal(encode(files, SIDE, held_out[-count:]), whole[-count:])


def test_dynamic_quantization_depends_on_the_batch(plain, held_out, tmp_path):
    """Why scales are fixed at the build: the usual way takes them from whatever is in the batch."""
    folder = plain[1]["head"].parent / "float"
    files = {}
    for name, graph in ((SIDE, f"trunk.{SIDE}.fp32.onnx"), ("head", "head_photo.fp32.onnx")):
        whole, files[name] = tmp_path / f"whole_{name}.onnx", tmp_path / f"{name}.onnx"
        onnx.save(onnx.load(folder / graph), whole)
        quantize_dynamic(whole, files[name], weight_type=QuantType.QInt8)
    pictures = held_out.copy()
    pictures[0] = 0
    alone, among = encode(files, SIDE, pictures[5:6])[0], encode(files, SIDE, pictures)[5]
    assert np.abs(alone - among).max() > 1e-4


def test_products_are_int8_and_the_rest_float(plain):
    for part in (SIDE, 96, "head"):
        graph = onnx.load(plain[1][part], load_external_data=False).graph
        types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        maker = {output: node for node in graph.node for output in node.output}
        weights = {}
        for node in graph.node:
            if node.op_type == "MatMul" and node.input[1] in maker:
                source = maker[node.input[1]]
                if source.op_type == "DequantizeLinear":
                    weights[node.input[1]] = types[source.input[0]]
                    before = maker[node.input[0]]
                    assert before.op_type == "DequantizeLinear"
                    assert maker[before.input[0]].op_type == "QuantizeLinear"
                    assert types[before.input[2]] == TensorProto.UINT8
        assert set(weights.values()) == {TensorProto.INT8}
        # A block has those of query, key, value and result, and two more; the patches have one.
        assert len(weights) == (1 + 3 * 6 if part != "head" else 6 + 6)
        kept = {name for name in types if name.rpartition(".")[2].startswith("w_")}
        assert kept == ({"w_projection"} if part == "head" else set())


def test_nothing_lies_between_a_product_and_attention(plain):
    """Products give queries, keys and values apart, and values as the next product takes what is mixed."""
    for part, blocks in ((SIDE, 3), ("head", 2)):
        nodes = onnx.load(plain[1][part], load_external_data=False).graph.node
        maker = {output: node for node in nodes for output in node.output}
        softmaxes = [node for node in nodes if node.op_type == "Softmax"]
        assert "Split" not in {node.op_type for node in nodes}
        assert len(softmaxes) == blocks
        results = {node.input[0] for node in nodes if node.op_type == "QuantizeLinear"}
        mixed = 0
        for name in results:
            before = maker.get(name)
            while before is not None and before.op_type in ("Reshape", "Transpose"):
                before = maker.get(before.input[0])
            mixed += before is not None and before.op_type == "MatMul"
        assert mixed == blocks


def test_trunks_share_their_weights(plain):
    folder = plain[1]["head"].parent
    names = {file.name for file in folder.iterdir() if file.is_file()}
    assert names == {
        "trunk.weights", f"trunk.{SIDE}.int8.onnx", "trunk.96.int8.onnx",
        "head_photo.weights", "head_photo.int8.onnx",
    }  # fmt: skip
    sizes = [(folder / name / "trunk.weights").stat().st_size for name in (".", "float")]
    assert sizes[0] < 0.3 * sizes[1]


def test_other_sides_are_resized_in_the_graph(plain):
    """And their pixels are whole numbers too, so the patch embedding is as good."""
    tower, files = plain
    pictures = sample_pictures(96, 8)
    resized = np.stack([to_square(picture, SIDE) for picture in pictures])
    found = encode(files, 96, pictures).astype(float)
    assert (found * expected(tower, resized)).sum(1).min() > 0.999


def test_one_seed_gives_the_same_files(plain, tmp_path):
    write_int8(plain[0], tmp_path, sides=(SIDE, 96))
    for file in plain[1]["head"].parent.glob("*.*"):
        assert file.read_bytes() == (tmp_path / file.name).read_bytes(), file.name


@pytest.mark.parametrize("blocks", [0, 2, None])
@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_other_towers_and_splits(kind, blocks, tmp_path):
    """Attention pooling, no layer normalisation before, a trunk of nothing: all products are found."""
    tower = shaken(timm_tower()) if kind == "siglip" else shaken(make_small())
    (tmp_path / "float").mkdir()
    files = write_encoder(tower, tmp_path / "float", blocks=blocks)
    pictures = sample_pictures(16, 32, seed=3)
    trunks, heads = quantize_graphs({16: files[16]}, {"photo": files["head"]}, tmp_path, pictures)
    exact = encode(files, 16, sample_pictures(16, 16))
    found = encode({16: trunks[16], "head": heads["photo"]}, 16, sample_pictures(16, 16))
    assert (exact * found).sum(1).mean() > 0.997  # sums are short here, and errors average out less
    weights = onnx.load(heads["photo"], load_external_data=False).graph.initializer
    assert not [tensor.name for tensor in weights if tensor.name.endswith(("w_qkv", "w_kv", "w_patch"))]


def make_small():
    from made_encoders import SMALL

    return SMALL.build()


@pytest.mark.parametrize(
    "pictures",
    [
        np.zeros((2, 32, 32, 3), np.uint8),
        np.zeros((0, SIDE, SIDE, 3), np.uint8),
        np.zeros((2, SIDE, SIDE), np.uint8),
        np.zeros((2, SIDE, SIDE, 3), np.float32),
    ],
)
def test_pictures_that_do_not_fit_are_refused(plain, tmp_path, pictures):
    with pytest.raises(ExportError, match=rf"uint8 \(n, S, S, 3\) with S one of \[{SIDE}\], got"):
        quantize_graphs({SIDE: plain[1][SIDE]}, {}, tmp_path, pictures)


# --- the arithmetic ---------------------------------------------------------------------------------------


def observe(values):
    observed = Observed()
    observed.add(values.astype(np.float32), 1.0)
    return observed


def test_pixels_lose_nothing():
    pixels = (np.arange(256, dtype=np.float32)[:, None] - 128) / 64
    scale = pixel_scale(1)
    np.testing.assert_array_equal(scale.rounded(pixels), pixels + scale.shift)
    assert set((scale.rounded(pixels) / scale.step).ravel()) == set(range(256))


def test_a_product_in_8_bits_is_the_product():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 64)) * np.geomspace(0.1, 30, 64) + rng.normal(size=64) * 5
    weight = rng.normal(size=(64, 48)).astype(np.float32)
    observed = observe(x)
    scale = choose_scale([observed], [weight])
    product = quantize(scale, weight, observed)
    exact = x @ weight
    found = scale.rounded(x.astype(np.float32)) @ (product.weight * product.step) + product.bias
    assert np.std(found - exact) < 0.02 * np.std(exact)
    assert np.abs((found - exact).mean(0)).max() < 1e-3  # no rounding remains on average
    plain = choose_scale([observed], [weight], smooth=False)
    rough = quantize(plain, weight, observed)
    worse = plain.rounded(x.astype(np.float32)) @ (rough.weight * rough.step) + rough.bias
    assert np.std(worse - exact) > 1.5 * np.std(found - exact)


def test_sums_of_two_products_fit_16_bits():
    """What AVX2's instruction for them needs, and so that every CPU gives the same numbers."""
    rng = np.random.default_rng(0)
    observed, weight = observe(rng.normal(size=(50, 16))), rng.normal(size=(16, 4)).astype(np.float32)
    product = quantize(choose_scale([observed], [weight]), weight, observed)
    assert 2 * 255 * int(np.abs(product.weight.astype(int)).max()) < 2**15


def test_values_beyond_those_seen_have_room():
    observed = observe(np.random.default_rng(0).uniform(-1, 1, (500, 8)))
    scale = choose_scale([observed], [np.ones((8, 4), np.float32)])
    beyond = np.full((1, 8), 1.1, np.float32)
    exact = beyond * scale.factor + scale.shift
    assert np.abs(scale.rounded(beyond) - exact).max() <= 0.51 * scale.step
    assert int8_scales.MARGIN > 1.1


def test_channels_that_hold_nothing():
    """Zeros everywhere, as dead channels have, divide by nothing."""
    values = np.zeros((50, 8))
    values[:, 0] = np.linspace(-1, 1, 50)
    weight = np.zeros((8, 4), np.float32)
    weight[0] = 1
    observed = observe(values)
    scale = choose_scale([observed], [weight])
    product = quantize(scale, weight, observed)
    found = scale.rounded(values.astype(np.float32)) @ (product.weight * product.step) + product.bias
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, values @ weight, atol=0.02)


def test_observing_in_parts_is_observing_the_whole():
    values = np.random.default_rng(0).normal(size=(6, 10, 4)).astype(np.float32)
    whole, parts = observe(values), Observed()
    for part in np.split(values, 3):
        parts.add(part, 1 / 3)
    for name in ("low", "high"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
    np.testing.assert_allclose(whole.mean, parts.mean, rtol=1e-6)
    assert {tuple(row) for row in parts.sample} <= {tuple(row) for row in values.reshape(-1, 4)}
